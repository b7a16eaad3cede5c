"""Tools that a model may call: what it is told of them, how its calls are read, and how they are run."""
