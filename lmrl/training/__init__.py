"""The training loop."""

from lmrl.training.train import Result, default_output, dry_run, resume_run, train

__all__ = ["Result", "default_output", "dry_run", "resume_run", "train"]
