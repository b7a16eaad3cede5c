"""Trajectories, and the batches that objectives build from them."""
