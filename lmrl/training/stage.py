"""One stage of a run: build its parts, and the loop."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lmrl import run as runs
from lmrl import world
from lmrl.errors import NonFiniteError, RecipeError, did_you_mean
from lmrl.evaluation.evaluate import Evaluator, Scores
from lmrl.evaluation.statistics import summarize
from lmrl.evaluation.suites import load_suite
from lmrl.objectives import Objective, load_objective
from lmrl.objectives.correction import Correction
from lmrl.objectives.groups import gathered, groups_of
from lmrl.objectives.policy_gradient import PolicyGradient
from lmrl.policy.load import load_policy, load_weights
from lmrl.recipe import PromptTask, QObjective, Recipe
from lmrl.recipe.rates import with_rates
from lmrl.recipe_files import locate_rewards
from lmrl.rollouts.engine import build_engine
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import build_task, task_texts
from lmrl.seeding import seed_everything, stream
from lmrl.training import checkpoint
from lmrl.training.checkpoint import Progress
from lmrl.training.diagnostics import Diagnostics, probe_states, start_values
from lmrl.training.display import Display, interval
from lmrl.training.gate import GateState, breached, drop, has_given_up, is_due
from lmrl.training.hacking import Panel
from lmrl.training.interrupt import Interrupt, Interrupted
from lmrl.training.measures import (
    SAMPLES_KEPT,
    drift,
    mean_of,
    measure,
    peak_memory_mb,
    repetition_of_all,
    sample_line,
    samples_to_keep,
)
from lmrl.training.rate_control import controlled, policy_change
from lmrl.training.sources import Drawn, build_source
from lmrl.training.strategy import Strategy
from lmrl.training.trust import Trust
from lmrl.training.updater import Updater
from lmrl.training.worst_case import worst_case
from lmrl.trajectories.batch import Batch
from lmrl.trajectories.store import read_episodes, write_episodes
from lmrl.trajectories.trajectory import Trajectory

BAD_ROWS = "bad_rows.jsonl"
CALIBRATION_EPISODES = 1000
"""Logged episodes from whose returns new heads take their units."""
PROBE_EPISODES = 32


class Stage:
    """Everything a stage needs, built from its recipe. `start` is the checkpoint folder of the stage before."""

    def __init__(
        self,
        run: runs.Run,
        name: str,
        recipe: Recipe,
        start: Path | None,
        device: torch.device,
        display: Display,
        interrupt: Interrupt,
        track: Any = None,
        strategy: Strategy | None = None,
    ):
        self.run, self.name, self.recipe, self.display, self.interrupt = run, name, recipe, display, interrupt
        self.track = track or (lambda metrics, step: None)
        self.seed = recipe.training.seed
        seed_everything(self.seed, name, "build")
        self.objective = load_objective(recipe.objective)
        self.objective.correction = Correction.of(recipe.rollouts)
        self.policy = load_policy(
            recipe.model,
            self._start(start),
            texts=lambda: task_texts(recipe),
            heads=self.objective.heads,
            reference=self.objective.uses_reference,
        ).to(device)
        self.policy.configure(recipe)
        if recipe.training.threads is not None:
            torch.set_num_threads(recipe.training.threads)
        section = task_of(recipe, run.folder)
        self.task = build_task(section, self.policy.tokenizer)
        self.task.learning = True
        self.engine = build_engine(recipe.rollouts, self.policy, interrupt.check, run.folder)
        self.trust = Trust(self.policy, self.engine, recipe.rollouts)
        self.sampler = Sampler(self.task, self.engine, self.policy.decode)
        self.source = build_source(
            recipe, self.task, self.sampler, name, run.folder / BAD_ROWS, self.objective.compares
        )
        if self.objective.heads is not None and self.policy.heads_are_new:
            logged = self.source.logged.probe(CALIBRATION_EPISODES) if self.source.logged else []
            if isinstance(recipe.objective, QObjective) and not logged:
                raise RecipeError(
                    f"objective '{recipe.objective.name}' takes the unit of its new Q values from logged returns: set "
                    "source.name=mixture (or dataset), or start from a stage that has such values"
                )
            self.objective.calibrate(self.policy, logged)
        self._keep_start(start)
        kept = world.agreed(run.checkpoints(name))
        self.checkpoint = kept[-1] if kept else None
        """Where the stage goes on, if it does."""
        if self.checkpoint is None:
            self.objective.start(self.policy)
        else:
            load_weights(self.policy, self.checkpoint, recipe.model.trust_remote_code)
        self.strategy = strategy or Strategy()
        if recipe.evaluation.gate is not None and self.strategy.lockstep:
            raise RecipeError(
                f"evaluation.gate takes the policy back in the middle of a stage, which does not go with {self.strategy.name}: "
                "launch without --accelerate, or leave the gate out"
            )
        optimizer = with_rates(recipe, *self.policy.size)
        self.updater = Updater(self.policy, optimizer, recipe.training.steps, self.strategy)
        self.microbatch_tokens = self.policy.microbatch_tokens
        """As last told of."""
        self.evaluator = None
        if recipe.evaluation.suite is not None:
            suite = load_suite(recipe.evaluation.suite, task=section.model_dump(mode="json"))
            suite.episodes = recipe.evaluation.episodes or suite.episodes
            self.evaluator = Evaluator(self.policy, suite, self.engine)
        columns = self.evaluator.suite.metrics if self.evaluator else []
        metric = recipe.evaluation.metric
        if recipe.evaluation.gate is not None and metric not in (None, columns[0]):
            raise RecipeError(
                f"evaluation.gate takes the policy back to the best by the suite's first metric, '{columns[0]}': leave "
                f"evaluation.metric={metric} out"
            )
        self.progress = Progress(label=label_of(recipe, self.objective), columns=columns)
        self.diagnostics: Diagnostics | None = None
        self.panel = Panel([reward.label for reward in self.task.rewards if reward.weight == 0])

    @property
    def notes(self) -> list[str]:
        """What a person should know about the data, and what is played."""
        plays = self.source.logged is not self.source
        return [
            *self.task.notes,
            *(self.source.logged.notes if self.source.logged else ()),
            *(self.trust.notes if plays else ()),
        ]

    def _start(self, start: Path | None) -> Path | None:
        """Where the policy comes from: the stage before, or this stage's own saved start on resume."""
        own = self.run.stage_folder(self.name) / "start"
        return own if start is None and world.agreed(own.exists()) else start

    def _keep_start(self, start: Path | None) -> None:
        # A model from scratch exists nowhere else, and a frozen reference must not change with what `model.path` names.
        frozen_copy = self.objective.uses_reference and self.recipe.model.lora is None
        if start is None and (self.recipe.model.path is None or frozen_copy):
            self.run.write_folder(self.run.stage_folder(self.name) / "start", self.policy.save)

    # -------------------------------------------------------------------------------------------------------- the loop
    def train(self) -> None:
        """Run the remaining steps and leave `final/`."""
        resumed = self._resume()
        recipe, progress = self.recipe, self.progress
        self.display.begin(self.name, progress.label, recipe.training.steps, progress.step)
        gate = recipe.evaluation.gate
        try:
            if getattr(recipe.objective, "cache_reference", False):
                self.display.say("computing what the cache lacks of the reference's log-probabilities")
            logged = self.source.logged.parts() if self.source.logged else ()
            self.objective.ready(self.policy, logged, fresh=not resumed)
            self._try_worst_case()
            if not resumed:
                self._evaluate_start()
            for step in range(progress.step + 1, recipe.training.steps + 1):
                if gate is not None and has_given_up(gate, progress.gate):
                    break
                self._step(step)
                progress.step = step
                every, watched = recipe.evaluation.every, gate is not None and is_due(gate, step)
                if step == recipe.training.steps or (every and step % every == 0) or watched:
                    trajectories = self._evaluate(step, "last")
                if watched:
                    self._pass_gate(step, trajectories)
                every = recipe.training.checkpoint_every
                is_best = progress.best is not None and progress.best["step"] == step
                if (every and step % every == 0) or is_best:
                    self._save()
                if stop := world.largest(self.interrupt.number or 0):
                    raise Interrupted(stop)
        except Interrupted:
            self.source.stop()
            if progress.step > 0:
                self._save()
                self.display.say(f"saved a checkpoint at step {progress.step} of stage {self.name}")
            raise
        finally:
            self.display.end()
            self.source.stop()
            self.engine.close()
        self._checkpoint(self.run.final(self.name))
        self.strategy.close()
        if len(self.panel.steps) > 1:
            self.display.panel(f"Stage {self.name}, fresh episodes by step", *self.panel.table())

    def _step(self, step: int) -> None:
        started = time.monotonic()
        seed_everything(self.seed, self.name, step)
        self.objective.begin(step)
        self.updater.begin(step)
        self.interrupt.safe = world.size() == 1  # several processes stop together, between two steps
        self.interrupt.check()
        with self.strategy.whole():
            if self.recipe.source.name != "dataset":
                self.source.wait()
                self.engine.refresh()
            drawn = self.source.next(step)
        self.interrupt.safe = False
        staleness = [self.engine.staleness(one.version) for one in drawn.played]
        assert max(staleness, default=0) <= self.recipe.rollouts.ahead, staleness
        sampled = time.monotonic()
        kept = samples_to_keep(drawn.played)
        self.run.record_samples([sample_line(self.name, step, "train", one) for one in kept])
        ahead = self.source.wait() if self.trust.due else []  # of the learner's weights, which drawn ones may not be
        if compared := self.trust([*drawn.played, *ahead]):
            self.run.record({"stage": self.name, "step": step, "kind": "check", **compared})
            self.trust.judge(compared, f"stage {self.name}, step {step}")
        judged = [one for one in drawn.played if one.reward is not None]
        played, played_well, learned, failed = map(
            round, world.totals([len(drawn.played), len(judged), len(drawn.learn), drawn.failed])
        )
        metrics = self._learn(step, drawn) if learned else {"updates": 0}
        self._tell_of_memory(step)
        finished = time.monotonic()
        if played_well and (self.source.logged or learned < played_well):  # it learned from others, or from some
            metrics |= {f"online/{name}": value for name, value in measure(judged).items()}
        if played_well:
            metrics["repetition"] = repetition_of_all(judged)
        metrics |= {"failed": failed, "skipped": self.updater.skipped}
        if self.recipe.rollouts.ahead and staleness:
            metrics["staleness"] = sum(staleness) / len(staleness)
        times = {
            "source_s": round(sampled - started, 3),
            "update_s": round(finished - sampled, 3),
            "samples_per_s": round((played or learned) / (finished - started), 3),
            "peak_memory_mb": world.largest(peak_memory_mb()),
        }
        self.run.record({"stage": self.name, "step": step, "kind": "train", **metrics, "time": times})
        self.track({f"{self.name}/{name}": value for name, value in (metrics | times).items()}, step)
        self.display.step(step, metrics)
        if played_well:
            for warning in self.panel.add(step, drift(metrics)):
                self.run.record({"stage": self.name, "step": step, "kind": "warning", "text": warning})
                self.display.say(f"warning at step {step}: {warning}")
        evaluation = self.recipe.evaluation
        if step % evaluation.show_every == 0:
            self.display.samples(drawn.played, evaluation.show_samples)
        every = evaluation.diagnostics_every
        if self.objective.heads is not None and every and (step % every == 0 or step == self.recipe.training.steps):
            self._diagnose(step, drawn.played)

    def _learn(self, step: int, drawn: Drawn) -> dict[str, float]:
        self.engine.rest()
        trajectories = drawn.learn
        batch = self.objective.prepare(self.policy, trajectories)
        if not world.largest(len(batch.sequences)):  # nothing to compare
            return measure(trajectories) | batch.stats | {"updates": 0}
        updates: list[dict[str, float]] = []
        rng = stream(self.seed, self.name, step, "minibatches")
        rejected: dict[str, float] = {}
        for _ in range(self.objective.epochs):
            for minibatch in batch.minibatches(rng, self.objective.minibatches):
                stats = self.updater.step(self.policy, self.objective, minibatch)
                if "rejected" in stats:
                    rejected = {"rejected_kl": stats["approx_kl"]}
                    break
                updates.append(stats)
                self.engine.stale = True
                self._stop_on_nonfinite(step, minibatch, updates[-1])
            if rejected:
                break
        rates = self._control_rate(batch) if updates else {}
        return measure(trajectories) | batch.stats | mean_of(updates) | rejected | rates | {"updates": len(updates)}

    def _control_rate(self, batch: Batch) -> dict[str, float]:
        """Let the learning rate of the next step follow what this one did to the policy."""
        band = self.recipe.training.kl_band
        if band is None or not isinstance(self.objective, PolicyGradient):
            return {}
        moved = policy_change(self.policy, batch)
        if moved is None:
            return {}
        self.updater.kl_factor = controlled(self.updater.kl_factor, moved, band)
        return {"policy_change": moved, "kl_factor": self.updater.kl_factor}

    def _try_worst_case(self) -> None:
        """Before the first step, the passes of the largest update there can be."""
        wanted = self.recipe.training.try_worst_case
        if not (self.policy.device.type != "cpu" if wanted is None else wanted):
            return
        if self.recipe.source.name != "dataset":  # what the engine holds is held beside
            with self.strategy.whole():
                self.engine.refresh()
        self.engine.rest()
        self.objective.begin(self.recipe.training.steps)  # after all warm-up
        batch = worst_case(self.recipe, self.policy, self.task, self.objective.compares)
        self.updater.rehearse(self.policy, self.objective, batch)
        self._tell_of_memory(self.progress.step)
        longest = max(len(sequence.tokens) for sequence in batch.sequences)
        self.display.say(
            f"the longest sequences, {longest} tokens, fit into memory in microbatches of {self.policy.microbatch_tokens}"
        )

    def _tell_of_memory(self, step: int) -> None:
        """Say and record it where memory has run out and microbatches became smaller."""
        now, before = self.policy.microbatch_tokens, self.microbatch_tokens
        if now == before:
            return
        self.microbatch_tokens = now
        self.run.record(
            {"stage": self.name, "step": step, "kind": "memory", "microbatch_tokens": now, "before": before}
        )
        self.display.say(
            f"step {step}: memory ran out; from here on microbatches of {now} tokens in place of {before}, which changes no "
            "gradient but takes longer"
        )

    def _diagnose(self, step: int, played: list[Trajectory]) -> None:
        """Look at the probe batch: logged episodes, or the first fresh ones, kept beside the stage."""
        if self.diagnostics is None:
            kept = self.run.stage_folder(self.name) / "probe.parquet"
            if self.source.logged:
                probe = self.source.logged.probe(PROBE_EPISODES)
            elif world.agreed(kept.exists()):
                probe = read_episodes(kept, self.policy.tokenizer)
            else:
                probe = [one for one in played if one.reward is not None][:PROBE_EPISODES]
                probe = world.gather(probe)[:PROBE_EPISODES]
                self.run.write_file(kept, lambda path: write_episodes(path, probe, self.policy.tokenizer))
            self.diagnostics = Diagnostics(probe, probe_states(len(self.policy.vocabulary)), *self._discounts())
        with self.strategy.whole():
            found = self.diagnostics(self.policy)
        self.run.record({"stage": self.name, "step": step, "kind": "diagnostics", **found})
        self.track({f"{self.name}/diagnostics/{name}": value for name, value in found.items()}, step)

    def _discounts(self) -> tuple[float, float]:
        options = self.recipe.objective
        return getattr(options, "gamma", 1.0), getattr(options, "gamma_token", 1.0)

    def _stop_on_nonfinite(self, step: int, minibatch: Any, stats: dict[str, float]) -> None:
        in_a_row, limit = self.updater.skipped_in_a_row, self.recipe.training.max_nonfinite
        if in_a_row == 0:
            return
        if in_a_row < limit:
            self.display.say(
                f"step {step}: loss {stats['loss']} and gradient norm {stats['grad_norm']} are not both finite; "
                f"update skipped ({in_a_row} in a row, the run stops at {limit})"
            )
            return
        minibatch.sequences = gathered(minibatch.sequences)
        weights = self.strategy.weights()
        with self.strategy.whole():
            kept = checkpoint.save_nonfinite(
                self.run, self.name, step, self.policy, self.objective, minibatch, stats, self.seed, weights
            )
        raise NonFiniteError(
            f"stage {self.name}, step {step}: {in_a_row} updates in a row had a non-finite loss or gradient; batch, seed "
            f"and recipe are in {kept}; reproduce with: lmrl replay {kept}"
        )

    # ------------------------------------------------------------------------------------------------------ evaluation
    def _evaluate_start(self) -> None:
        """What the stage's result is to be compared with: the data, the optimum and the policy as it begins."""
        if self.source.logged and (data := self.source.logged.scores()):
            self.progress.scores["data"] = data
        if self.evaluator is not None and (optimum := self.evaluator.optimum()):
            self.progress.scores["optimum"] = optimum
        trajectories = self._evaluate(0, "start")
        if self.recipe.evaluation.gate is not None:
            self.progress.gate = asdict(GateState(before=self.evaluator.by_start(trajectories)))
            self._consider(0, self.progress.scores["start"])
            self._save()

    def _pass_gate(self, step: int, trajectories: list[Trajectory]) -> None:
        """Compare a step's evaluation with the stage's beginning; roll back where too much was lost."""
        gate, state = self.recipe.evaluation.gate, GateState(**self.progress.gate)
        lost = drop(state.before, self.evaluator.by_start(trajectories))
        state.worst = max(state.worst, lost["mean"])
        line = {"stage": self.name, "step": step, "kind": "gate", "drop": lost, "rolled_back": breached(gate, lost)}
        self.display.say(f"gate at step {step}: {interval(lost)} points lost since the stage began")
        if breached(gate, lost):
            state.rollbacks += 1
            state.lr_factor *= gate.lr_factor
            best = self.progress.best["step"]
            kept = checkpoint.checkpoint_path(self.run, self.name, best)
            checkpoint.roll_back(kept, self.recipe, self.policy, self.updater)
            self.engine.stale = True
            self.source.stop(forget=True)
            self.updater.lr_factor = state.lr_factor
            line |= {"back_to": best, "lr_factor": state.lr_factor}
            self.display.say(
                f"gate at step {step}: more than the {gate.drop:g} points allowed; back to step {best}, learning rate "
                f"x {state.lr_factor:g}"
            )
        self.progress.gate = asdict(state)
        self.run.record(line)
        if not line["rolled_back"]:
            return
        given_up = has_given_up(gate, self.progress.gate)
        if given_up:
            self.display.say(f"gate: {state.rollbacks} rollbacks, the stage ends with the policy of step {best}")
        if given_up or step == self.recipe.training.steps:
            self._evaluate(step, "last")
        self._save()

    def _evaluate(self, step: int, name: str) -> list[Trajectory]:
        """Score the policy as it is, on the suite and on held-out logged episodes; returns the suite's episodes."""
        self.source.wait()
        with self.strategy.whole():
            if self.evaluator is not None:
                self.engine.refresh()
            scores, trajectories = self.evaluator() if self.evaluator is not None else ({}, [])
            found = start_values(self.policy, trajectories, *self._discounts()) if trajectories else {}
        heldout = self.source.logged.heldout(self.recipe.evaluation.episodes) if self.source.logged else []
        if heldout:
            measured = self._measure_heldout(heldout)
            scores = scores | {f"heldout/{key}": summarize(values) for key, values in measured.items()}
            self.progress.columns = list(
                dict.fromkeys([*self.progress.columns, *(f"heldout/{key}" for key in measured)])
            )
        if not scores:
            return []
        self.progress.scores[name] = scores
        self.run.record({"stage": self.name, "step": step, "kind": "eval", **scores, **found})
        self.run.record_samples([sample_line(self.name, step, "eval", one) for one in trajectories[:SAMPLES_KEPT]])
        self.track({f"{self.name}/eval/{name}": score["mean"] for name, score in scores.items()}, step)
        self.display.score(step, {name: scores[name] for name in self.progress.columns if name in scores})
        if step > 0:
            self._consider(step, scores)
        return trajectories

    def _measure_heldout(self, heldout: list[Trajectory]) -> dict[str, list[float]]:
        """The objective's measures of held-out episodes, whose groups the processes share."""
        groups = [[heldout[row] for row in rows] for rows in groups_of(heldout)]
        own = self.objective.heldout(self.policy, [one for group in world.share(groups) for one in group])
        parts = world.gather([own])
        return {
            name: [value for part in parts for value in part.get(name, ())]
            for name in dict.fromkeys(name for part in parts for name in part)
        }

    def _consider(self, step: int, scores: Scores) -> None:
        """Note the best evaluation so far; without a suite only where the recipe names the metric."""
        metric = self.recipe.evaluation.metric or (self.evaluator.suite.metrics[0] if self.evaluator else None)
        if metric is None:
            return
        if metric not in scores:
            raise RecipeError(f"evaluation.metric: there is no metric '{metric}'{did_you_mean(metric, scores)}")
        best, value = self.progress.best, scores[metric]["mean"]
        if best is None or value > best["value"]:
            self.progress.best = {"step": step, "metric": metric, "value": value}

    # ----------------------------------------------------------------------------------------------------- checkpoints
    def _resume(self) -> bool:
        """Go back to the newest checkpoint; False: there is none."""
        found = self.checkpoint
        if found:
            self.progress = checkpoint.load(found, self.objective, self.updater, self.source)
            self.updater.lr_factor = self.progress.gate.get("lr_factor", 1.0)
            self.microbatch_tokens = self.policy.microbatch_tokens
            self.display.say(f"resumed stage {self.name} at step {self.progress.step}")
        self.run.cut(self.name, self.progress.step if found else -1)
        for line in self.run.recorded(self.name, "train"):
            if "repetition" in line:  # a step that played
                self.panel.add(line["step"], drift(line))
        self.panel.warned |= {line["text"].partition(" ")[0] for line in self.run.recorded(self.name, "warning")}
        return bool(found)

    def _save(self) -> None:
        self._checkpoint(checkpoint.checkpoint_path(self.run, self.name, self.progress.step))
        best = self.progress.best["step"] if self.progress.best else None
        self.run.prune(self.name, self.recipe.training.keep_checkpoints, best)

    def _checkpoint(self, target: Path) -> None:
        parts = (self.policy, self.objective, self.updater, self.source)
        tensors, weights = self.updater.tensors(), self.strategy.weights()
        with self.strategy.whole():
            checkpoint.save(self.run, self.name, target, self.recipe, *parts, self.progress, tensors, weights)
            world.wait()


def task_of(recipe: Recipe, run: Path) -> Any:
    """A stage's task section, with the run's own reward models found; without models where nothing is judged by them."""
    if not isinstance(recipe.task, PromptTask):
        return recipe.task
    if not recipe.judges:
        return recipe.task.model_copy(update={"rewards": [one for one in recipe.task.rewards if not one.models]})
    return PromptTask.model_validate(locate_rewards(recipe.task.model_dump(mode="json"), run))


def label_of(recipe: Recipe, objective: Objective) -> str:
    """What tables call a stage: imitation has a name for each of its sources."""
    if recipe.objective.name != "likelihood":
        return objective.label
    if recipe.source.name == "rollouts":
        return "expert iteration"
    return "filtered BC" if recipe.source.best < 1 else "BC"
