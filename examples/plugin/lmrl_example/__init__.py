"""Things for lmrl, made known by the entry points in setup.cfg."""
