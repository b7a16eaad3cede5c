"""Rows of logged data, and the trajectories they stand for.

lmrl's own format has one row an episode, the same in Parquet and JSONL:

    turns              [{"observation", "action", "reward", "cut"}]; cut: the action ran into the token limit
                       in a dialogue also, where they are needed: "messages", the observation as messages, and
                       "message", an action that calls tools
    prompt_messages    the first observation as [{"role", "content"}], where it is a dialogue, else null
    final_observation  of a truncated episode: what would have come next
    terminated         false: truncated by a limit
    reward             the return; null: not judged
    metrics components objects of numbers (in Parquet as JSON text), of the environment and of the reward functions
    failure            why the episode could not be judged, or null
    columns            further columns of the prompt, for reward functions (in Parquet as JSON text), or null
    group episode      episodes of a group began alike
    seed start         what the environment's reset was given: seed, and options["start"] (null: drawn by the seed)
    player             who played
    tokenizer          fingerprint of the tokenizer of ...
    segments           [{"tokens", "turns", "logprobs", "rewards"}], as in `Segment`; null: only the text is known

Only `turns` with `observation` and `action` have to be there. Formats that other tools write are recognised by their
fields:

    prompt, completion   text or messages; `reward`, a number, may be missing
    messages             a chat, every assistant message an action; `reward` for all of it, or `rewards` for each action.
                         Between two actions stands one observation: several messages of the user are joined; those
                         of tools stay messages. An assistant message may have `tool_calls`.
    chosen, rejected     two episodes with rewards 1 and -1; without `prompt` it is what both begin with
    text                 text of which every token is an action, after the token that opens a text
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from dataclasses import replace
from os.path import commonprefix
from typing import Any

from lmrl.trajectories.files import Malformed, Row, take
from lmrl.trajectories.recorder import Recorder
from lmrl.trajectories.render import Renderer
from lmrl.trajectories.trajectory import (
    CONTEXT,
    Messages,
    Segment,
    Trajectory,
    Turn,
    as_messages,
    prompt_text,
    transcript,
)

ROLES = ("system", "developer", "user", "assistant", "tool")
HH_MARKER = "\n\nAssistant:"
"""Where the prompt ends in the text of Anthropic's HH-RLHF."""


def fingerprint(tokenizer: Any) -> str:
    """A short hash of vocabulary and special tokens: tokenizers that share it give tokens the same meaning."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    return hashlib.blake2b(json.dumps([vocabulary, special]).encode(), digest_size=8).hexdigest()


def prompt_of(row: Row, column: str = "prompt") -> str | Messages:
    """The prompt in a row's column. Without that column: of preference data what chosen and rejected begin with, of a chat what comes
    before the first answer, and of plain text all of it, which names the row."""
    if row.get(column) is None:
        if {"chosen", "rejected"} <= set(row):
            return preference(row)[0]
        if row.get("messages") is not None:
            return _chat(row, 0).turns[0].observation
        if row.get("text") is not None:
            return str(take(row, "text", str))
    found: str | Messages = take(row, column, str, list)
    return found


# --------------------------------------------------------------------------------------------------------------- writing
def to_row(trajectory: Trajectory, tokenizer: str | None = None) -> Row:
    """A trajectory in lmrl's own format; tokens are written where the fingerprint of their `tokenizer` is given."""
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
        "segments": None if tokenizer is None else [dict(vars(segment)) for segment in trajectory.segments],
    }


def prompts_of(trajectory: Trajectory) -> list[str | Messages]:
    """What the policy answered: the prompt, and in a dialogue all of it up to each later turn."""
    first = trajectory.turns[0].observation
    prompts = [first]
    if is_dialogue(trajectory):
        dialogue = as_messages(first)
        for turn, following in zip(trajectory.turns, trajectory.turns[1:], strict=False):
            said = turn.message or {"role": "assistant", "content": turn.action}
            dialogue = [*dialogue, said, *as_messages(following.observation)]
            prompts.append(dialogue)
    return prompts


# --------------------------------------------------------------------------------------------------------------- reading
def from_row(row: Row, renderer: Renderer, history: int | str = "all", number: int = 0) -> list[Trajectory]:
    """The episodes of a row of any format: one, or two of chosen and rejected.

    Stored tokens of the renderer's tokenizer are taken as they are; otherwise the text is rendered and tokenised as the
    sampler does it (`history`: see Recorder), and log-probabilities are unknown. Raises Malformed.
    """
    return [render(one, renderer, history) for one in parse(row, number, fingerprint(renderer.tokenizer))]


def parse(row: Row, number: int = 0, tokenizer: str | None = None) -> list[Trajectory]:
    """The episodes of a row as text, checked; `segments` are empty unless the row holds tokens of this `tokenizer`.

    number: the row's, for its group and episode. Raises Malformed with field and what was expected.
    """
    present = {name for name, value in row.items() if value is not None}
    if "turns" in present:
        return [_own(row, number, tokenizer)]
    if "chosen" in present or "rejected" in present:
        return _preference(row, number)
    if "messages" in present and "completion" not in present:
        return [_chat(row, number)]
    if "prompt" in present or "completion" in present:
        return [_completion(row, number)]
    if "text" in present:
        return [_episode(row, [Turn("", _not_empty(take(row, "text", str), "text"))], number)]
    raise Malformed(
        f"is of no known format (fields: {', '.join(row)}); expected turns, prompt and completion, messages, chosen and "
        "rejected, or text"
    )


def render(trajectory: Trajectory, renderer: Renderer, history: int | str = "all") -> Trajectory:
    """Fill the segments of an episode that is known as text. One that has its tokens is returned as it is."""
    if trajectory.segments or not trajectory.turns:
        return trajectory
    if is_dialogue(trajectory) and not renderer.chat:
        renderer = copy.copy(renderer)
        renderer.chat = True
    rendered = replace(trajectory, segments=[], turns=[], cut_turns=[])
    recorder = Recorder(rendered, renderer, history)
    for number, turn in enumerate(trajectory.turns):
        recorder.observe(turn.observation)
        cut = number in trajectory.cut_turns
        if turn.message:
            tokens = renderer.call(turn.message)
        else:
            tokens = (renderer.plain(turn.action) if cut else []) or renderer.action(turn.action)
        if not tokens:
            raise Malformed(
                f"turn {number} has an empty action, and the tokenizer no end-of-sequence token to stand for it"
            )
        recorder.act(turn.action, tokens, cut=cut, message=turn.message)
        rendered.place_reward(turn.reward, number)
    if trajectory.final_observation is not None:
        recorder.truncate(trajectory.final_observation)
    return rendered


def is_dialogue(trajectory: Trajectory) -> bool:
    """Whether there are messages, which only a chat template can render."""
    return any(not isinstance(turn.observation, str) or turn.message for turn in trajectory.turns)


# ------------------------------------------------------------------------------------------------------------ own format
def _own(row: Row, number: int, tokenizer: str | None) -> Trajectory:
    given = take(row, "turns", list)
    if not given and row.get("failure") is None:
        raise Malformed("field 'turns' is empty; expected at least one turn")
    turns, rewards, cut_turns = [], [], []
    for index, turn in enumerate(given):
        turn = _turn(turn, index)
        turns.append(Turn(_observation(turn, index), turn["action"], message=_call(turn, index)))
        rewards.append(turn.get("reward"))
        if turn.get("cut"):
            cut_turns.append(index)
    if turns and row.get("prompt_messages") is not None:
        turns[0].observation = _messages(row, "prompt_messages")
    trajectory = _episode(row, turns, number, None if all(reward is None for reward in rewards) else rewards)
    trajectory.cut_turns = cut_turns
    trajectory.group = _optional(row, "group", int, number)
    trajectory.episode = _optional(row, "episode", int, number)
    trajectory.seed, trajectory.start = _optional(row, "seed", int), _optional(row, "start", int)
    trajectory.player = _optional(row, "player", str)
    trajectory.terminated = _optional(row, "terminated", bool, True)
    trajectory.components = _numbers(row, "components")
    trajectory.metrics = _numbers(row, "metrics")
    trajectory.failure = _optional(row, "failure", str)
    columns = json_of(row, "columns")
    if columns is not None and not isinstance(columns, dict):
        raise Malformed(f"field 'columns' is {columns!r:.60}; expected an object")
    trajectory.columns = columns or {}
    if not trajectory.terminated:
        trajectory.final_observation = _optional(row, "final_observation", str)
    segments = _segments(row, len(turns))
    if segments and tokenizer is not None and row.get("tokenizer") == tokenizer:
        trajectory.segments = segments
    return trajectory


def _turn(turn: Any, index: int) -> Row:
    if not isinstance(turn, dict):
        raise Malformed(f"field 'turns', turn {index} is {turn!r:.60}; expected an object with observation and action")
    try:
        take(turn, "observation", str)
        take(turn, "action", str)
        _number(turn, "reward")
        _optional(turn, "cut", bool)
    except Malformed as error:
        raise Malformed(f"field 'turns', turn {index}: {error}") from error
    return turn


def _observation(turn: Row, index: int) -> str | Messages:
    messages = json_of(turn, "messages")
    return turn["observation"] if messages is None else checked_messages(messages, f"turns.{index}.messages")


def _call(turn: Row, index: int) -> dict[str, Any] | None:
    message = json_of(turn, "message")
    return None if message is None else checked_message(message, f"turns.{index}.message")


def json_of(row: Row, name: str) -> Any:
    """A field that Parquet holds as JSON text."""
    if not isinstance(row.get(name), str):
        return row.get(name)
    try:
        return json.loads(row[name])
    except json.JSONDecodeError as error:
        raise Malformed(f"field '{name}' is {row[name]!r:.60}; expected JSON") from error


def _segments(row: Row, turns: int) -> list[Segment]:
    if row.get("segments") is None:
        return []
    segments = []
    for index, segment in enumerate(take(row, "segments", list)):
        where = f"field 'segments', segment {index}"
        names = ("tokens", "turns", "logprobs", "rewards")
        if not isinstance(segment, dict) or any(not isinstance(segment.get(name), list) for name in names):
            raise Malformed(f"{where} is {segment!r:.60}; expected an object with the lists {', '.join(names)}")
        lists = [segment[name] for name in names]
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
        segments.append(Segment(*map(list, lists)))
    return segments


def _numbers(row: Row, name: str) -> dict[str, float | None]:
    value = row.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise Malformed(f"field '{name}' is {value!r:.60}; expected an object of numbers") from error
    if value is None:
        return {}
    if not isinstance(value, dict) or any(not isinstance(one, int | float | None) for one in value.values()):
        raise Malformed(f"field '{name}' is {value!r:.60}; expected an object of numbers")
    return value


# --------------------------------------------------------------------------------------------------------- other formats
def _completion(row: Row, number: int) -> Trajectory:
    prompt, completion = _text_or_messages(row, "prompt"), _text_or_messages(row, "completion")
    if isinstance(completion, str):
        return _episode(row, [Turn(prompt, _not_empty(completion, "completion"))], number)
    turns, _ = _dialogue(completion, "completion", as_messages(prompt))
    if isinstance(prompt, str) and turns[0].observation == as_messages(prompt):
        turns[0].observation = prompt  # whether text goes through the chat template is the task's to say
    return _episode(row, turns, number)


def _chat(row: Row, number: int) -> Trajectory:
    turns, trailing = _dialogue(_messages(row, "messages"), "messages", [])
    rewards = None
    if row.get("rewards") is not None:
        rewards = take(row, "rewards", list)
        if len(rewards) != len(turns):
            raise Malformed(f"field 'rewards' has {len(rewards)} numbers for {len(turns)} assistant messages")
        rewards = [_finite(reward, "rewards") for reward in rewards]
        row = row | {"reward": math.fsum(rewards) if row.get("reward") is None else row["reward"]}
    trajectory = _episode(row, turns, number, rewards)
    trajectory.terminated = _optional(row, "terminated", bool, True)
    if trailing and not trajectory.terminated:
        trajectory.final_observation = _observed(trailing)
    return trajectory


def _preference(row: Row, number: int) -> list[Trajectory]:
    prompt, *answers = preference(row)
    episodes = []
    for side, (answer, reward) in enumerate(zip(answers, (1.0, -1.0), strict=True)):
        name = ("chosen", "rejected")[side]
        turns = [Turn(prompt, answer)] if isinstance(answer, str) else _dialogue(answer, name, as_messages(prompt))[0]
        episode = _episode({"reward": reward}, turns, number)
        episode.episode = 2 * number + side
        episodes.append(episode)
    return episodes


def preference(row: Row) -> tuple[str | Messages, str | Messages, str | Messages]:
    """Prompt, chosen and rejected completion of a row: all text, or all messages. Raises Malformed."""
    chosen, rejected = _text_or_messages(row, "chosen"), _text_or_messages(row, "rejected")
    prompt = None if row.get("prompt") is None else _text_or_messages(row, "prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            prompt = common_prompt(chosen, rejected)
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return prompt, _not_empty(chosen, "chosen"), _not_empty(rejected, "rejected")
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise Malformed("fields 'chosen' and 'rejected' differ in kind; expected text in both, or messages in both")
    shared = common_messages(chosen, rejected)
    stated = [] if prompt is None else as_messages(prompt)
    opening = shared if all(message in shared for message in stated) else stated + shared
    return opening, chosen[len(shared) :], rejected[len(shared) :]


def common_prompt(chosen: str, rejected: str) -> str:
    """What both texts begin with, cut back to the last HH_MARKER, else to before the last white space."""
    shared = commonprefix([chosen, rejected])
    marker = shared.rfind(HH_MARKER)
    if marker >= 0:
        return shared[: marker + len(HH_MARKER)]
    return shared[: max((at for at, letter in enumerate(shared) if letter.isspace()), default=0)]


def common_messages(chosen: Messages, rejected: Messages) -> Messages:
    """The messages that both begin with; each keeps at least its last for itself."""
    pairs = list(zip(chosen[:-1], rejected[:-1], strict=False))
    same = next((at for at, (one, other) in enumerate(pairs) if one != other), len(pairs))
    return chosen[:same]


def _dialogue(messages: Messages, name: str, opening: Messages) -> tuple[list[Turn], Messages]:
    """Turns of a chat that goes on from `opening`, and the messages after the last action."""
    turns: list[Turn] = []
    context = list(opening)
    for message in messages:
        if message["role"] != "assistant":
            context.append(message)
            continue
        if not context:
            place = "two assistant messages in a row" if turns else "an assistant message first"
            raise Malformed(f"field '{name}' has {place}; expected a message that it answers in between")
        action = _not_empty(said_text(message), name)
        observation = _observed(context) if turns else context
        turns.append(Turn(observation, action, message=message if message.get("tool_calls") else None))
        context = []
    if not turns:
        raise Malformed(f"field '{name}' has no assistant message; expected at least one")
    return turns, context


def _observed(messages: Messages) -> str | Messages:
    """What comes between two actions: the user's words as one text, results of tools as messages."""
    if any(message["role"] != "user" for message in messages):
        return messages
    return "\n\n".join(message["content"] for message in messages)


def said_text(message: dict[str, Any]) -> str:
    """An assistant message for people: what it says, and a line of JSON for each call of a tool."""
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join([*([message["content"]] if message["content"] else []), *calls])


# --------------------------------------------------------------------------------------------------------------- helpers
def _episode(row: Row, turns: list[Turn], number: int, rewards: list[float | None] | None = None) -> Trajectory:
    """What all formats share. rewards: of each turn; without them `reward` of the row falls in the last turn."""
    total = _number(row, "reward")
    if rewards is not None:
        for turn, reward in zip(turns, rewards, strict=True):
            turn.reward = 0.0 if reward is None else float(reward)
        earned = math.fsum(turn.reward for turn in turns)
        if total is not None and not math.isclose(total, earned, rel_tol=1e-6, abs_tol=1e-6):
            raise Malformed(f"field 'reward' is {total}, but its turns earned {earned} together; expected the same")
        if total is None and "reward" not in row:
            total = earned
    elif turns and total is not None:
        turns[-1].reward = total
    return Trajectory(
        [],
        prompt_text(turns[0].observation) if turns else "",
        transcript(turns),
        reward=total,
        group=number,
        episode=number,
        messages=turns[0].observation if turns and isinstance(turns[0].observation, list) else None,
        turns=turns,
    )


def _optional(row: Row, name: str, kind: type, default: Any = None) -> Any:
    return default if row.get(name) is None else take(row, name, kind)


def _number(row: Row, name: str) -> float | None:
    return None if row.get(name) is None else _finite(row[name], name)


def _finite(value: Any, name: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            if math.isfinite(value):
                return float(value)
        except OverflowError:
            pass
    raise Malformed(f"field '{name}' holds {value!r:.60}; expected a finite number")


def _not_empty(text: str, name: str) -> str:
    if not text:
        raise Malformed(f"field '{name}' is empty after the prompt; expected text")
    return text


def _text_or_messages(row: Row, name: str) -> str | Messages:
    return row[name] if isinstance(take(row, name, str, list), str) else _messages(row, name)


def _messages(row: Row, name: str) -> Messages:
    return checked_messages(take(row, name, list), name)


def checked_messages(messages: list[Any], name: str) -> Messages:
    """Messages with what chat templates read of them. Raises Malformed."""
    if not messages:
        raise Malformed(f"field '{name}' is empty; expected messages")
    return [checked_message(message, name) for message in messages]


def checked_message(message: Any, name: str) -> dict[str, Any]:
    """A message with what chat templates read of it: a call of tools may be without content. Raises Malformed."""
    given = message if isinstance(message, dict) else {}
    role, content, calls = given.get("role"), given.get("content"), json_of(given, "tool_calls")
    if calls and content is None:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise Malformed(f"field '{name}' holds {message!r:.60}; expected messages with text in 'role' and 'content'")
    if role not in ROLES:
        raise Malformed(f"field '{name}' has a message of the role {role!r:.40}; expected one of {', '.join(ROLES)}")
    if calls and role != "assistant":
        raise Malformed(f"field '{name}' has 'tool_calls' in a message of the role '{role}'; expected 'assistant'")
    others = {key: given[key] for key in ("name", "tool_call_id") if isinstance(given.get(key), str)}
    return {"role": role, "content": content} | ({"tool_calls": _checked_calls(calls, name)} if calls else {}) | others


def _checked_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Calls of tools, with arguments as objects: templates write these out as JSON themselves."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Malformed(
                f"field '{name}' has the tool call {call!r:.60}; expected an object with function.name and "
                "function.arguments"
            )
        arguments = json_of(function, "arguments")
        if not isinstance(arguments, dict):
            raise Malformed(f"field '{name}' has the tool arguments {arguments!r:.60}; expected an object")
        found.append({"type": "function"} | call | {"function": function | {"arguments": arguments}})
    return found
