"""What flows: trajectories, and the batches that objectives make of them."""
