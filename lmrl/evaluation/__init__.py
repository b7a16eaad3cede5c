"""Suites, statistics, scores, logs of them and comparisons."""

from lmrl.evaluation.api import Report, evaluate
from lmrl.evaluation.compare import compare
from lmrl.evaluation.frames import load_eval

__all__ = ["Report", "compare", "evaluate", "load_eval"]
