"""Evaluation in the course of a stage: on the suite, and on held-out logged episodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmrl import world
from lmrl.errors import RecipeError, did_you_mean
from lmrl.evaluation.evaluate import Evaluator, Scores
from lmrl.evaluation.statistics import summarize
from lmrl.objectives.groups import groups_of
from lmrl.training.diagnostics import discounts_of, start_values
from lmrl.training.listeners.listener import Listener
from lmrl.training.measures import SAMPLES_KEPT, sample_line
from lmrl.trajectories.trajectory import Trajectory

if TYPE_CHECKING:
    from lmrl.training.stage import Stage


class Evaluation(Listener):
    """Scores the policy before the first step, every few steps and after the last one, and keeps the best."""

    name = "evaluation"

    def __init__(self, evaluator: Evaluator | None):
        """evaluator: of the suite, where the recipe names one."""
        self.evaluator = evaluator
        self.step: int | None = None
        self.played: list[Trajectory] = []
        """Of the newest evaluation: its step, and the suite's episodes."""

    def begin(self, stage: Stage, resumed: bool) -> None:
        """What the stage's result is to be compared with: the data, the optimum and the policy as it begins."""
        if resumed:
            return
        scores = stage.progress.scores
        if stage.source.logged and (data := stage.source.logged.scores()):
            scores["data"] = data
        if self.evaluator is not None and (optimum := self.evaluator.optimum()):
            scores["optimum"] = optimum
        self.evaluate(stage, 0, "start")

    def after_step(self, stage: Stage, step: int) -> None:
        every = stage.recipe.evaluation.every
        if step == stage.recipe.training.steps or (every and step % every == 0):
            self.evaluate(stage, step)

    def wants_checkpoint(self, stage: Stage, step: int) -> bool:
        best = stage.progress.best
        return best is not None and best["step"] == step

    def evaluate(self, stage: Stage, step: int, name: str = "last") -> None:
        """Score the policy as it is. name: of these scores in `progress.scores`."""
        stage.source.wait()
        self.step, self.played = step, []
        scores: Scores = {}
        with stage.strategy.whole():
            if self.evaluator is not None:
                stage.engine.refresh()
                scores, self.played = self.evaluator()
            found = start_values(stage.policy, self.played, *discounts_of(stage.recipe)) if self.played else {}
        scores = scores | self._heldout(stage)
        if not scores:
            return
        stage.progress.scores[name] = scores
        stage.record(step, "eval", {**scores, **found})
        stage.run.record_samples([sample_line(stage.name, step, "eval", one) for one in self.played[:SAMPLES_KEPT]])
        stage.track({f"{stage.name}/eval/{name}": score["mean"] for name, score in scores.items()}, step)
        stage.display.score(step, {name: scores[name] for name in stage.progress.columns if name in scores})
        if step > 0:
            self.consider(stage, step, scores)

    def _heldout(self, stage: Stage) -> Scores:
        """The objective's measures of held-out episodes, where there are any; they become columns of the closing table."""
        logged = stage.source.logged
        heldout = logged.heldout(stage.recipe.evaluation.episodes) if logged else []
        if not heldout:
            return {}
        measured = measure_heldout(stage, heldout)
        scores = {f"heldout/{name}": summarize(values, unit="episode") for name, values in measured.items()}
        stage.progress.columns = list(dict.fromkeys([*stage.progress.columns, *scores]))
        return scores

    def consider(self, stage: Stage, step: int, scores: Scores) -> None:
        """Note the best evaluation so far; without a suite only where the recipe names the metric."""
        metric = stage.recipe.evaluation.metric or (self.evaluator.suite.metrics[0] if self.evaluator else None)
        if metric is None:
            return
        if metric not in scores:
            raise RecipeError(f"evaluation.metric: there is no metric '{metric}'{did_you_mean(metric, scores)}")
        best, value = stage.progress.best, scores[metric]["mean"]
        if best is None or value > best["value"]:
            stage.progress.best = {"step": step, "metric": metric, "value": value}


def measure_heldout(stage: Stage, heldout: list[Trajectory]) -> dict[str, list[float]]:
    """The objective's measures of held-out episodes, whose groups the processes share."""
    groups = [[heldout[row] for row in rows] for rows in groups_of(heldout)]
    own = stage.objective.heldout(stage.policy, [one for group in world.share(groups) for one in group])
    parts = world.gather([own])
    return {
        name: [value for part in parts for value in part.get(name, ())]
        for name in dict.fromkeys(name for part in parts for name in part)
    }
