"""Trajectories, and the batches that objectives make of them."""
