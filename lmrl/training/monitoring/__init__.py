"""What watches a run: collapse, reward hacking, sampler mismatch, diagnostics; and what it leaves for a replay."""
