"""Monitoring a run: collapse, reward hacking, sampler mismatch, diagnostics, and bundles for a replay."""
