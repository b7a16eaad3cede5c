"""Sources: where a step's trajectories come from."""
