"""Rewards: loading, running and combining any callable with trl's reward protocol."""
