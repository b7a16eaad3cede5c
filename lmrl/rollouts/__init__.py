"""Rollouts: engines that sample tokens, and the sampler that plays episodes with one."""
