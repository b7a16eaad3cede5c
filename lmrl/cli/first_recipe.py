"""A first recipe for your own environment or data: inspects it, and writes sizes that fit, with the reasons as
comments."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from lmrl.environments import environment_factory, sample_texts
from lmrl.environments.calls import begin_episode, failure_text
from lmrl.environments.check import raised_by_odd_actions
from lmrl.environments.games import lists_actions
from lmrl.errors import DataError, RecipeError, counted
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.recipe import CustomTask
from lmrl.rollouts.collect import draw_starts
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import Task, build_task
from lmrl.trajectories.fields import OTHER_NAMES
from lmrl.trajectories.files import open_rows
from lmrl.trajectories.readers import Malformed
from lmrl.trajectories.rows import parse, prompt_of
from lmrl.trajectories.trajectory import Trajectory, prompt_text

EPISODES, ROWS = 64, 2000
"""Maximum episodes and rows that are inspected."""
WORDS = 200
"""Maximum number of distinct words for which a tiny model gets a word-level tokenizer."""
LONGEST = 2048
"""Maximum tokens of a context; of longer episodes only the last observations are shown."""
MOST_POSITIONS = 4096
"""Maximum positions of a model from scratch for episodes that are longer than those seen."""
TURN = 32
"""Tokens of an action if none is known, and at least of a model that was not taught how short actions are."""
TEMPLATE = 64
"""Tokens that a chat template may add to a row, in addition to a quarter of its length."""
METHODS = {
    "environment": ("ppo", "grpo", "rloo", "ilql", "mc"),
    "prompts": ("grpo", "ppo", "rloo"),
    "pairs": ("dpo", "reward_model"),
    "messages": ("likelihood", "ilql", "mc"),
}
LOGGED = ("ilql", "mc")
NO_NAMES = "; `lmrl new` knows no other names: rename the columns, or set `columns` in a recipe of your own"


@dataclass
class Look:
    """Findings about an environment or data, in words and numbers."""

    said: list[str] = field(default_factory=list)
    """Comment lines for the top of the recipe."""
    context: int = 0
    """Tokens of the longest context, as far as was seen."""
    room: int = 0
    """Tokens that an episode of `max_turns` turns could have in its context; 0 if all that were seen had as many turns."""
    turn: int = TURN
    """Tokens of an action."""
    players: tuple[str, ...] = ()
    rows: int = 0
    rewarded: int = 0
    """Rows of data with a reward, among those that were read."""
    tokens: int = 0
    """Maximum tokens of a row of data, with room for what a chat template adds."""
    tokenizer: Literal["char", "word"] = "char"
    chat: bool = False
    history: int | str = "all"
    only_allowed: bool = False
    """True if an environment lists its actions and raises for other texts."""


def look_at_environment(name: str, max_turns: int, scratch: bool = True, tokenizer: Any = None) -> Look:
    """Play an environment with its random player, if it has one. scratch: for a model from scratch; tokenizer: that of
    a named model; None counts four characters as a token."""
    letters = build_tokenizer("char", ["a"])
    look = Look(chat=not scratch and bool(tokenizer is None or tokenizer.chat_template))
    section = CustomTask(environment=name, max_turns=max_turns, chat=look.chat and tokenizer is not None)
    task = build_task(section, tokenizer or letters)
    environment = task.make()
    texts = sample_texts(environment)
    look.players = tuple(getattr(environment, "players", ()))
    if raised := raised_by_odd_actions(environment_factory(section), section.call_timeout):
        look.only_allowed = lists_actions(environment)
        look.said.append(
            raised + (": only allowed actions are played" if look.only_allowed else ": such episodes fail")
        )
    if not look.players:
        try:
            observation, _ = begin_episode(environment, 0, None)
        except (Exception, SystemExit) as error:
            raise RecipeError(f"--environment {name}: {failure_text(error)}") from error
        look.said.append("no scripted player: the length of actions is a guess (rollouts.max_new_tokens)")
        look.context = 4 * len(task.renderer.first(observation)) + 4 * look.turn
        return look
    player = "random" if "random" in look.players else look.players[0]
    per_token = 1 if scratch or tokenizer else 4
    starts = draw_starts(task, EPISODES, ("new", "starts"))

    def play(tokenizer: Any) -> tuple[Task, list[Trajectory]]:
        task = build_task(section.model_copy(update={"history": look.history}), tokenizer)
        return task, Sampler(task).play_scripted(player, starts, ("new", player))

    if scratch:
        look.tokenizer = _level(texts, play(letters)[1])
        tokenizer = build_tokenizer(look.tokenizer, texts)
    for look.history in ("all", 4, 1):
        task, played = play(tokenizer or letters)
        _measure(look, played, task, per_token)
        if look.context <= LONGEST:
            break
    done = [one for one in played if one.failure is None]
    if not done:
        raise RecipeError(f"--environment {name}: every episode failed, for instance: {played[0].failure}")
    returns = [one.reward or 0.0 for one in done]
    look.said.append(
        f"{counted(len(done), 'episode')} of player '{player}': {_range([len(one.turns) for one in done], 'turn')}, return "
        f"{np.mean(returns):.3g} on average, {min(returns):.3g} to {max(returns):.3g}"
    )
    if not any(one.terminated for one in done):
        look.said.append(
            "no episode terminated, all were truncated, as if the game would go on: -m mc cannot learn from them; if the limit is a "
            "rule of the game, return terminated=True at it"
        )
    if len(done) < len(played):
        look.said.append(
            f"{counted(len(played) - len(done), 'episode')} failed, for instance: {next(one.failure for one in played if one.failure)}"
        )
    return look


def _level(texts: list[str], played: Iterable[Trajectory]) -> Literal["char", "word"]:
    """Words, if they are few and `texts` has all that were played."""
    words = {word for text in texts for word in text.split()}
    seen = [text for one in played for turn in one.turns for text in (prompt_text(turn.observation), turn.action)]
    spaced = all(" ".join(text.split()) == text for text in [*texts, *seen])
    known = all(word in words for text in seen for word in text.split())
    return "word" if 0 < len(words) <= WORDS and spaced and known else "char"


def _measure(look: Look, played: Iterable[Trajectory], task: Task, per_token: int) -> None:
    played = list(played)
    context = max((len(segment.tokens) for one in played for segment in one.segments), default=0)
    whole = [one for one in played if task.history == "all" and one.turns]
    if len({len(one.turns) for one in whole}) > 1:  # a policy that gets better may last longer than random play
        a_turn = max(sum(len(segment.tokens) for segment in one.segments) / len(one.turns) for one in whole)
        look.room = math.ceil(a_turn * task.max_turns / per_token)
    turn = max((len(task.renderer.action(turn.action)) for one in played for turn in one.turns), default=look.turn)
    look.context, look.turn = math.ceil(context / per_token), math.ceil(turn / per_token)


def look_at_rows(path: str, kind: str, tokenizer: Any) -> Look:
    """Read rows of data. kind: prompts, pairs or messages. tokenizer: the model's; None counts four characters as a
    token."""

    def length(text: str) -> int:
        return len(tokenizer(text).input_ids) if tokenizer else -(-len(text) // 4)

    look, rows = Look(), open_rows(path)
    look.rows = len(rows)
    if not look.rows:
        raise DataError(f"{path} holds no row")
    lengths = []
    for number in range(0, look.rows, max(look.rows // ROWS, 1)):
        row = rows[number]
        try:
            if kind == "prompts":
                texts = [prompt_text(prompt_of(row))]
            else:
                episodes = parse(row, number)
                texts = [one.prompt + one.completion for one in episodes]
                look.rewarded += episodes[0].reward is not None
        except Malformed as error:
            raise DataError(f"{rows.where(number)}: {error}".replace(OTHER_NAMES, NO_NAMES)) from error
        if kind != "prompts" and (len(texts) == 2) != (kind == "pairs"):
            is_pair = "has chosen and rejected: look at it with --pairs"
            raise DataError(
                f"{rows.where(number)}: {is_pair if len(texts) == 2 else 'has no chosen and rejected, which --pairs expects'}"
            )
        lengths += [length(text) for text in texts]
    longest, common = max(lengths), int(np.quantile(lengths, 0.99))
    look.said.append(
        f"{counted(look.rows, 'row')}; {'prompts' if kind == 'prompts' else 'texts'} of {_range(lengths, 'token')}, 99 in 100 up to {common}"
    )
    if kind == "messages" and look.rewarded:
        look.said.append("rows have rewards: -m ilql and -m mc learn from them, likelihood imitates good and bad alike")
    look.tokens = 64 * math.ceil((1.25 * (longest if longest <= LONGEST else common) + TEMPLATE) / 64)
    return look


def _range(values: list[int], unit: str) -> str:
    low, high = min(values), max(values)
    return counted(low, unit) if low == high else f"{low} to {high} {unit}s"


def quoted(text: str) -> str:
    """A text as YAML reads it back, also within braces."""
    try:
        return text if yaml.safe_load(f"[{text}]") == [text] else json.dumps(text, ensure_ascii=False)
    except yaml.YAMLError:
        return json.dumps(text, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------------------ the recipe
def environment_recipe(name: str, method: str, model: str | None, look: Look, max_turns: int) -> str:
    """The recipe's text: for a tiny model from scratch, or for a model that is named."""
    logged = method in LOGGED
    if (logged or model is None) and not look.players:
        raise RecipeError(
            f"--environment {name}: {'a model from scratch first imitates' if not logged else method + ' learns from'} a scripted player, "
            "but it has none: add players = ('random',) and act(self, player, rng), which returns an action (docs/environments.md), or "
            "set --model"
        )
    player = "random" if "random" in look.players else (look.players or ("",))[0]
    title = quoted(f"{Path(name.partition(':')[0]).stem} by {method}")
    lines = [*(f"# {line}" for line in look.said), "", f"description: {title}", "", "model:"]
    if model is None:
        size = 2 ** math.ceil(math.log2(max(1.5 * look.context + look.turn, min(look.room, MOST_POSITIONS), 32)))
        lines += [
            "  config:  # a model from scratch, small enough for a laptop",
            "    model_type: llama",
            "    hidden_size: 64",
            "    intermediate_size: 128",
            "    num_hidden_layers: 2",
            "    num_attention_heads: 4",
            "    num_key_value_heads: 4",
            f"    max_position_embeddings: {size}  # the longest context seen has {look.context} tokens"
            + (f", and episodes may last up to {max_turns} turns" if look.room else ""),
            f"  tokenizer: {look.tokenizer}",
        ]
    else:
        lines += [f"  path: {quoted(model)}", "  lora: {r: 16, alpha: 32}  # null: train all weights"]
    lines += ["", "task:", f"  environment: {quoted(name)}", f"  max_turns: {max_turns}"]
    seen = "the whole episode" if look.history == "all" else f"the last {look.history} observations"
    if look.history == 1:
        seen = "the last observation"
    lines += [f"  history: {look.history}  # what the policy sees: {seen}"]
    if look.only_allowed:
        lines += ["  allowed_actions: true  # the environment raises for other texts"]
    if model is not None:
        chat = "true  # observations go through the model's chat template; false for a base model"
        lines += [f"  chat: {chat if look.chat else 'false  # the tokenizer has no chat template'}"]
    if model is None:
        lines += [
            "",
            "stages:",
            "  imitation:  # a model from scratch first learns how actions are written",
            "    objective: {name: likelihood}",
            f"    source: {{name: dataset, player: {player}, episodes: 1000, batch_size: 32}}",
            "    training: {steps: 100}",
            "    optimizer: {lr: 2e-3}",
        ]
    lines += [""]
    if logged:
        others = "".join(f"player: {other}, or " for other in look.players if other != player)
        lines += [
            f"source: {{name: dataset, player: {player}, episodes: 5000, batch_size: 32}}  # or {others}path: FILE, logged by `lmrl collect`"
        ]
    else:
        lines += ["source: {name: rollouts}"]
    room = look.turn + max(look.turn // 2, 2)
    lines += [
        "rollouts:",
        "  prompts: 16  # start states a step",
        "  samples: 8  # episodes from each",
        f"  max_new_tokens: {room if model is None else max(room, TURN)}  # of a turn; the longest action seen has {look.turn}",
        f"objective: {{name: {method}}}",
        f"training: {{steps: {3000 if logged else 200}, seed: 0}}",
    ]
    return "\n".join(lines) + "\n"


def data_recipe(kind: str, path: str, method: str, model: str, look: Look, reward: str | None) -> str:
    """The recipe's text for rows of prompts, pairs or messages."""
    if method in LOGGED and not look.rewarded:
        raise DataError(
            f"{path}: no row has a reward, and {method} learns from rewards: add the column, or leave --method out"
        )
    size = look.tokens
    batch = 16 if look.rows >= 64 else max(look.rows // 4, 1)
    epochs = 3 if method == "likelihood" else 1
    steps = max(math.ceil(0.9 * look.rows * epochs / batch), 1)
    lines = [*(f"# {line}" for line in look.said), "", f"description: {quoted(f'{Path(path).stem} by {method}')}", ""]
    lines += ["model:", f"  path: {quoted(model)}", "  lora: {r: 16, alpha: 32}  # null: train all weights", ""]
    if kind == "prompts":
        lines += [
            "task:",
            f"  prompts: {{path: {quoted(path)}, max_tokens: {size}, holdout: 0.1}}  # a tenth is held out for evaluation",
            f"  rewards: {quoted(reward or '')}",
            "",
            "source: {name: rollouts}",
            "rollouts:",
            f"  prompts: {min(16, look.rows)}  # a step",
            f"  samples: {8 if method != 'ppo' else 2}  # completions of each",
            "  max_new_tokens: 128",
            f"objective: {{name: {method}}}",
            f"training: {{steps: {max(min(steps, 200), 20)}, seed: 0}}  # {steps} steps would see each prompt once",
        ]
        return "\n".join(lines) + "\n"
    if method != "reward_model":
        lines += ["task:", f"  prompts: {{max_tokens: {size}, holdout: 0.1}}  # a tenth is held out, and measured", ""]
    lines += [f"source: {{name: dataset, path: {quoted(path)}, batch_size: {batch}, max_tokens: {size}}}"]
    if method in LOGGED:
        lines += [f"objective: {{name: {method}, q_head: tied}}", "training: {steps: 500, seed: 0}"]
    else:
        times = "three times" if epochs == 3 else "once"
        lines += [f"objective: {{name: {method}}}", f"training: {{steps: {steps}, seed: 0}}  # every row {times}"]
    return "\n".join(lines) + "\n"
