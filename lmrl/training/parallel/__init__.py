"""Sharing weights, gradients and optimizer state among processes."""
