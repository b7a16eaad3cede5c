"""Parts for lmrl, registered by the entry points in setup.cfg."""
