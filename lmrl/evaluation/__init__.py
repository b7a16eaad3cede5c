"""Suites, scores with intervals, evaluation logs and comparisons."""

from lmrl.evaluation.api import Report, evaluate
from lmrl.evaluation.compare import compare
from lmrl.evaluation.frames import load_eval, load_run
from lmrl.evaluation.frontier import frontier

__all__ = ["Report", "compare", "evaluate", "frontier", "load_eval", "load_run"]
