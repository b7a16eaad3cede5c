"""Rows that other tools write: prompts with completions, chats, preference pairs (see rows.py)."""

from __future__ import annotations

import json
import math
from os.path import commonprefix
from typing import Any

from lmrl.errors import counted
from lmrl.trajectories.fields import (
    messages_in,
    not_empty,
    optional,
    reward_in,
    reward_of,
    take,
    text_or_messages,
)
from lmrl.trajectories.readers import Malformed, Row
from lmrl.trajectories.trajectory import (
    Messages,
    Trajectory,
    Turn,
    as_messages,
    prompt_text,
    same_reward,
    transcript,
)

HH_MARKER = "\n\nAssistant:"
"""The marker that ends the prompt in Anthropic's HH-RLHF."""


def completion_episode(row: Row, number: int) -> Trajectory:
    prompt, completion = text_or_messages(row, "prompt"), text_or_messages(row, "completion")
    if isinstance(completion, str):
        episode = episode_of(row, [Turn(prompt, not_empty(completion, "completion"))], number)
        episode.cut_turns = [] if episode.terminated else [0]
        return episode
    turns, trailing = _dialogue(completion, "completion", as_messages(prompt))
    if isinstance(prompt, str) and turns[0].observation == as_messages(prompt):
        turns[0].observation = prompt  # the task decides whether text goes through the chat template
    return episode_of(row, turns, number, trailing=trailing)


def chat_episode(row: Row, number: int) -> Trajectory:
    turns, trailing = _dialogue(messages_in(row, "messages"), "messages", [])
    rewards = None
    if row.get("rewards") is not None:
        rewards = take(row, "rewards", list, items="numbers")
        if len(rewards) != len(turns):
            raise Malformed(
                f"field 'rewards' has {counted(len(rewards), 'number')} for {counted(len(turns), 'assistant message')}"
            )
        rewards = [reward_of(reward, "rewards") for reward in rewards]
        row = row | {"reward": math.fsum(rewards) if row.get("reward") is None else row["reward"]}
    return episode_of(row, turns, number, rewards, trailing)


def preference_episodes(row: Row, number: int) -> list[Trajectory]:
    prompt, *answers = preference(row)
    episodes = []
    for side, (answer, reward) in enumerate(zip(answers, (1.0, -1.0), strict=True)):
        name = ("chosen", "rejected")[side]
        turns = [Turn(prompt, answer)] if isinstance(answer, str) else _dialogue(answer, name, as_messages(prompt))[0]
        episode = episode_of({"reward": reward}, turns, number)
        episode.episode = 2 * number + side
        episodes.append(episode)
    return episodes


def preference(row: Row) -> tuple[str | Messages, str | Messages, str | Messages]:
    """Prompt, chosen and rejected completion of a row: all text, or all messages. Raises Malformed."""
    chosen, rejected = text_or_messages(row, "chosen"), text_or_messages(row, "rejected")
    prompt = None if row.get("prompt") is None else text_or_messages(row, "prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            prompt = common_prompt(chosen, rejected)
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return prompt, not_empty(chosen, "chosen"), not_empty(rejected, "rejected")
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise Malformed("fields 'chosen' and 'rejected' differ in type; expected text in both, or messages in both")
    shared = common_messages(chosen, rejected)
    stated = [] if prompt is None else as_messages(prompt)
    opening = shared if all(message in shared for message in stated) else stated + shared
    return opening, chosen[len(shared) :], rejected[len(shared) :]


def equal_pairs_note(count: int, first: str) -> str:
    """A note on pairs whose two answers are the same. first: the place of the first one."""
    return (
        f"warning: {first}: in {counted(count, 'pair')} chosen and rejected are the same, so that neither is preferred: take "
        "them out"
    )


def common_prompt(chosen: str, rejected: str) -> str:
    """The common beginning of both texts, cut back to the last HH_MARKER, else to before the last white space."""
    shared = commonprefix([chosen, rejected])
    marker = shared.rfind(HH_MARKER)
    if marker >= 0:
        return shared[: marker + len(HH_MARKER)]
    return shared[: max((at for at, letter in enumerate(shared) if letter.isspace()), default=0)]


def common_messages(chosen: Messages, rejected: Messages) -> Messages:
    """The messages that both begin with; at least the last message of each is excluded."""
    pairs = list(zip(chosen[:-1], rejected[:-1], strict=False))
    same = next((at for at, (one, other) in enumerate(pairs) if one != other), len(pairs))
    return chosen[:same]


def _dialogue(messages: Messages, name: str, opening: Messages) -> tuple[list[Turn], Messages]:
    """Turns of a chat that continues `opening`, and the messages after the last action."""
    turns: list[Turn] = []
    context = list(opening)
    for message in messages:
        if message["role"] != "assistant":
            context.append(message)
            continue
        if not context:
            place = "two assistant messages in a row" if turns else "an assistant message first"
            raise Malformed(f"field '{name}' has {place}; expected a message before it that it answers")
        action = not_empty(said_text(message), name)
        observation = _observed(context) if turns else context
        turns.append(Turn(observation, action, message=message if message.get("tool_calls") else None))
        context = []
    if not turns:
        raise Malformed(f"field '{name}' has no assistant message; expected at least one")
    return turns, context


def _observed(messages: Messages) -> str | Messages:
    """The observation between two actions: the user's messages as one text, tool results as messages."""
    if any(message["role"] != "user" for message in messages):
        return messages
    return "\n\n".join(message["content"] for message in messages)


def said_text(message: dict[str, Any]) -> str:
    """An assistant message as readable text: its content, and a line of JSON for each tool call."""
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join([*([message["content"]] if message["content"] else []), *calls])


def episode_of(
    row: Row,
    turns: list[Turn],
    number: int,
    rewards: list[float | None] | None = None,
    trailing: Messages | None = None,
) -> Trajectory:
    """An episode of any format. rewards: one per turn; without them, the row's `reward` is given in the last turn.
    trailing: messages after the last action."""
    total = reward_in(row)
    terminated = optional(row, "terminated", bool, not optional(row, "truncated", bool, False))
    if rewards is not None:
        for turn, reward in zip(turns, rewards, strict=True):
            turn.reward = 0.0 if reward is None else float(reward)
        earned = math.fsum(turn.reward for turn in turns)
        if total is not None and not same_reward(total, earned):
            raise Malformed(f"field 'reward' is {total}, but its turns earned {earned} together; expected the same")
        if total is None and "reward" not in row:
            total = earned
    elif turns and total is not None:
        turns[-1].reward = total
    return Trajectory(
        [],
        prompt_text(turns[0].observation) if turns else "",
        transcript(turns),
        terminated=terminated,
        reward=total,
        group=number,
        episode=number,
        messages=turns[0].observation if turns and isinstance(turns[0].observation, list) else None,
        turns=turns,
        final_observation=_observed(trailing) if trailing and not terminated else None,
    )
