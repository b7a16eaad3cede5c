"""Evaluation during a stage, on a suite or the stage's own task, and on held-out logged episodes.

Policies are selected by separate episodes: the scores that a stage reports for its last and its best policy come from
others, the same that `lmrl eval` plays.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lmrl import distributed
from lmrl.errors import RecipeError, did_you_mean
from lmrl.evaluation.evaluate import Evaluator
from lmrl.evaluation.scoring import Scores
from lmrl.evaluation.statistics import summarize
from lmrl.objectives.groups import groups_of
from lmrl.training.display import interval
from lmrl.training.final import certainly_better, paired_values
from lmrl.training.listeners.listener import Listener
from lmrl.training.monitoring.diagnostics import discounts_of, start_values
from lmrl.training.monitoring.measures import SAMPLES_KEPT, sample_line
from lmrl.trajectories.trajectory import Trajectory

if TYPE_CHECKING:
    from lmrl.training.stage import Stage


class Evaluation(Listener):
    """Scores the policy before the first step, every few steps and after the last one, and decides which one is the
    stage's result."""

    name = "evaluation"

    def __init__(self, evaluator: Evaluator | None, every: int = 0, starts: bool = True, gated: bool = False):
        """evaluator: of the suite or the stage's own task, if there is one. every: steps between evaluations (0: at the
        start and the end). starts: True if the policy that a stage starts with is scored. gated: True if that policy
        may be selected, as with a gate."""
        self.evaluator, self.every, self.starts = evaluator, every, starts
        self.gated, self.choosing = gated, gated or every > 0
        self.step: int | None = None
        self.played: list[Trajectory] = []
        """Step and episodes of the newest evaluation."""
        self.values: dict[str, float] = {}
        self.best_values: dict[str, float] = {}
        """Scores of the newest and of the best policy, see `paired_values`."""
        self.before: tuple[dict[str, Any] | None, dict[str, float]] = None, {}
        """`progress.best` and `best_values` before the newest evaluation."""
        self.tries = 0
        """Number of policies that the best was chosen from."""
        self.reports: list[tuple[int, Scores, list[Trajectory]]] = []
        """Steps, scores and episodes that are reported at the end."""

    def begin(self, stage: Stage, resumed: bool) -> None:
        """Baselines for the stage's result: the data, the optimum and the initial policy."""
        if resumed:
            return
        scores = stage.progress.scores
        if stage.source.dataset and (data := stage.source.dataset.scores()):
            scores["data"] = data
        if self.evaluator is not None and (optimum := self.evaluator.optimum()):
            scores["optimum"] = optimum
        if self.starts:
            self.evaluate(stage, 0, "start")

    def after_step(self, stage: Stage, step: int) -> None:
        if step == stage.recipe.training.steps or (self.every and step % self.every == 0):
            self.evaluate(stage, step)

    def wants_checkpoint(self, stage: Stage, step: int) -> bool:
        best = stage.progress.best
        return best is not None and best["step"] == step

    def keeps(self, stage: Stage) -> Iterable[int]:
        return () if stage.progress.best is None else (stage.progress.best["step"],)

    def evaluate(self, stage: Stage, step: int, name: str = "last") -> None:
        """Score the current policy. name: key of these scores in `progress.scores`."""
        self.step, self.values = step, {}
        chooses = self.choosing and (step > 0 or self.gated)
        at_an_end = step in (0, stage.recipe.training.steps)
        scores, self.played = self._score(stage, chooses, at_an_end or bool(stage.recipe.evaluation.every))
        if not scores:
            return
        with stage.strategy.gathered_weights():
            found = start_values(stage.policy, self.played, *discounts_of(stage.recipe)) if self.played else {}
        stage.progress.scores[name] = scores
        stage.record(step, "eval", {**scores, **found})
        stage.run.record_samples(self._samples(stage, step, "eval", self.played))
        stage.track({f"{stage.name}/eval/{name}": score["mean"] for name, score in scores.items()}, step)
        stage.display.score(step, {name: scores[name] for name in stage.progress.columns if name in scores})
        if step > 0:
            self.consider(stage, step, scores)

    def _score(self, stage: Stage, choosing: bool, heldout: bool) -> tuple[Scores, list[Trajectory]]:
        """Scores of the current policy, and the episodes behind them. heldout: also score held-out episodes, which are
        skipped between a stage's ends unless the recipe sets when to evaluate, or selects by them."""
        stage.source.wait()
        scores: Scores = {}
        played: list[Trajectory] = []
        with stage.strategy.gathered_weights():
            if self.evaluator is not None:
                stage.engine.refresh()
                scores, played = self.evaluator(choosing=choosing)
        metric = self._metric(stage)
        if metric is not None and self.evaluator is not None:
            scaled = metric == "normalized"  # it is derived from the main metric
            name = self.evaluator.suite.metrics[0] if scaled else metric
            self.values = paired_values(played, name, by_episode=self.evaluator.plays_all)
        if heldout or (metric or "").startswith("heldout/"):
            scores = scores | self._heldout(stage)
        return scores, played

    def _heldout(self, stage: Stage) -> Scores:
        """The objective's measures of held-out episodes, if there are any; they become columns of the final table."""
        dataset = stage.source.dataset
        heldout = dataset.heldout(stage.recipe.evaluation.episodes) if dataset else []
        if not heldout:
            return {}
        measured = measure_heldout(stage, heldout)
        limits = stage.objective.heldout_limits
        scores = {
            f"heldout/{name}": summarize(values, limits=limits.get(name), unit="episode")
            for name, values in measured.items()
        }
        stage.progress.columns = list(dict.fromkeys([*stage.progress.columns, *scores]))
        metric = (self._metric(stage) or "").removeprefix("heldout/")
        if metric in measured:
            self.values = {str(place): value for place, value in enumerate(measured[metric])}
        return scores

    def _metric(self, stage: Stage) -> str | None:
        """The metric that decides which policy is best; without a suite only the one in the recipe."""
        return stage.recipe.evaluation.metric or (self.evaluator.suite.metrics[0] if self.evaluator else None)

    # ------------------------------------------------------------------------------------------------------- selection
    def consider(self, stage: Stage, step: int, scores: Scores) -> None:
        """Record the best evaluation so far, among those within the recipe's KL limit."""
        metric = self._metric(stage)
        if metric is None:
            return
        if metric not in scores:
            raise RecipeError(f"evaluation.metric: there is no metric '{metric}'{did_you_mean(metric, scores)}")
        if too_far(scores, getattr(stage.recipe.objective, "kl_target", None)):
            return
        self.tries += 1
        best, value = stage.progress.best, scores[metric]["mean"]
        self.before = best, self.best_values
        if best is None or value > best["value"]:
            stage.progress.best = {"step": step, "metric": metric, "value": value}
            self.best_values = self.values

    def rolled_back(self, stage: Stage, step: int) -> None:
        """Forget a best policy whose weights are lost: those of the step that has just been taken back."""
        best = stage.progress.best
        if best is not None and best["step"] == stage.progress.step != step:
            stage.progress.best, self.best_values = self.before

    def finish(self, stage: Stage) -> None:
        """Decide which policy is the stage's result, load it, and score it on episodes that did not select it."""
        progress = stage.progress
        progress.kept = progress.step
        if not self.choosing or self._metric(stage) is None:
            return
        if self.step != progress.step:
            self.evaluate(stage, progress.step)
        last, best = self.values, progress.best
        if best is not None and (best["step"] == progress.step or self.best_values in ({}, last)):
            best = None
        if best is not None and not stage.strategy.can_reload_weights:
            stage.display.say(
                f"the best policy is that of step {best['step']}, but {stage.strategy.name} cannot return to it"
            )
            best = None
        if best is not None:
            final = stage.recipe.training.final
            certain = certainly_better(self.best_values, last, self.tries)
            stage.save()  # the last policy, to return to
            self._report(stage, "last", progress.step)
            stage.roll_back(best["step"])
            self._report(stage, "best", best["step"])
            if final == "best" or final == "auto" and certain:
                progress.kept = best["step"]
            else:
                stage.roll_back(progress.step)
        else:
            self._report(stage, "last", progress.step)
        self._record(stage)

    def _report(self, stage: Stage, name: str, step: int) -> None:
        """Score the loaded policy of a step, on episodes that were not used for selection."""
        scores, played = self._score(stage, choosing=False, heldout=True)
        stage.progress.scores[name] = scores
        self.reports.append((step, scores, played))

    def _record(self, stage: Stage) -> None:
        """Record the reported scores before `final/` marks the stage as finished: a run that is killed in between drops
        these lines on resume (see Run.cut), and writes them again."""
        progress = stage.progress
        for step, scores, played in self.reports:
            stage.record(progress.step, "final", {"policy": step, "kept": step == progress.kept, **scores})
            stage.run.record_samples(self._samples(stage, progress.step, "final", played))

    def end(self, stage: Stage) -> None:
        """Send the reported scores to trackers and the display: here, because this is never repeated on resume."""
        progress, metric = stage.progress, self._metric(stage)
        for step, scores, _ in self.reports:
            if step == progress.kept:
                means = {f"{stage.name}/final/{name}": score["mean"] for name, score in scores.items()}
                stage.track(means, progress.step)
        if metric is not None and progress.best is not None and len(self.reports) > 1:
            last, best = (f"{metric} {interval(scores[metric])}" for _, scores, _ in self.reports)
            final, step = stage.recipe.training.final, progress.best["step"]
            certain = "" if progress.kept == step else "not "
            why = f"the best evaluation, of step {step}, is {certain}certainly better than the last one, training.final=auto"
            kept = "best" if progress.kept == step else "last"
            stage.display.say(
                f"stage {stage.name} keeps the {kept} policy ({why if final == 'auto' else f'training.final={final}'}); "
                f"on fresh episodes: step {step} {best}, step {progress.step} {last}"
            )

    def _samples(self, stage: Stage, step: int, kind: str, played: list[Trajectory]) -> list[dict[str, Any]]:
        environment = self.evaluator.task.environment if self.evaluator else None
        return [sample_line(stage.name, step, kind, one, environment) for one in played[:SAMPLES_KEPT]]

    def state(self) -> dict[str, Any]:
        if not self.choosing or self.step is None:
            return {}
        return {"step": self.step, "values": self.values, "best_values": self.best_values, "tries": self.tries}

    def load_state(self, state: dict[str, Any]) -> None:
        self.step, self.tries = state.get("step"), state.get("tries", 0)
        self.values, self.best_values = state.get("values", {}), state.get("best_values", {})


def too_far(scores: Scores, limit: float | None) -> bool:
    """True if a policy is significantly further from its reference than the limit, in nats per episode."""
    return limit is not None and "kl" in scores and scores["kl"]["ci95"][0] > limit


def measure_heldout(stage: Stage, heldout: list[Trajectory]) -> dict[str, list[float]]:
    """The objective's measures of held-out episodes, whose groups are divided among the processes."""
    groups = [[heldout[row] for row in rows] for rows in groups_of(heldout)]
    own = stage.objective.heldout(stage.policy, [one for group in distributed.shard(groups) for one in group])
    parts = distributed.all_gather([own])
    return {
        name: [value for part in parts for value in part.get(name, ())]
        for name in dict.fromkeys(name for part in parts for name in part)
    }
