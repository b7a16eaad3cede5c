"""Suites, statistics and scores."""

from lmrl.evaluation.api import Report, evaluate

__all__ = ["Report", "evaluate"]
