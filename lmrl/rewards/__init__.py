"""Rewards: any callable of the protocol that trl users know, loaded, run and composed."""
