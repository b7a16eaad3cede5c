"""Tools that a model may call: how they are described to it, how its calls are parsed, and how they are run."""
