"""The errors that lmrl raises on purpose. Each message is one line: what, where, and how to fix it.

`exit_code` is 2 if the input must be fixed, and 1 if the run itself failed.
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
    """A recipe, an override or a suite is wrong: unknown key, wrong type, missing file, or an invalid choice."""


class PluginError(LmrlError):
    """A `file.py:Name` or dotted path cannot be loaded, or the loaded object cannot be used in that role."""


class ModelError(LmrlError):
    """A model or tokenizer cannot be loaded, or cannot do what the recipe asks of it."""


class DataError(LmrlError):
    """A data file is missing, or a row of it is malformed."""


class RewardError(LmrlError):
    """A reward function broke its contract, or failed on too many samples. comparison: of policies whose judge failed
    (lmrl.evaluation.paired.Comparison), if known."""

    comparison: Any = None


class TemporaryError(Exception):
    """For reward functions to raise: a transient failure, so that the call is retried before samples are lost."""


class EndpointError(LmrlError):
    """An endpoint did not answer as a language model should. temporary: True if another attempt may succeed.
    of_one_request: True if it refused this request, or answered it uselessly, which says nothing about others."""

    def __init__(self, message: str, temporary: bool = False, of_one_request: bool = False):
        super().__init__(message)
        self.temporary, self.of_one_request = temporary, of_one_request


class EpisodeError(LmrlError):
    """An environment failed on too many episodes. episodes: those that failed in this process (Trajectory)."""

    episodes: Sequence[Any] = ()


def first_of(error: BaseException) -> BaseException:
    """The first error of a group, as `asyncio.TaskGroup` raises it; any other error itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class RunError(LmrlError):
    """A run folder cannot be used as asked: it exists already, belongs to another recipe, or holds no checkpoint."""


class LostFolderError(RunError):
    """A run's folder was moved, deleted or replaced during the run."""

    exit_code = 1


class EngineError(LmrlError):
    """The run's engine stopped, and could not be restarted."""

    exit_code = 1


class NonFiniteError(LmrlError):
    """Too many optimizer steps in a row had a non-finite loss or gradient."""

    exit_code = 1


class ScoreError(LmrlError):
    """A score is below the floor set by `lmrl eval --fail-under`."""

    exit_code = 1


class MemoryShortError(LmrlError):
    """Memory ran out, and the work cannot be cut any further. failed: the pass (lmrl.policy.memory.FailedPass), if
    known."""

    exit_code = 1
    failed: Any = None


class SamplerError(LmrlError):
    """An engine samples from other probabilities than the learner computes."""

    exit_code = 1


def counted(count: int, one: str, several: str | None = None) -> str:
    """A number of things in words: `1 row`, `2 rows`. several: the plural, if it is not `one` with an s."""
    return f"{count} {one if count == 1 else several or f'{one}s'}"


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """`": did you mean 'clip'?"` for the nearest valid name, or the list of all if none is near."""
    valid = sorted(valid)
    near = difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; valid here: {', '.join(valid)}" if valid else ""
