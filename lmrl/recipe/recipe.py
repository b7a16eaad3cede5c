"""The recipe: one strict, typed description of a run.

Everything a run does is declared here; each section has its own file in this folder. files.py reads
files and overrides. Nothing here imports torch, so that `lmrl show` is fast.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import Discriminator, SerializeAsAny, Tag, field_validator, model_validator

from lmrl.plugins import objects, registry
from lmrl.recipe.base import Section
from lmrl.recipe.blend import BlendSource
from lmrl.recipe.combinations import mistakes
from lmrl.recipe.evaluations import OWN_TASK
from lmrl.recipe.model import Model
from lmrl.recipe.objectives import OBJECTIVES, CustomObjective, ObjectiveOptions
from lmrl.recipe.rollouts import Rollouts
from lmrl.recipe.source import SOURCES as OF_ONE_KIND
from lmrl.recipe.source import CustomSource, DatasetOptions, RolloutsSource, SourceOptions
from lmrl.recipe.steps import Evaluation, Optimizer, Tracking, Training
from lmrl.recipe.task import (
    ENVIRONMENTS,
    AgentTask,
    CustomTask,
    MazeTask,
    NimTask,
    PromptTask,
    RandomWalksTask,
    any_weighted,
)

MAIN_STAGE, REWARD_MODEL = "main", "reward_model"
STAGE_NAME = re.compile(r"[^\W_][^/\\:\x00-\x1f\x7f]{0,99}")
"""Valid folder names on any system: not hidden, no separators, no control characters."""


SOURCES: dict[str, type[SourceOptions]] = OF_ONE_KIND | {"blend": BlendSource}


def _choose(kind: registry.Kind, key: str, shipped: Mapping[str, type]) -> Callable[[Any], str | None]:
    def choose(value: Any) -> str | None:
        name = value.get(key) if isinstance(value, dict) else getattr(value, key, None)
        if isinstance(name, str) and name in shipped:
            return f"<{name}>"
        return "<custom>" if registry.has_name(kind, name) else None

    return choose


def _tags(classes: Mapping[str, type[Section]]) -> dict[str, type[Section]]:
    return {f"<{name}>": cls for name, cls in classes.items()}


def _choose_task(value: Any) -> str | None:
    given = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    if "environment" in given:
        return _choose_environment(value)
    return "<agent>" if {"agent", "agent_command", "tools", "data"} & {*given} else "<prompts>"


_choose_environment = _choose("environment", "environment", ENVIRONMENTS)
CHOICES: dict[str, tuple[str, Callable[[Any], str | None], dict[str, type[Section]]]] = {
    "task": (
        "environment",
        _choose_task,
        {"<prompts>": PromptTask, "<agent>": AgentTask, **_tags(ENVIRONMENTS), "<custom>": CustomTask},
    ),
    "source": ("name", _choose("source", "name", SOURCES), {**_tags(SOURCES), "<custom>": CustomSource}),
    "objective": (
        "name",
        _choose("objective", "name", OBJECTIVES),
        {**_tags(OBJECTIVES), "<custom>": CustomObjective},
    ),
}
"""Sections whose keys depend on a name in them: the key that holds the name, the choice, and the classes by tag."""


def _union(section: str) -> Any:
    _, choose, classes = CHOICES[section]
    arms: list[Any] = [Annotated[cls, Tag(tag)] for tag, cls in classes.items()]
    union: Any = functools.reduce(operator.or_, arms)
    serialized: Any = SerializeAsAny
    return serialized[Annotated[union, Discriminator(choose)]]


if TYPE_CHECKING:
    TaskSection: TypeAlias = PromptTask | AgentTask | RandomWalksTask | MazeTask | NimTask | CustomTask
    SourceSection: TypeAlias = SourceOptions
    ObjectiveSection: TypeAlias = ObjectiveOptions
else:
    TaskSection, SourceSection, ObjectiveSection = (_union(section) for section in CHOICES)


class Recipe(Section):
    """A run. Top-level keys describe the last stage; `stages` has, in order, the keys in which earlier stages differ."""

    description: str = ""
    model: Model
    task: TaskSection | None = None
    """The task that the policy plays; required except for a reward model."""
    source: SourceSection = RolloutsSource()
    rollouts: Rollouts = Rollouts()
    objective: ObjectiveSection
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    start: str = "previous"
    """Where a stage's policy comes from: `previous` (the last earlier stage that left a policy, not a reward model;
    if there is none, the model itself), `model`, or the name of an earlier stage."""
    stages: dict[str, dict[str, Any]] = {}

    @model_validator(mode="before")
    @classmethod
    def _objects_by_name(cls, data: Any) -> Any:
        return objects.with_names(data) if isinstance(data, dict) else data

    @field_validator("stages")
    @classmethod
    def _named_like_folders(cls, stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name in stages:
            if not STAGE_NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r:.60} cannot name a stage, because the stage's folder has the same name: use letters, digits, "
                    "- and _"
                )
        return stages

    @model_validator(mode="after")
    def _sensible(self) -> Recipe:
        for name, changes in self.stages.items():
            if "tracking" in changes:
                raise ValueError(f"`stages.{name}.tracking`: trackers belong to the whole run, set `tracking` itself")
        if isinstance(self.task, PromptTask) and self.task.prompts.path is None:
            source = self.source
            if isinstance(source, BlendSource):
                source = self._prompts_of_logs(source, self.task)
            if not isinstance(source, DatasetOptions) or source.path is None:
                raise ValueError(
                    "`task.prompts.path`: no file of prompts is named (nor logged episodes, `source.path`)"
                )
            for name in ("path", "split", "config", "revision", "columns"):
                setattr(self.task.prompts, name, getattr(source, name, getattr(self.task.prompts, name)))
            self._leave_prompts_open()
        if isinstance(self.task, PromptTask) and self.task.prompts.holdout == 1:
            raise ValueError(
                "`task.prompts.holdout`: 1 holds out all prompts and leaves none to train on: set it below 1, for instance "
                "to 0.1"
            )
        if MAIN_STAGE in self.stages:
            raise ValueError(
                f"`stages.{MAIN_STAGE}`: the top-level keys describe stage {MAIN_STAGE}: choose another name"
            )
        names = list(self.stages)
        trained = [self._objective_name(changes) for changes in self.stages.values()] + [self.objective.name]
        starts = [changes.get("start", "previous") for changes in self.stages.values()] + [self.start]
        for index, start in enumerate(starts):
            where = f"stages.{names[index]}.start" if index < len(names) else "start"
            if start not in ("previous", "model", *names[:index]):
                raise ValueError(f"`{where}`: '{start}' is no earlier stage (nor `previous`, nor `model`)")
            if start in names and trained[names.index(start)] == REWARD_MODEL != trained[index]:
                raise ValueError(
                    f"`{where}`: stage '{start}' trains a reward model, and leaves no policy to start from: name another stage"
                )
        for mistake in self.mistakes():
            raise ValueError(mistake)
        return self

    def _leave_prompts_open(self) -> None:
        """Keep null the prompts' path of stages that name none: those are the prompts of their own logged episodes, not of this one's."""
        for changes in self.stages.values():
            task = changes.get("task", {})
            prompts = task.get("prompts", {}) if isinstance(task, dict) and "environment" not in task else None
            if isinstance(prompts, dict):
                changes["task"] = task | {"prompts": {"path": None} | prompts}

    @staticmethod
    def _prompts_of_logs(blend: BlendSource, task: PromptTask) -> SourceOptions:
        """Give each log of a blend its own prompts, as for a single log; return the first of the logs."""
        for part in blend.parts:
            if part.log is not None and part.log.path is not None and part.task is None:
                own = {name: getattr(part.log, name) for name in ("path", "split", "config", "revision", "columns")}
                prompts = task.prompts.model_copy(update=own)
                part.task = task.model_copy(update={"prompts": prompts, "rewards": []})  # its rows are not played
        return next((part.log for part in blend.parts if part.log is not None), blend)

    def mistakes(self) -> Iterator[str]:
        """Yield one line for each combination of settings that cannot work."""
        yield from mistakes(self)
        yield from self._idle_settings()

    def _idle_settings(self) -> Iterator[str]:
        """Yield one line for each setting made for a reward model's own stage that it cannot use."""
        stated = {
            f"stages.{name}.": own for name, own in self.stages.items() if self._objective_name(own) == REWARD_MODEL
        }
        if not self.stages and self.objective.name == REWARD_MODEL:
            stated[""] = {"evaluation": self.evaluation.model_dump(mode="json")}
        for place, section in stated.items():
            if section.get("rollouts"):
                yield f"`{place}rollouts`: a reward model is trained on pairs, and plays nothing: leave it out"
            evaluation = section.get("evaluation")
            given = evaluation if isinstance(evaluation, dict) else {}
            for name in ("suite", "gate", "metric"):
                if given.get(name) not in (None, OWN_TASK):
                    yield (
                        f"`{place}evaluation.{name}`: a reward model plays no suite; it is evaluated on the pairs that "
                        "objective.holdout holds out: leave it out"
                    )

    @property
    def judges(self) -> bool:
        """True if a stage plays its task, and so needs the task's rewards."""
        return self.objective.name != REWARD_MODEL and (
            self.source.plays or self.evaluation.suite not in (None, OWN_TASK) or self.scores_own_task
        )

    @property
    def scores_own_task(self) -> bool:
        """True if a stage is to be evaluated on its own task, and that task can judge episodes."""
        if self.evaluation.suite != OWN_TASK or self.objective.name == REWARD_MODEL or self.task is None:
            return False
        if not isinstance(self.task, PromptTask):
            return True
        # An offline stage would load a model, or call a server, only for its evaluations.
        cheap = all(reward.kind == "function" for reward in self.task.rewards)
        judged = any_weighted(self.task.rewards)
        return judged and self.task.prompts.holdout > 0 and (self.source.plays or cheap)

    @property
    def resolved_objective(self) -> ObjectiveOptions:
        """The objective, with `auto` values filled in from the rest of the recipe."""
        return self.objective.resolved(self)

    def _objective_name(self, changes: dict[str, Any]) -> str:
        """Name of a stage's objective, given the stage's changes."""
        objective = changes.get("objective")
        return (objective.get("name") if isinstance(objective, dict) else None) or self.objective.name

    def arithmetic(self) -> dict[str, int]:
        """Numbers of prompts, episodes, minibatches and updates, as far as they are known before sampling."""
        prompts, samples = self.source.episodes_a_step(self)
        epochs = getattr(self.objective, "epochs", 1)
        minibatches = getattr(self.objective, "minibatches", 1)
        return {
            "prompts": prompts,
            "samples": samples,
            "episodes": prompts * samples,
            "epochs": epochs,
            "minibatches": minibatches,
            "episodes_per_minibatch": -(-prompts * samples // minibatches),
            "updates_per_step": epochs * minibatches,
            "steps": self.training.steps,
            "updates": epochs * minibatches * max(self.training.steps - getattr(self.source, "warmup_steps", 0), 0),
        }
