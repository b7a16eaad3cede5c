"""Updates whose loss or gradient is not finite: how many are tolerated, and what is saved to reproduce one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrl.errors import NonFiniteError
from lmrl.training.monitoring.bundle import Attempt, keep_update

if TYPE_CHECKING:
    from lmrl.training.stage import Stage


def stop_on_nonfinite(stage: Stage, step: int, attempt: Attempt, stats: dict[str, float]) -> None:
    """Called after an update: report it if it was skipped; raise NonFiniteError if too many in a row were."""
    in_a_row, limit = stage.updater.skipped_in_a_row, stage.recipe.training.max_nonfinite
    if in_a_row == 0:
        return
    if in_a_row < limit:
        stage.display.say(
            f"step {step}: loss {stats['loss']} and gradient norm {stats['grad_norm']} are not both finite; "
            f"update skipped ({in_a_row} in a row, the run stops at {limit})"
        )
        return
    _, kept = keep_update(stage, step, "nonfinite", attempt, stats)
    raise NonFiniteError(
        f"stage {stage.name}, step {step}: {in_a_row} updates in a row had a non-finite loss or gradient; {kept}"
    )
