"""A recipe's task, ready to be played: environments, start states, rendering and rewards."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from lmrl.agents.play import Agent
from lmrl.agents.programs import load_program
from lmrl.environments import GameEnvironment, TextEnvironment, environment_factory, sample_texts, version_of
from lmrl.environments.games import check_says_what_is_allowed
from lmrl.errors import DataError, EpisodeError, ModelError, RecipeError, RewardError, did_you_mean
from lmrl.plugins import registry
from lmrl.recipe import AgentTask, Prompts, PromptTask, Recipe
from lmrl.rewards.early import EarlyScores
from lmrl.rewards.load import load_rewards, needs_of, origin_of
from lmrl.rewards.rewards import GIVEN, RewardFunction, drop_failed, judge
from lmrl.rollouts.parties import Party, build_party
from lmrl.rollouts.templates import prompt_rows
from lmrl.seeding import stream
from lmrl.trajectories.fields import checked_messages
from lmrl.trajectories.files import Selection, read_rows
from lmrl.trajectories.readers import Malformed
from lmrl.trajectories.render import Renderer
from lmrl.trajectories.rows import prompt_of
from lmrl.trajectories.store import dataset_texts
from lmrl.trajectories.trajectory import Trajectory, prompt_key


class PromptEnvironment(TextEnvironment):
    """Prompts as episodes of one step, whose rewards are computed for the whole batch afterwards."""

    def __init__(self, rows: list[dict[str, Any]], column: str):
        self.rows, self.column, self.num_starts = rows, column, len(rows)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        row = self.rows[(options or {})["start"]]
        columns = {name: value for name, value in row.items() if name != self.column}
        return row[self.column], {"columns": columns}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "", 0.0, True, False, {}


class AgentRows:
    """The rows of an agent task, which no environment plays."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows, self.num_starts = rows, len(rows)


@dataclass(frozen=True)
class Match:
    """How the games of a task are played. party: the other side; None: the policy plays every side, and trains on
    each."""

    players: int
    party: Party | None

    @property
    def learned(self) -> int:
        """Sides of a game that become trajectories."""
        return self.players if self.party is None else 1


@dataclass
class Task:
    """The task as the sampler plays it. `training` and `heldout` list start states (None: drawn by seed)."""

    make: Callable[[], Any]
    renderer: Renderer
    training: list[int] | None
    heldout: list[int] | None
    max_turns: int = 1
    history: int | str = "all"
    max_failed: float = 0.1
    call_timeout: float | None = None
    """Seconds that a call of the environment may take."""
    workers: int = 0
    """Threads that step environments concurrently (0: none)."""
    min_group: int = 1
    """Minimum judged episodes of a group that is trained on."""
    rewards: list[RewardFunction] = field(default_factory=list)
    learning: bool = False
    """True if episodes are trained on, so that running statistics of rewards follow them."""
    judged_by: str = "environment"
    environment: dict[str, Any] | None = None
    """How to rebuild the environment, and its version: `{"name", "options", "max_turns", "call_timeout", "version",
    "source"}`; None for prompts."""
    longest_prompt: int | None = None
    """Tokens of the longest prompt (None: known only when it is played)."""
    notes: list[str] = field(default_factory=list)
    positions: int | None = None
    """Tokens of context that the model has positions for (None: any number)."""
    agent: Agent | None = None
    """The program that plays it, instead of an environment."""
    allowed_actions: bool = False
    """True if actions are sampled among those that the environment allows."""
    match: Match | None = None
    """Set for a game of several players; `make` then returns a Game."""
    scored: set[str] = field(default_factory=set)
    """Keys of the prompts that the recipe's suite scores."""

    @property
    def sides(self) -> int:
        """Trajectories per episode: one, or in a self-play game one per player."""
        return 1 if self.match is None else self.match.learned

    def heldout_prompts(self) -> set[str]:
        """Keys of the prompts used only for evaluation (see Renderer.keys)."""
        if self.judged_by != "reward" or self.heldout == self.training:
            return set()
        return self.keys(self.heldout or [])

    def keys(self, starts: list[int]) -> set[str]:
        """Keys of the prompts with these numbers."""
        environment = self.make()
        return set().union(*(self.renderer.keys(environment.rows[row][environment.column]) for row in starts))

    def check_prompts_fit(self, max_new_tokens: int) -> None:
        """Raise ModelError if the longest prompt leaves no room for a completion, before a run comes to it."""
        needed = (self.longest_prompt or 0) + max_new_tokens
        if self.longest_prompt is not None and self.positions is not None and needed > self.positions:
            raise ModelError(
                f"task.prompts: the longest prompt has {self.longest_prompt} tokens, and rollouts.max_new_tokens="
                f"{max_new_tokens} more need {needed} positions, but the model has {self.positions}: lower that, or leave "
                "out longer prompts (task.prompts.max_tokens)"
            )

    def judge(self, trajectories: list[Trajectory], early: EarlyScores | None = None) -> None:
        """Set the reward of every trajectory that has not failed; environments have done so already. early: scores that
        are known already."""
        if self.rewards or self.judged_by == "reward":
            judge(self.rewards, [one for one in trajectories if not one.failure], self.learning, early)

    def keep_judged(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        """The judged trajectories; stops the run if too many are not judged (over all processes)."""
        name = self.environment["name"] if self.environment else None
        try:
            return drop_failed(trajectories, self.max_failed, self.judged_by, name)
        except EpisodeError as error:
            error.episodes = [one for one in trajectories if one.failure]
            raise

    def with_turns(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        """The trajectories without sides of games that ended before they had a turn: there is nothing to train on."""
        return trajectories if self.match is None else [one for one in trajectories if one.turns]

    def keep_groups(self, judged: list[Trajectory]) -> list[Trajectory]:
        """The judged trajectories with a turn whose group has at least `min_group` of them."""
        judged = self.with_turns(judged)
        sizes = Counter(trajectory.group for trajectory in judged)
        return [trajectory for trajectory in judged if sizes[trajectory.group] >= self.min_group]


def task_texts(recipe: Recipe) -> list[str]:
    """Text samples of a task and of logged data, from which a model built from scratch takes its vocabulary."""
    section, source, level, texts = recipe.task, recipe.source, recipe.model.tokenizer, []
    for part in getattr(source, "parts", ()):
        if part.log is not None and part.log.path:
            texts += dataset_texts(part.log.path, Selection.of(part.log))
        if part.task is not None:
            texts += texts_of(part.task, level)
    path = getattr(source, "path", None)
    if path:
        texts += dataset_texts(path, Selection.of(source))
    texts += [] if section is None else texts_of(section, level)
    if not texts and section is not None:
        lacking = "its rows hold no text: fill their prompts"
        if not isinstance(section, PromptTask | AgentTask):
            lacking = f"environment '{section.environment}' has no texts(): add it, set model.tokenizer=char"
        raise RecipeError(
            f"model.config: a model from scratch takes its vocabulary from the task, but {lacking}, or set model.path"
        )
    return texts


def texts_of(section: Any, level: Literal["char", "word"]) -> list[str]:
    """Text samples of a task's section: of its prompts or its environment. If the environment gives none, printable ASCII
    is its letters, while its words are unknown."""
    if isinstance(section, PromptTask):
        return strings_in(prompt_rows(section.prompts))
    if isinstance(section, AgentTask):
        return [string.printable, *strings_in(_agent_rows(section))]
    environment = environment_factory(section)()
    return sample_texts(environment) or [string.printable] * (level == "char")


def strings_in(value: Any) -> list[str]:
    """The texts of rows, including those inside messages and turns."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for one in inner for text in strings_in(one)]


def build_task(section: Any, tokenizer: Any) -> Task:
    """Load the parts that a recipe's `task` names. Raises DataError, PluginError or ModelError."""
    if isinstance(section, PromptTask):
        return _prompt_task(section, tokenizer)
    if isinstance(section, AgentTask):
        return _agent_task(section, tokenizer)
    make = environment_factory(section)
    environment = make()
    if section.allowed_actions:
        check_says_what_is_allowed(environment, section.environment)
    count = getattr(environment, "num_starts", None)
    starts = None if count is None else list(range(count))
    match, made = None, make
    if isinstance(environment, GameEnvironment):
        match = Match(environment.game.num_players, build_party(section, environment.game))
        made = partial(_game_of, make)
    return Task(
        made,
        Renderer(tokenizer, section.chat, special_tokens=section.special_tokens),
        training=starts,
        heldout=starts,
        max_turns=section.max_turns,
        history=section.history,
        max_failed=section.max_failed,
        call_timeout=section.call_timeout,
        workers=section.workers,
        min_group=section.min_group,
        allowed_actions=section.allowed_actions,
        environment={
            "name": section.environment,
            "options": section.options,
            "max_turns": section.max_turns,
            # A recipe that was saved and read has a float where the default is an integer.
            "call_timeout": None if section.call_timeout is None else float(section.call_timeout),
            **version_of(environment),
        },
        match=match,
    )


def _game_of(make: Callable[[], Any]) -> Any:
    return make().game


def _prompt_task(section: PromptTask, tokenizer: Any) -> Task:
    prompts = section.prompts
    rows = prompt_rows(prompts)
    for number, row in enumerate(rows, start=1):
        try:
            row[prompts.column] = prompt_of(row, prompts.column)
            if isinstance(row[prompts.column], list):
                row[prompts.column] = checked_messages(row[prompts.column], prompts.column)
        except Malformed as error:
            raise DataError(f"{prompts.path}, row {number}: {error}") from error
    dialogue = next((number for number, row in enumerate(rows, start=1) if isinstance(row[prompts.column], list)), None)
    if dialogue is not None and not tokenizer.chat_template:
        raise DataError(
            f"{prompts.path}, row {dialogue}: field '{prompts.column}' is a list of messages, but the model's tokenizer has "
            "no chat template to render them: take an instruct model, or give prompts as text"
        )
    chat = prompts.chat or dialogue is not None
    renderer = Renderer(tokenizer, chat, prompts.system, section.special_tokens)
    # Plain text is not a prompt: all of it is trained on, and here it only identifies the row.
    plain = ["text" in row and row["text"] is row[prompts.column] for row in rows]
    lengths = [0 if text else len(renderer.first(row[prompts.column])) for row, text in zip(rows, plain, strict=True)]
    names = columns_of(rows)
    # With None for the columns that a row lacks, so that rewards get the same columns in every batch.
    short: list[dict[str, Any]] = [
        {**dict.fromkeys(names), **row}
        for row, length in zip(rows, lengths, strict=True)
        if length <= prompts.max_tokens
    ]
    notes = []
    if len(short) < len(rows):
        notes.append(
            f"{len(rows) - len(short)} of {len(rows)} prompts are longer than task.prompts.max_tokens={prompts.max_tokens}"
        )
    if not short:
        raise DataError(f"{prompts.path}: every prompt is longer than task.prompts.max_tokens={prompts.max_tokens}")
    training, heldout = split_rows([prompt_key(row[prompts.column]) for row in short], prompts)
    if prompts.holdout and training == heldout:
        notes.append(f"{prompts.path}: all rows have the same prompt, so none is held out for evaluation")
    return Task(
        lambda: PromptEnvironment(short, prompts.column),
        renderer,
        training=training,
        heldout=heldout,
        max_failed=section.max_failed,
        min_group=section.min_group,
        rewards=_load_rewards(section, names),
        judged_by="reward",
        longest_prompt=max(length for length in lengths if length <= prompts.max_tokens),
        notes=notes,
    )


def columns_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _load_rewards(section: PromptTask | AgentTask, columns: list[str]) -> list[RewardFunction]:
    rewards = load_rewards(section.rewards, section.special_tokens, section.call_timeout)
    for reward in rewards:
        _check_columns(section, reward.origin, reward.needs, columns)
    return rewards


def _check_columns(section: PromptTask | AgentTask, reward: str, needs: Sequence[str], columns: list[str]) -> None:
    """Raise RewardError if a reward cannot be called with the columns of the task's rows. needs: see RewardFunction."""
    path, prompt = (
        (section.data, None) if isinstance(section, AgentTask) else (section.prompts.path, section.prompts.column)
    )
    given = [*(name for name in columns if name != prompt), *GIVEN]
    for name in needs:
        if name not in given:
            raise RewardError(
                f"task.rewards: {reward} has the parameter '{name}', but no such column comes with the rows of {path}: "
                f"rename it, set it under `options`, or give it a default value{did_you_mean(name, given)}"
            )


def check_rewards(section: Any) -> None:
    """Raise PluginError or RewardError if a reward function of a task does not exist, or does not fit the task's rows.
    Functions for workers are only loaded there."""
    specs = enumerate(getattr(section, "rewards", ()))
    functions = {index: spec for index, spec in specs if spec.kind == "function" and not spec.workers}
    if not functions:
        return
    rows = prompt_rows(section.prompts) if isinstance(section, PromptTask) else _agent_rows(section)
    for index, spec in functions.items():
        function = registry.load("reward", spec.what, f"task.rewards.{index}.function")
        _check_columns(section, origin_of(spec), needs_of(function, spec.options), columns_of(rows))


def _agent_rows(section: AgentTask) -> list[dict[str, Any]]:
    return read_rows(section.data, Selection.of(section), section.limit)


def _agent_task(section: AgentTask, tokenizer: Any) -> Task:
    rows = _agent_rows(section)
    training, heldout = split_rows(range(len(rows)), section)
    agent = Agent(
        load_program(section),
        rows,
        section.workers,
        section.max_calls,
        section.call_timeout,
        bool(section.rewards),
        section.special_tokens,
    )
    return Task(
        lambda: AgentRows(rows),
        Renderer(tokenizer, bool(tokenizer.chat_template), special_tokens=section.special_tokens),
        training=training,
        heldout=heldout,
        max_failed=section.max_failed,
        call_timeout=section.call_timeout,
        rewards=_load_rewards(section, columns_of(rows)),
        min_group=section.min_group,
        judged_by="agent",
        agent=agent,
    )


def split_rows(keys: Sequence[Hashable], prompts: Prompts | AgentTask) -> tuple[list[int], list[int]]:
    """Row numbers to train on and to hold out. Rows with the same key stay together; the split depends only on which
    keys are the same."""
    numbers: dict[Hashable, int] = {}
    number_of = [numbers.setdefault(key, len(numbers)) for key in keys]
    rows, count = list(range(len(keys))), len(numbers)
    if prompts.holdout == 1:
        return [], rows
    held = round(prompts.holdout * count)
    if prompts.holdout > 0:
        held = min(max(held, 1), count - 1)
    if held == 0:
        return rows, rows
    heldout = set(stream("holdout", count).permutation(count).tolist()[:held])
    return [row for row in rows if number_of[row] not in heldout], [row for row in rows if number_of[row] in heldout]


def starts_for(starts: list[int] | None, first: int, count: int, *name: int | str) -> list[int | None]:
    """`count` start states from position `first` of an endless sequence of shuffled passes over `starts`."""
    if starts is None:
        return [None] * count
    chosen: list[int | None] = []
    while len(chosen) < count:
        position = first + len(chosen)
        order = stream(*name, "pass", position // len(starts)).permutation(np.array(starts)).tolist()
        chosen += order[position % len(starts) :][: count - len(chosen)]
    return chosen
