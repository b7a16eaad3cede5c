"""Building a stage from its recipe: checks first, then model, engine, source, updater and listeners."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lmrl import distributed
from lmrl import run as runs
from lmrl.engines.base import Engine
from lmrl.engines.build import build_engine
from lmrl.errors import PluginError, RecipeError
from lmrl.evaluation.evaluate import Evaluator
from lmrl.evaluation.suites import Suite, load_suite, own_suite
from lmrl.objectives import Objective, load_objective
from lmrl.objectives.correction import Correction
from lmrl.objectives.policy_gradient import PolicyGradient
from lmrl.plugins import registry
from lmrl.policy.costs import pass_cost
from lmrl.policy.load import load_policy, load_weights
from lmrl.policy.policy import Policy
from lmrl.recipe import OWN_TASK, CustomListener, PromptTask, Recipe
from lmrl.recipe.evaluations import LEAST, is_imitation, own_plan, suite_interval
from lmrl.recipe.files import locate_rewards
from lmrl.recipe.rates import with_rates
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import Task, build_task, task_texts
from lmrl.seeding import seed_everything
from lmrl.sources.base import Source, SourceRequest
from lmrl.sources.build import build_source
from lmrl.sources.dataset import BAD_ROWS
from lmrl.training.checkpoint import Progress, optimizer_of, verify
from lmrl.training.display import Display
from lmrl.training.interrupt import Interrupt
from lmrl.training.listeners import (
    Diagnostics,
    EntropyController,
    Evaluation,
    GateMonitor,
    Guard,
    Listener,
    Memory,
    RateController,
    RewardHackingMonitor,
)
from lmrl.training.monitoring.sampler_check import SamplerCheck
from lmrl.training.parallel.strategy import Strategy
from lmrl.training.stage import Stage
from lmrl.training.tracking import StageTracking
from lmrl.training.updater import Updater

CALIBRATION_EPISODES = 1000
"""How many logged episodes set the units of new heads, from their returns."""


def build_stage(
    run: runs.Run,
    name: str,
    recipe: Recipe,
    start: Path | None,
    device: torch.device,
    display: Display,
    interrupt: Interrupt,
    track: StageTracking = StageTracking(),
    strategy: Strategy | None = None,
) -> Stage:
    """A stage ready to train, or to resume from its newest checkpoint.

    start: the checkpoint folder it begins from (None: the recipe's model). track: the tracker. strategy: None for one
    process. Raises RecipeError if parts of the recipe cannot be combined.
    """
    strategy = strategy or Strategy()
    section = task_of(recipe, run.folder)
    suite = suite_of(recipe, section)
    check_gate(recipe, suite, strategy)

    seed_everything(recipe.training.seed, name, "build")
    objective = load_objective(recipe.resolved_objective)
    objective.correction = Correction.of(recipe.rollouts)
    policy = load_policy(
        recipe.model,
        beginning(run, name, start),
        texts=lambda: task_texts(recipe),
        heads=objective.heads,
        reference=objective.uses_reference,
    ).to(device)
    policy.heads_are_new |= start is None  # its own saved start is no earlier stage
    policy.configure(recipe)
    if recipe.training.threads is not None:
        torch.set_num_threads(recipe.training.threads)

    task = build_task(section, policy.tokenizer)
    task.learning = True
    task.positions = policy.max_length
    if recipe.evaluation.suite != OWN_TASK:
        watch_suite(task, suite, policy.tokenizer, plays=recipe.source.plays)
    engine = build_engine(recipe.rollouts, policy, interrupt.check, run.folder)
    sampler_check = SamplerCheck(policy, engine, recipe.rollouts)
    sampler = Sampler(task, engine, policy.decode, recipe.rollouts.deterministic)
    source = build_source(SourceRequest(recipe, task, sampler, name, run.folder / BAD_ROWS, objective.compares))
    calibrate(recipe, objective, policy, source)
    scratch = start is None and recipe.model.path is None
    if scratch and not recipe.resolved_objective.trained_parameters(1, 1)[0]:
        task.notes.append(
            f"warning: '{recipe.objective.name}' never changes the policy, which here is a model from scratch that has learned nothing: "
            "begin with a stage of objective.name=likelihood, or set model.path to a run that has imitated the data"
        )

    if start is None:
        keep_beginning(run, name, recipe, objective, policy)
    kept = distributed.broadcast(run.checkpoints(name))
    checkpoint = kept[-1] if kept else None
    if checkpoint is None:
        objective.start(policy)
    else:
        verify(checkpoint, kept[:-1])
        load_weights(policy, checkpoint, recipe.model.trust_remote_code)
    cost = pass_cost(policy)  # before its weights are sharded
    options = with_rates(recipe, *policy.size, strategy.synchronized)
    if (
        checkpoint is not None and recipe.optimizer.name is None
    ):  # chosen when the stage began, maybe with another strategy
        options = options.model_copy(update={"name": optimizer_of(checkpoint)})
    objective.optimizer = options.name or objective.optimizer
    updater = Updater(policy, options, recipe.training.steps, strategy)
    evaluator, every = evaluation_of(recipe, suite, policy, engine)
    gated = recipe.evaluation.gate is not None
    begins = gated or recipe.evaluation.suite != OWN_TASK or not (scratch and is_imitation(recipe))
    evaluation = Evaluation(evaluator, every, begins, gated)
    return Stage(
        run=run,
        name=name,
        recipe=recipe,
        display=display,
        interrupt=interrupt,
        track=track,
        objective=objective,
        policy=policy,
        task=task,
        engine=engine,
        sampler_check=sampler_check,
        source=source,
        strategy=strategy,
        updater=updater,
        listeners=build_listeners(
            recipe, objective, policy, evaluation, [one.label for one in task.rewards if not one.weight]
        ),
        checkpoint=checkpoint,
        start=start,
        cost=cost,
        progress=Progress(label=label_of(recipe, objective), columns=evaluator.suite.metrics if evaluator else []),
    )


def build_listeners(
    recipe: Recipe, objective: Objective, policy: Policy, evaluation: Evaluation, watched: list[str]
) -> list[Listener]:
    """A stage's listeners, in the order they are called. watched: labels of the rewards that are not trained on."""
    listeners: list[Listener] = [Memory(policy), RewardHackingMonitor(watched)]
    if objective.kl_controlled and recipe.training.kl_band is not None:
        listeners.append(RateController(recipe.training.kl_band))
    if isinstance(objective, PolicyGradient) and objective.hold_entropy is not None:
        listeners.append(EntropyController(objective.hold_entropy))
    if objective.heads is not None and recipe.evaluation.diagnostics_every:
        listeners.append(Diagnostics())
    listeners.append(evaluation)
    if recipe.evaluation.gate is not None:
        listeners.append(GateMonitor(recipe.evaluation.gate, evaluation))
    listeners.append(Guard(recipe, objective, evaluation))
    return listeners + [
        load_listener(options, f"training.listeners.{n}") for n, options in enumerate(recipe.training.listeners)
    ]


def load_listener(options: CustomListener, key: str) -> Listener:
    """A custom listener, constructed with the section's further keys."""
    cls = registry.load("listener", options.name, f"{key}.name")
    try:
        listener = cls(**options.options)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise PluginError(f"{key}: '{options.name}' cannot be made with these options: {reason}") from error
    if not isinstance(listener, Listener):
        raise PluginError(f"{key}.name: '{options.name}' is not an lmrl.Listener")
    listener.name = getattr(listener, "name", None) or options.name
    return listener


# ----------------------------------------------------------------------------------------------------------------- checks
def suite_of(recipe: Recipe, section: Any) -> Suite | None:
    """The suite that a stage is evaluated on, or that of its own task if none is named. section: its task's."""
    if recipe.evaluation.suite == OWN_TASK:
        if not recipe.scores_own_task or own_plan(recipe) is None:
            return None
        suite = own_suite(section.model_dump(mode="json"), recipe.rollouts.model_dump(mode="json"))
        return suite.model_copy(update={"shuffled": True, "metrics": [*suite.metrics, "kl", "length"]})
    if recipe.evaluation.suite is None:
        return None
    suite = load_suite(recipe.evaluation.suite, task=section.model_dump(mode="json"))
    suite.episodes = recipe.evaluation.episodes or suite.episodes
    return suite


def evaluation_of(recipe: Recipe, suite: Suite | None, policy: Policy, engine: Engine) -> tuple[Evaluator | None, int]:
    """A stage's evaluator, and the steps between its evaluations (0: at the start and the end)."""
    every = recipe.evaluation.every or 0
    if suite is None:
        return None, every
    evaluator = Evaluator(policy, suite, engine)
    if recipe.evaluation.suite != OWN_TASK:
        return evaluator, suite_interval(recipe, len(evaluator.starts()) * suite.samples)
    task, plan = evaluator.task, own_plan(recipe)
    assert plan is not None, "the suite is the task itself"
    if task.judged_by == "reward" and task.heldout == task.training:  # a single row cannot be held out
        if recipe.evaluation.gate is not None:
            raise RecipeError("evaluation.gate measures on held-out prompts, but there is only one prompt: add more")
        return None, every
    starts = plan.episodes if task.heldout is None else len(task.heldout)
    # No more at a time than the stage itself plays, so that an evaluation needs no more memory than training.
    evaluator.at_once = max(recipe.rollouts.prompts * recipe.rollouts.samples, LEAST)
    suite.episodes = min(plan.episodes, starts)
    suite.samples = min(max(plan.episodes // starts, 1), evaluator.at_once)
    return evaluator, plan.every


def check_gate(recipe: Recipe, suite: Suite | None, strategy: Strategy) -> None:
    """Raise RecipeError if a gate, or returning to the best policy at the end, cannot be combined with the rest."""
    if not strategy.can_reload_weights and recipe.training.final == "best":
        raise RecipeError(
            f"training.final=best restores an earlier policy at the end of a stage, which {strategy.name} does not support: launch "
            "without --accelerate, or set training.final=last and take the checkpoint `best`"
        )
    if recipe.evaluation.gate is None:
        return
    if not strategy.can_reload_weights:
        raise RecipeError(
            f"evaluation.gate restores an earlier policy in the middle of a stage, which {strategy.name} does not support: "
            "launch without --accelerate, or leave the gate out"
        )
    assert suite is not None, "a gate without a suite was refused with the recipe"
    metric, first = recipe.evaluation.metric, suite.metrics[0]
    if metric not in (None, first):
        raise RecipeError(
            f"evaluation.gate restores the best policy by the suite's first metric, '{first}': leave "
            f"evaluation.metric={metric} out"
        )


def watch_suite(task: Task, suite: Suite | None, tokenizer: Any, plays: bool) -> None:
    """Tell a task which prompts its suite scores, and warn if the task trains on them. plays: True if the stage trains
    on its own task."""
    if suite is None or task.judged_by != "reward" or not isinstance(suite.task, PromptTask):
        return
    scored = build_task(suite.task.model_copy(update={"rewards": []}), tokenizer)
    task.scored = scored.keys(scored.heldout or [])
    training = task.training or []
    if not plays:
        return
    shared = sum(not task.keys([row]).isdisjoint(task.scored) for row in training)
    if shared:
        task.notes.append(
            f"warning: {shared} of {len(training)} training prompts are also in evaluation.suite, so its scores "
            "flatter the policy: hold them out (task.prompts.holdout), or take them out of one of the files"
        )


def calibrate(recipe: Recipe, objective: Objective, policy: Policy, source: Source) -> None:
    """Set the units of new heads from logged returns."""
    if objective.heads is None or not policy.heads_are_new:
        return
    dataset = source.dataset.probe(CALIBRATION_EPISODES) if source.dataset else []
    objective.calibrate(policy, dataset)


# ------------------------------------------------------------------------------------------------------------ beginnings
def beginning(run: runs.Run, name: str, start: Path | None) -> Path | None:
    """The folder that the policy comes from: the previous stage's, or on resume this stage's own saved start."""
    own = run.stage_folder(name) / "start"
    return own if start is None and distributed.broadcast(own.exists()) else start


def keep_beginning(run: runs.Run, name: str, recipe: Recipe, objective: Objective, policy: Policy) -> None:
    """Save the policy that a stage starts from, if it exists nowhere else."""
    # A model from scratch exists nowhere else, and a frozen reference must not change with the model at `model.path`.
    frozen_copy = objective.uses_reference and recipe.model.lora is None
    if recipe.model.path is None or frozen_copy:
        run.write_folder(run.stage_folder(name) / "start", policy.save)


def task_of(recipe: Recipe, run: Path) -> Any:
    """A stage's task section, with the paths of the run's own reward models resolved; without rewards if nothing is
    judged by them."""
    if not isinstance(recipe.task, PromptTask):
        return recipe.task
    if not recipe.judges:
        return recipe.task.model_copy(update={"rewards": []})
    return PromptTask.model_validate(locate_rewards(recipe.task.model_dump(mode="json"), run))


def label_of(recipe: Recipe, objective: Objective) -> str:
    """A stage's name in tables; imitation has a name for each kind of source."""
    if not recipe.objective.imitates:
        return objective.label
    if not recipe.source.has_log:
        return "expert iteration"
    name = "SFT" if isinstance(recipe.task, PromptTask) else "BC"
    return f"filtered {name}" if any(one.best < 1 for _, one, _ in recipe.source.sections(recipe)) else name
