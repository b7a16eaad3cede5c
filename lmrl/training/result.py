"""The result of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmrl.evaluation.frames import load_run, load_samples
from lmrl.evaluation.scoring import Scores
from lmrl.policy.classifier import Classifier
from lmrl.policy.load import open_classifier, open_policy
from lmrl.policy.policy import Policy
from lmrl.recipe import MAIN_STAGE
from lmrl.run_folders import read_recipe

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass
class Result:
    """The result of a finished run: its folder, the closing table and the final checkpoint; what it has recorded as tables."""

    folder: Path
    scores: dict[str, dict[str, dict[str, Any]]]
    """By row (data, start, BC, PPO, optimum; `PPO, last` next to a better one that was left) and metric: see
    lmrl.evaluation.statistics.summarize."""
    ended: str | None = None
    """Why the run ended before its last step, with the best policy of the stage that collapsed."""
    before_after: dict[str, dict[str, Scores]] = field(default_factory=dict)
    """By suite of `evaluation.before_after`, row (before, after, difference) and metric, as `scores`."""

    @property
    def checkpoint(self) -> Path:
        return self.folder / "stages" / MAIN_STAGE / "final"

    @cached_property
    def policy(self) -> Policy | Classifier:
        """The trained policy, loaded: `.model` and `.tokenizer` are transformers'. A reward model is a classifier."""
        if read_recipe(self.folder).objective.leaves_policy:
            return open_policy(str(self.checkpoint))
        return open_classifier(str(self.checkpoint))

    @cached_property
    def metrics(self) -> DataFrame:
        """A row for each step of each stage, as `load_run` names the columns (`time/update_s` is one of `time`)."""
        return load_run(self.folder, "train")

    @cached_property
    def samples(self) -> DataFrame:
        """The samples with their rewards: samples.jsonl."""
        return load_samples(self.folder)
