"""Rollouts: the sampler, which plays episodes with an engine."""
