"""Suites, statistics, scores and logs of them."""

from lmrl.evaluation.api import Report, evaluate
from lmrl.evaluation.frames import load_eval

__all__ = ["Report", "evaluate", "load_eval"]
