"""The effect of training elsewhere: paired scores of the base model and the final policy on further suites.

Both are scored after training, because the base model is still available then. The logs are kept in the run folder, so
a run that is stopped during scoring resumes there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmrl.atomic_files import write_atomically
from lmrl.errors import RecipeError
from lmrl.evaluation.bridges import is_foreign
from lmrl.evaluation.paired import Comparison
from lmrl.evaluation.scoring import Scores
from lmrl.evaluation.suites import load_suite, refuse_code
from lmrl.recipe import MAIN_STAGE, OtherSuite, Recipe
from lmrl.recipe.files import stages_of
from lmrl.run import Run

if TYPE_CHECKING:
    from lmrl.training.display import Display

FOLDER, FILE = "before_after", "before_after.json"
KEY = "evaluation.before_after"
BEFORE, AFTER, DIFFERENCE = "before", "after", "difference"


def check_before_after(recipe: Recipe) -> None:
    """Raise RecipeError for suites that could not be played after training."""
    for name, stage in stages_of(recipe).items():
        if name != MAIN_STAGE and stage.evaluation.before_after not in ([], recipe.evaluation.before_after):
            raise RecipeError(
                f"stages.{name}.{KEY}: this key belongs to the whole run: move it to the top level of the recipe"
            )
    wanted = recipe.evaluation.before_after
    if not wanted:
        return
    if recipe.model.path is None:
        raise RecipeError(
            f"{KEY}: a model from scratch has no earlier scores to compare with: leave it out, or set model.path"
        )
    if not recipe.objective.leaves_policy:
        raise RecipeError(f"{KEY}: objective '{recipe.objective.name}' leaves no policy to score: leave it out")
    for one in wanted:
        if is_foreign(one.suite):
            raise RecipeError(
                f"{KEY}: {one.suite} is another tool's suite, which cannot be compared in pairs: run it with lmrl eval"
            )
        refuse_code(load_suite(one.suite, overrides_of(one)))


def overrides_of(one: OtherSuite) -> list[str]:
    """The overrides of a suite that a recipe asks for."""
    return [*one.changes, *([] if one.episodes is None else [f"episodes={one.episodes}"])]


def before_after(run: Run, base: str, display: Display) -> dict[str, dict[str, Scores]]:
    """Scores of the base model and of the final policy, and their paired difference, by suite and row; also written to
    FILE.

    base: the model that the run began with.
    """
    from lmrl.evaluation.compare import compare

    found: dict[str, dict[str, Scores]] = {}
    for one, label in zip(wanted := run.recipe.evaluation.before_after, labels(wanted), strict=True):
        display.say(f"{label}: {base} and the final policy play")
        compared = compare(
            [base, run.final(MAIN_STAGE)],
            one.suite,
            overrides_of(one),
            log=run.folder / FOLDER / label,
            shown=0,
            trust_remote_code=run.recipe.model.trust_remote_code,
        )
        found[label] = rows_of(compared)
    if found and run.writes:
        write_atomically(run.folder / FILE, json.dumps(found, indent=2) + "\n")
    return found


def labels(wanted: Sequence[OtherSuite]) -> list[str]:
    """A label for each suite: its file's name, with a number if that is taken."""
    names = [Path(one.suite).stem for one in wanted]
    return [
        name if names.count(name) == 1 else f"{name}-{names[: place + 1].count(name)}"
        for place, name in enumerate(names)
    ]


def rows_of(compared: Comparison) -> dict[str, Scores]:
    """Before, after and the difference, each by metric."""
    difference: Scores = {}
    for one in compared.differences:
        assert (one.first, one.second) == ("B", "A")
        difference[one.metric] = {
            "mean": one.mean,
            "ci95": one.ci95,
            "n": one.pairs,
            "clusters": one.prompts,
            "holds_for": one.holds_for,
            "p": one.p,
            "wins": one.wins,
            "ties": one.ties,
            "losses": one.losses,
        }
    kept = {key: {name: compared.rows[key][name] for name in difference} for key in ("A", "B")}
    return {BEFORE: kept["A"], AFTER: kept["B"], DIFFERENCE: difference}


def flat(found: dict[str, dict[str, Scores]]) -> dict[str, dict[str, dict[str, Any]]]:
    """All rows under unique names, for trackers."""
    return {f"{suite}, {row}": dict(scores) for suite, rows in found.items() for row, scores in rows.items()}
