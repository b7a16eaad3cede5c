"""A process's memory as predicted and as measured, for the record of a run."""

from __future__ import annotations

from lmrl import distributed
from lmrl.accelerators import has_memory
from lmrl.recipe import Recipe
from lmrl.recipe.estimates import memory
from lmrl.run import Run
from lmrl.training.display import Display
from lmrl.training.monitoring.measures import peak_memory_mb


def compare_memory(run: Run, stage: str, recipe: Recipe, predicted: float, display: Display) -> None:
    """Compare a process's peak memory so far with the prediction for its largest stage."""
    measured = distributed.all_max(peak_memory_mb())
    if not predicted:
        return
    ratio = round(measured / predicted, 3)
    line = {"stage": stage, "step": recipe.training.steps, "kind": "memory"}
    run.record(line | {"predicted_mb": round(predicted), "measured_mb": measured, "ratio": ratio})
    display.say(
        f"memory up to stage {stage}: {predicted:,.0f} MB predicted, {measured:,} MB measured, {ratio:.2f} times that"
    )


def predicted_memory_mb(recipe: Recipe) -> float:
    """Predicted memory of this process, or of its accelerator if it has one, in MB; 0 if unknown."""
    return sum((memory(recipe, accelerator=has_memory()) or {}).values())
