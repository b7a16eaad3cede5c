"""The errors that lmrl raises on purpose. Each message is one line: what, where, and how to mend it.

`exit_code` tells whose turn it is: 2, the input has to change; 1, the run itself failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

COLLAPSED = 3
"""Exit code of a run that collapsed and ended with its best policy; see docs/guard.md."""


class LmrlError(Exception):
    """Root of the tree; the command line prints the message as one line and exits with `exit_code`."""

    exit_code = 2


class RecipeError(LmrlError):
    """A recipe, an override or a suite is wrong: unknown key, wrong type, missing file, or a choice that makes no sense."""


class PluginError(LmrlError):
    """A `file.py:Name` or dotted path cannot be loaded, or what it names cannot be used as what it is meant to be."""


class ModelError(LmrlError):
    """A model or tokenizer cannot be loaded, or cannot do what the recipe asks of it."""


class DataError(LmrlError):
    """A data file is missing, or a row of it is malformed."""


class RewardError(LmrlError):
    """A reward function broke its contract, or failed on too many samples."""


class TemporaryError(Exception):
    """For reward functions to raise: a failure that may pass, so that the call is tried again before samples are lost."""


class EndpointError(LmrlError):
    """An address that is to answer as a language model did not. temporary: another attempt may succeed."""

    def __init__(self, message: str, temporary: bool = False):
        super().__init__(message)
        self.temporary = temporary


class EpisodeError(LmrlError):
    """An environment failed on too many episodes. episodes: those that failed in this process (Trajectory)."""

    episodes: Sequence[Any] = ()


class RunError(LmrlError):
    """A run folder cannot be used as asked: it exists already, belongs to another recipe, or holds no checkpoint."""


class EngineError(LmrlError):
    """The engine that samples for a run was lost, and did not come back."""

    exit_code = 1


class NonFiniteError(LmrlError):
    """Too many optimizer steps in a row had a non-finite loss or gradient."""

    exit_code = 1


class ScoreError(LmrlError):
    """A score is below what was asked for, `lmrl eval --fail-under`."""

    exit_code = 1


class MemoryShortError(LmrlError):
    """Memory ran out where no smaller piece of work is left to try. failed: the pass (lmrl.policy.memory.FailedPass), if known."""

    exit_code = 1
    failed: Any = None


class SamplerError(LmrlError):
    """An engine samples from other probabilities than the learner computes."""

    exit_code = 1


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """`": did you mean 'clip'?"` for the nearest valid name, or the list of all where none is near."""
    valid = sorted(valid)
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; valid here: {', '.join(valid)}" if valid else ""
