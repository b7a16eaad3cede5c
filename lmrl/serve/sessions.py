"""Sessions: the policy's calls in one episode of a program, as tokens.

A call whose prompt continues an earlier call joins its segment. To find out, dialogues are compared as messages:
sampled tokens are kept as they are, and what follows them is rendered separately, so nothing is tokenised again,
however the chat template would render the history. A history that was rewritten, shortened or branched starts a new
segment.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lmrl.engines.base import Completion, Sampling
from lmrl.serve.answers import Choice
from lmrl.serve.model import ServedPolicy, TextStream
from lmrl.serve.requests import Ask, BadRequest
from lmrl.tools.formats import Tool
from lmrl.trajectories.trajectory import Messages, Segment, Trajectory, Turn, prompt_text, transcript


@dataclass
class Said:
    """A call that was answered."""

    number: int
    prompt: list[int]
    done: Completion
    observed_text: str
    """For a plain-text prompt: the new part."""
    messages: Messages | None
    tools: tuple[Tool, ...]
    message: dict[str, Any]
    """The answer, as the assistant's message."""
    text: str | None
    """Prompt and answer as text, if the prompt was text."""
    earlier: Said | None = None
    """The call that its prompt continues."""

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.done.tokens

    @property
    def observed(self) -> str | Messages:
        """The new part of the prompt."""
        if self.messages is None:
            return self.observed_text
        known = 0 if self.earlier is None or self.earlier.messages is None else len(self.earlier.messages) + 1
        return self.messages[known:]


@dataclass
class Thread:
    """Calls of one segment."""

    segment: Segment = field(default_factory=Segment)
    calls: list[Said] = field(default_factory=list)


class Session:
    """The calls of one episode. key: required of its requests. name: of its random streams. most: maximum calls."""

    def __init__(self, served: ServedPolicy, sampling: Sampling, name: tuple[int | str, ...], most: int | None = None):
        self.served, self.sampling, self.name, self.most = served, sampling, name, most
        self.id, self.key = secrets.token_hex(8), f"sk-lmrl-{secrets.token_urlsafe(24)}"
        self.calls: list[Said] = []
        self.refused: str | None = None
        """Why a call was refused."""
        self.begun = 0
        self.unfinished: set[TextStream] = set()
        """Answers of which the program was sent a part, and that have not ended."""
        self._asked: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.closed = False

    def close(self) -> None:
        """Accept no more calls, and cancel running ones, except the caller's own task."""
        self.closed = True
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()

    def sampling_of(self, ask: Ask) -> Sampling:
        """The sampling of a call: the recipe's, so that log-probabilities match those of training; the program may
        add stop strings and lower the limit."""
        limit = ask.sampling.max_new_tokens if ask.limited else self.sampling.max_new_tokens
        return replace(self.sampling, stop=ask.sampling.stop, max_new_tokens=min(limit, self.sampling.max_new_tokens))

    # ------------------------------------------------------------------------------------------------------------ calls
    def begin(self, completions: int) -> None:
        """Count calls that begin. Raises BadRequest for one too many."""
        if self.closed:
            raise BadRequest("this session has ended", code="session_ended", status=410)
        if self.most is not None and self.begun + completions > self.most:
            self.refused = f"requested more than task.max_calls={self.most} answers"
            raise BadRequest(f"this session {self.refused}", code="max_calls")
        self.begun += completions
        if task := asyncio.current_task():
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def prompt(self, ask: Ask, which: int = 0) -> tuple[list[int], Said | None]:
        """The tokens of a call's prompt, and the call that they continue."""
        if ask.messages is not None:
            earlier = self._earlier(ask.messages, ask.tools)
            if earlier is None or earlier.messages is None:
                return self.served.dialogue(ask.messages, ask.tools), None
            rest = ask.messages[len(earlier.messages) + 1 :]
            tokens = earlier.tokens
            return tokens + self.served.following(rest, ask.tools, tokens[-1], earlier.message), earlier
        prompt = ask.prompts[which]
        if isinstance(prompt, tuple):
            tokens = self.served.text(prompt)
            going_on = [one for one in self.calls if _extends(tokens, one.tokens)]
            return tokens, max(going_on, key=lambda one: len(one.tokens), default=None)
        texts = [
            (len(one.text), one)
            for one in self.calls
            if one.text is not None
            and one.done.finish_reason != "eos"
            and prompt.startswith(one.text)
            and len(prompt) > len(one.text)
        ]
        if not texts:
            return self.served.text(prompt), None
        length, earlier = max(texts, key=lambda pair: pair[0])
        return earlier.tokens + self.served.raw.plain(prompt[length:]), earlier

    def _earlier(self, messages: Messages, tools: tuple[Tool, ...]) -> Said | None:
        """The latest call whose dialogue and answer these messages begin with, unless another assistant message
        follows."""
        marks = [mark_of(message) for message in messages]
        found: Said | None = None
        for one in self.calls:
            if one.messages is None or one.tools != tools or len(one.messages) + 1 >= len(messages):
                continue
            known = [*map(mark_of, one.messages), mark_of(one.message)]
            same = marks[: len(known)] == known
            own = all(message["role"] != "assistant" for message in messages[len(known) :])
            if same and own and (found is None or len(one.messages) >= len(found.messages or ())):
                found = one
        return found

    def stream_key(self, tokens: Sequence[int]) -> tuple[int | str, ...]:
        """Name of the random stream of a call: from the episode, the prompt, and how often the prompt was sent before,
        so the order in which a program's concurrent calls arrive does not matter."""
        digest = hashlib.blake2b(json.dumps(list(tokens)).encode(), digest_size=12).hexdigest()
        self._asked[digest] += 1
        return (*self.name, f"{digest}-{self._asked[digest]}")

    def record(self, ask: Ask, which: int, choice: Choice, done: Completion, earlier: Said | None) -> None:
        """Record an answered call."""
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        message |= {"tool_calls": choice.calls} if choice.calls else {}
        text, observed = None, ""
        if ask.prompts:
            prompt = ask.prompts[which]
            if isinstance(prompt, str):
                text = prompt + self.served.tokenizer.decode(done.tokens)
                observed = prompt[len(earlier.text) :] if earlier is not None and earlier.text is not None else prompt
            else:
                known = 0 if earlier is None else len(earlier.tokens)
                observed = self.served.tokenizer.decode(list(prompt[known:]))
        self.calls.append(
            Said(
                len(self.calls),
                choice.prompt_ids,
                done,
                observed,
                ask.messages,
                ask.tools,
                message,
                text,
                earlier,
            )
        )

    # ------------------------------------------------------------------------------------------------------- trajectory
    def threads(self) -> list[Thread]:
        """The calls as segments: each call joins the longest segment whose tokens its prompt begins with."""
        threads: list[Thread] = []
        for call in self.calls:
            fitting = [thread for thread in threads if _extends(call.prompt, thread.segment.tokens)]
            thread = max(fitting, key=lambda one: len(one.segment.tokens), default=None)
            if thread is None:
                thread = Thread()
                threads.append(thread)
            thread.segment.observe(call.prompt[len(thread.segment.tokens) :])
            thread.segment.act(call.done.tokens, call.done.logprobs, call.number)
            thread.calls.append(call)
        # The latest answer comes last, because the episode's reward is placed there.
        return sorted(threads, key=lambda thread: thread.calls[-1].number)

    def write(self, trajectory: Trajectory) -> None:
        """Add the calls to a trajectory: segments, turns, and the first prompt. Turns are numbered in the order of the
        segments."""
        turn = 0
        for thread in self.threads():
            numbers = {}
            for place, call in enumerate(thread.calls):
                numbers[call.number] = turn
                if call.done.finish_reason == "length":
                    trajectory.cut_turns.append(turn)
                observed = call.observed if place else (call.messages or call.observed_text)
                message = call.message if call.message.get("tool_calls") else None
                trajectory.turns.append(Turn(observed, self._action(call), message=message))
                turn += 1
            segment = thread.segment
            segment.turns = [numbers.get(number, number) for number in segment.turns]
            trajectory.segments.append(segment)
        if self.calls:
            first = self.calls[0]
            trajectory.messages = first.messages
            trajectory.prompt = prompt_text(first.messages or first.observed_text)
            trajectory.version = min(call.done.version or 0 for call in self.calls)
        trajectory.completion = transcript(trajectory.turns)

    def _action(self, call: Said) -> str:
        """An answer as readable text, with its calls."""
        return (self.served.marked if call.message.get("tool_calls") else self.served.shown)(call.done.tokens)


def mark_of(message: dict[str, Any]) -> str:
    """A key that is equal for equal messages: role, text and calls count; call ids and surrounding white space do
    not."""
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]
    return json.dumps([message["role"], (message.get("content") or "").strip(), calls], sort_keys=True)


def _extends(tokens: Sequence[int], beginning: Sequence[int]) -> bool:
    return len(tokens) > len(beginning) and list(tokens[: len(beginning)]) == list(beginning)
