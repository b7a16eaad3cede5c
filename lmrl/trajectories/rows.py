"""Rows of logged data, and the trajectories they represent.

lmrl's own format has one row per episode, the same in Parquet and JSONL:

    turns              [{"observation", "action", "reward", "cut"}]; cut: the action ran into the token limit
                       in a dialogue, if needed, also: "messages", the observation as messages, and
                       "message", an action that calls tools
    prompt_messages    the first observation as [{"role", "content"}] if it is a dialogue, else null
    final_observation  of a truncated episode: the observation that would have come next
    terminated         false: truncated by a limit; without it, `truncated: true` says the same
    reward             the return; null: not judged
    metrics components objects of numbers (in Parquet as JSON text), of the environment and of the reward functions
    failure            why the episode could not be judged, or null
    columns            further columns of the prompt, for reward functions (in Parquet as JSON text), or null
    group episode      episodes of a group have the same start
    seed start         arguments of the environment's reset: seed, and options["start"] (null: drawn by the seed)
    player             who played
    game               in a game of several players {"player", "start", "moves"}: the side of this episode, the game's start state, and the
                       moves of all as [player, action] (in Parquet as JSON text), else null
    tokenizer          fingerprint of the tokenizer of ...
    segments           [{"tokens", "turns", "logprobs", "rewards"}], as in `Segment`; null: only the text is known. "allowed", if
                       actions were restricted: {"places", "sets", "table"}, the token at a place was one of table[set]

Only `turns` with `observation` and `action` are required. Formats that other tools write are recognised by their
fields:

    prompt, completion   text or messages; `reward`, a number, may be missing; `terminated` as above: a text was then cut
    messages             a chat, every assistant message an action; `reward` for all of it, or `rewards` for each action.
                         Between two actions there is one observation: several user messages are joined; tool
                         messages stay messages. An assistant message may have `tool_calls`.
    chosen, rejected     two episodes with rewards 1 and -1; without `prompt` it is what both begin with
    text                 text in which every token is an action, after the tokenizer's opening token
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from dataclasses import replace
from typing import Any

from lmrl.errors import DataError
from lmrl.trajectories.allowed import AllowedTokens, from_table, to_table
from lmrl.trajectories.fields import (
    OTHER_NAMES,
    checked_message,
    checked_messages,
    json_of,
    messages_in,
    not_empty,
    optional,
    reward_in,
    reward_of,
    take,
)
from lmrl.trajectories.formats import chat_episode, completion_episode, episode_of, preference, preference_episodes
from lmrl.trajectories.readers import Malformed, Row
from lmrl.trajectories.recorder import Recorder
from lmrl.trajectories.render import Renderer
from lmrl.trajectories.trajectory import (
    CONTEXT,
    TOKENS,
    Messages,
    Segment,
    Trajectory,
    Turn,
    as_messages,
    prompt_text,
    same_reward,
)

SEGMENT_LISTS = ("tokens", "turns", "logprobs", "rewards")


def fingerprint(tokenizer: Any) -> str:
    """A short hash of vocabulary and special tokens: tokenizers that share it give tokens the same meaning."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    return hashlib.blake2b(json.dumps([vocabulary, special]).encode(), digest_size=8).hexdigest()


def to_row(trajectory: Trajectory, tokenizer: str | None = None) -> Row:
    """A trajectory in lmrl's own format; tokens are written if the fingerprint of their `tokenizer` is given."""
    turns = [
        {
            "observation": prompt_text(turn.observation),
            "action": turn.action,
            "reward": turn.reward,
            "cut": number in trajectory.cut_turns,
        }
        | ({"messages": turn.observation} if number and isinstance(turn.observation, list) else {})
        | ({"message": turn.message} if turn.message else {})
        for number, turn in enumerate(trajectory.turns)
    ]
    messages, final = trajectory.messages, trajectory.final_observation
    return {
        "group": trajectory.group,
        "episode": trajectory.episode,
        "seed": trajectory.seed,
        "start": trajectory.start,
        "player": trajectory.player,
        "game": trajectory.game,
        "prompt_messages": messages,
        "turns": turns,
        "final_observation": None if final is None else prompt_text(final),
        "terminated": trajectory.terminated,
        "reward": trajectory.reward,
        "metrics": trajectory.metrics,
        "components": trajectory.components,
        "failure": trajectory.failure,
        "columns": trajectory.columns or None,
        "tokenizer": tokenizer,
        "segments": None if tokenizer is None else list(map(_segment_row, trajectory.segments)),
    }


def _segment_row(segment: Segment) -> Row:
    """Raises DataError for actions other than tokens, which files cannot hold yet."""
    if segment.kind != TOKENS:
        raise DataError(f"actions of the kind '{segment.kind}' cannot be written to files: only tokens can")
    row: Row = {name: getattr(segment, name) for name in SEGMENT_LISTS}
    return row | ({"allowed": to_table(segment.allowed)} if segment.allowed else {})


def prompts_of(trajectory: Trajectory) -> list[str | Messages]:
    """The prompts that the policy answered: the first, and in a dialogue everything up to each later turn."""
    first = trajectory.turns[0].observation
    prompts = [first]
    if is_dialogue(trajectory):
        dialogue = as_messages(first)
        for turn, following in zip(trajectory.turns, trajectory.turns[1:], strict=False):
            said = turn.message or {"role": "assistant", "content": turn.action}
            dialogue = [*dialogue, said, *as_messages(following.observation)]
            prompts.append(dialogue)
    return prompts


def parse(row: Row, number: int = 0, tokenizer: str | None = None) -> list[Trajectory]:
    """The episodes of a row as text, checked: one, or two for chosen and rejected.

    Their `segments` are empty unless the row holds tokens of this `tokenizer`. number: the row's, for its group and
    episode. Raises Malformed with field and what was expected.
    """
    present = {name for name, value in row.items() if value is not None}
    if "turns" in present:
        return [_own(row, number, tokenizer)]
    if "chosen" in present or "rejected" in present:
        return preference_episodes(row, number)
    if "messages" in present and "completion" not in present:
        return [chat_episode(row, number)]
    if "prompt" in present or "completion" in present:
        return [completion_episode(row, number)]
    if "text" in present:
        return [episode_of(row, [Turn("", not_empty(take(row, "text", str), "text"))], number)]
    raise Malformed(
        f"has no known format (fields: {', '.join(row)}); expected turns, prompt and completion, messages, chosen and "
        f"rejected, or text{OTHER_NAMES}"
    )


def prompt_of(row: Row, column: str = "prompt") -> str | Messages:
    """The prompt in a row's column. Without that column: the common beginning of chosen and rejected, what an episode or a
    chat has before the first action, or a whole plain text, which then identifies the row."""
    if row.get(column) is None:
        present = {name for name, value in row.items() if value is not None}
        if "turns" not in present and {"chosen", "rejected"} <= present:
            return preference(row)[0]
        if {"turns", "messages"} & present and (turns := parse(row)[0].turns):
            return turns[0].observation
        if "text" in present:
            return str(take(row, "text", str))
    found: str | Messages = take(row, column, str, list, fix=OTHER_NAMES)
    return found if isinstance(found, str) or not row.get("tools") else messages_in(row, column)


def render(trajectory: Trajectory, renderer: Renderer, history: int | str = "all") -> Trajectory:
    """Fill the segments of an episode that is known as text, tokenised as the sampler does it, without log-probabilities.
    One that has tokens already is returned unchanged. history: see Recorder. Raises Malformed."""
    if trajectory.segments or not trajectory.turns:
        return trajectory
    if is_dialogue(trajectory) and not renderer.chat:
        renderer = copy.copy(renderer)
        renderer.chat = True
    return _played(trajectory, renderer, history, {})


def in_contexts(trajectory: Trajectory, renderer: Renderer, history: int | str) -> Trajectory:
    """An episode whose tokens are known, with each action in the context that a task of this history shows it; unchanged if
    it is. Otherwise the actions keep their tokens, but their log-probabilities are those of other contexts, and unknown."""
    known: dict[int, list[tuple[int, AllowedTokens | None]]] = {}
    for segment in trajectory.segments:
        for place in segment.actions:
            known.setdefault(segment.turns[place], []).append((segment.tokens[place], segment.allowed.get(place)))
    if not trajectory.turns or len(known) < len(trajectory.turns):
        return trajectory
    played = _played(trajectory, renderer, history, known)
    return trajectory if _acted(played) == _acted(trajectory) else played


def _acted(trajectory: Trajectory) -> list[list[int]]:
    """The tokens of each segment, up to its last action."""
    return [segment.tokens[: segment.actions[-1] + 1] for segment in trajectory.segments if segment.actions]


def _played(
    trajectory: Trajectory,
    renderer: Renderer,
    history: int | str,
    known: dict[int, list[tuple[int, AllowedTokens | None]]],
) -> Trajectory:
    """An episode, recorded as the sampler does it. known: tokens of the actions, by turn, and what each was chosen from."""
    played = replace(trajectory, segments=[], turns=[], cut_turns=[])
    recorder = Recorder(played, renderer, history)
    for number, turn in enumerate(trajectory.turns):
        recorder.observe(turn.observation)
        cut, allowed = number in trajectory.cut_turns, [own for _, own in known.get(number, ())]
        if number in known:
            tokens = [token for token, _ in known[number]]
        elif turn.message:
            tokens = renderer.call(turn.message)
        else:
            tokens = (renderer.plain(turn.action) if cut else []) or renderer.action(turn.action)
        if not tokens:
            raise Malformed(
                f"turn {number} has an empty action, and the tokenizer no end-of-sequence token to stand for it"
            )
        recorder.act(turn.action, tokens, cut=cut, message=turn.message, allowed=allowed)
        played.place_reward(turn.reward, number)
    if trajectory.final_observation is not None:
        recorder.truncate(trajectory.final_observation)
    return played


def is_dialogue(trajectory: Trajectory) -> bool:
    """True if there are messages, which only a chat template can render."""
    return any(not isinstance(turn.observation, str) or turn.message for turn in trajectory.turns)


def _own(row: Row, number: int, tokenizer: str | None) -> Trajectory:
    given = take(row, "turns", list, items="turns")
    if (
        not given and row.get("failure") is None and row.get("game") is None
    ):  # a game may be over before a side has had a turn
        raise Malformed("field 'turns' is empty; expected at least one turn")
    turns, rewards, cut_turns = [], [], []
    for index, turn in enumerate(given):
        turn = _turn(turn, index)
        turns.append(Turn(_observation(turn, index), turn["action"], message=_call(turn, index)))
        rewards.append(turn.get("reward"))
        if turn.get("cut"):
            cut_turns.append(index)
    if turns and row.get("prompt_messages") is not None:
        turns[0].observation = messages_in(row, "prompt_messages")
    trajectory = episode_of(row, turns, number, None if all(reward is None for reward in rewards) else rewards)
    trajectory.cut_turns = cut_turns
    trajectory.group = optional(row, "group", int, number)
    trajectory.episode = optional(row, "episode", int, number)
    trajectory.seed, trajectory.start = optional(row, "seed", int), optional(row, "start", int)
    trajectory.player = optional(row, "player", str)
    trajectory.components = _numbers(row, "components")
    trajectory.metrics = _numbers(row, "metrics")
    trajectory.failure = optional(row, "failure", str)
    trajectory.columns, trajectory.game = _object(row, "columns") or {}, _object(row, "game")
    if not trajectory.terminated:
        trajectory.final_observation = optional(row, "final_observation", str)
    segments = _segments(row, len(turns))
    if segments and tokenizer is not None and row.get("tokenizer") == tokenizer:
        _check_rewards(segments, turns)
        trajectory.segments = segments
    return trajectory


def _object(row: Row, name: str) -> dict[str, Any] | None:
    value = json_of(row, name)
    if value is None or isinstance(value, dict):
        return value
    raise Malformed(f"field '{name}' is {value!r:.60}; expected an object")


def _turn(turn: Any, index: int) -> Row:
    if not isinstance(turn, dict):
        raise Malformed(f"field 'turns', turn {index} is {turn!r:.60}; expected an object with observation and action")
    try:
        take(turn, "observation", str)
        take(turn, "action", str)
        reward_in(turn)
        optional(turn, "cut", bool)
    except Malformed as error:
        raise Malformed(f"field 'turns', turn {index}: {error}") from error
    return turn


def _observation(turn: Row, index: int) -> str | Messages:
    messages = json_of(turn, "messages")
    return turn["observation"] if messages is None else checked_messages(messages, f"turns.{index}.messages")


def _call(turn: Row, index: int) -> dict[str, Any] | None:
    message = json_of(turn, "message")
    return None if message is None else checked_message(message, f"turns.{index}.message")


def _segments(row: Row, turns: int) -> list[Segment]:
    if row.get("segments") is None:
        return []
    segments = []
    for index, segment in enumerate(take(row, "segments", list, items="segments")):
        where = f"field 'segments', segment {index}"
        if not isinstance(segment, dict) or any(not isinstance(segment.get(name), list) for name in SEGMENT_LISTS):
            raise Malformed(f"{where} is {segment!r:.60}; expected an object with the lists {', '.join(SEGMENT_LISTS)}")
        lists = [segment[name] for name in SEGMENT_LISTS]
        if len(set(map(len, lists))) > 1:
            raise Malformed(
                f"{where} has lists of {', '.join(str(len(one)) for one in lists)} entries; expected as many"
            )
        if not all(type(one) is int for one in lists[0]) or not all(
            type(one) is int and CONTEXT <= one < turns for one in lists[1]
        ):
            raise Malformed(f"{where}: expected whole numbers as tokens, and turns from {CONTEXT} to {turns - 1}")
        if lists[1][:1] != [CONTEXT]:
            raise Malformed(
                f"{where} has no context before its first action; expected a token with turn {CONTEXT} first"
            )
        tokens, acted, logprobs, rewards = map(list, lists)
        segments.append(Segment(tokens, acted, logprobs, rewards, _allowed(segment, where)))
    return segments


def _check_rewards(segments: list[Segment], turns: list[Turn]) -> None:
    """Raise Malformed if tokens hold other rewards than their turns."""
    earned = [0.0] * len(turns)
    for segment in segments:
        for number, reward in zip(segment.turns, segment.rewards, strict=True):
            if number != CONTEXT:
                earned[number] += reward_of(reward, "segments")
    for number, (turn, own) in enumerate(zip(turns, earned, strict=True)):
        if not same_reward(own, turn.reward):
            raise Malformed(
                f"field 'segments' has rewards of {own:g} for turn {number}, but field 'turns' has {turn.reward:g}; "
                "expected the same, or no 'segments'"
            )


def _allowed(segment: Row, where: str) -> dict[int, AllowedTokens]:
    """The sets that restricted actions were chosen from, by position; checked."""
    given = segment.get("allowed")
    if given is None:
        return {}
    try:
        found = from_table(given["places"], given["sets"], given["table"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise Malformed(f"{where} has 'allowed' {given!r:.60}; expected places, sets and table") from error
    tokens, turns = segment["tokens"], segment["turns"]
    for place, allowed in found.items():
        if type(place) is not int or not 0 <= place < len(tokens) or turns[place] == CONTEXT:
            raise Malformed(f"{where}: 'allowed' names place {place!r:.20}, which is not an action")
        if tokens[place] not in allowed:
            raise Malformed(f"{where}: token {tokens[place]} at place {place} is not among those 'allowed' there")
    return found


def _numbers(row: Row, name: str) -> dict[str, float | None]:
    value = row.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise Malformed(f"field '{name}' is {value!r:.60}; expected an object of numbers") from error
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(
        one is None or isinstance(one, int | float) and abs(one) <= sys.float_info.max for one in value.values()
    ):
        raise Malformed(f"field '{name}' is {value!r:.60}; expected an object of finite numbers")
    return value
