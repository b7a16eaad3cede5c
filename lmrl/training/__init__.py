"""The training loop."""

from lmrl.training.result import Result
from lmrl.training.train import default_output, dry_run, resume_run, train

__all__ = ["Result", "default_output", "dry_run", "resume_run", "train"]
