"""A batch in which too many episodes failed: what is saved of it, so that they can be played again."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import TYPE_CHECKING

from lmrl.errors import EpisodeError, counted
from lmrl.training.monitoring.measures import sample_line, samples_to_keep

if TYPE_CHECKING:
    from lmrl.training.stage import Stage

KIND = "failed"
CAUSES = 5
"""Maximum causes that are listed one by one."""


def keep_failed(stage: Stage, error: EpisodeError) -> None:
    """Write the failed episodes of the batch that stops the run to samples.jsonl, and list their causes, most frequent
    first."""
    kept = samples_to_keep(error.episodes)
    if not kept:
        return
    lines = [sample_line(stage.name, stage.now, KIND, one, stage.task.environment) for one in kept]
    stage.run.record_samples(lines)
    causes = Counter(str(one.failure) for one in kept)
    for cause, count in causes.most_common(CAUSES):
        stage.display.say(f"{count:>4} x {' '.join(cause.split())}")
    if len(causes) > CAUSES:
        stage.display.say(f"     and {counted(len(causes) - CAUSES, 'more cause')}")
    if "id" in lines[0]:
        folder = shlex.quote(str(stage.run.folder))
        stage.display.say(f"play one again: lmrl replay {folder} --episode {lines[0]['id']}")
