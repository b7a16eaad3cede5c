"""Running the program of an agent task: a Python function, or a command in any language."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import math
import numbers
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lmrl.agents.client import Dispatch, client_for
from lmrl.coroutines import call_user, in_thread, is_async, watched
from lmrl.errors import PluginError
from lmrl.plugins.loading import load_plugin
from lmrl.tools.functions import load_tools
from lmrl.tools.loop import LoopOptions, ToolLoop
from lmrl.trajectories.trajectory import LARGEST_REWARD, is_reward

LAST_BYTES = 65536
"""Bytes kept from the end of a command's output."""


@dataclass(frozen=True)
class Address:
    """The address and key for an episode's requests."""

    base_url: str
    key: str
    timeout: float | None = None
    dispatch: Dispatch | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of an episode's program: a reward, measurements, and its answer as text."""

    reward: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    answer: str | None = None


class ProgramFailed(Exception):
    """A command ended with an error."""


class Program:
    """Runs once per episode."""

    name: str

    async def run(self, row: dict[str, Any], address: Address) -> Outcome:
        raise NotImplementedError


class Function(Program):
    """`solve(row, client, **options)`, plain or async; returns a reward, a dict with `reward` and measurements, or
    text."""

    def __init__(self, name: str, options: dict[str, Any], call: Any = None):
        """call: the function called `name`, if it is known."""
        self.name, self.options = name, options
        self.call: Callable[..., Any] = load_plugin(name, "task.agent") if call is None else call
        if not callable(self.call):
            raise PluginError(f"task.agent: '{name}' is not a function: def solve(row, client)")
        try:
            inspect.signature(self.call).bind({}, None, **options)
        except TypeError as error:
            raise PluginError(
                f"task.agent: '{name}' cannot be called with a row, a client and task.options: {error}"
            ) from error
        except ValueError:
            pass  # written in C
        self.awaits_client = is_async(inspect.unwrap(self.call))

    async def run(self, row: dict[str, Any], address: Address) -> Outcome:
        # Behind a plain decorator, an async function may run in a loop of its own, which the server does not share.
        dispatch = address.dispatch if is_async(self.call) else None
        client = client_for(self.awaits_client, address.base_url, address.key, address.timeout, dispatch)
        options = copy.deepcopy(self.options)
        try:
            if self.awaits_client:
                return outcome_of(await call_user(self.call, row, client, **options))
            # A coroutine that it returns is refused: with the synchronous client it would block this loop.
            return outcome_of(await in_thread(lambda: self.call(row, client, **options)))
        finally:
            with suppress(RuntimeError):  # its connections belong to a loop of the program's own, which has ended
                closed = client.close()
                if inspect.isawaitable(closed):
                    await closed


class Command(Program):
    """A process: it is given the row as JSON on its standard input, and the address in OPENAI_BASE_URL and
    OPENAI_API_KEY.

    The last line that it prints is the reward, or JSON with `reward` and measurements. It runs in its own temporary
    folder, and is killed when its time is over; its children are killed with it, or when it ends.
    """

    def __init__(self, command: list[str]):
        self.command, self.name = command, " ".join(command)
        if shutil.which(command[0]) is None:
            raise PluginError(f"task.agent_command: '{command[0]}' is not a program on this machine")

    async def run(self, row: dict[str, Any], address: Address) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="lmrl-agent-") as folder:
            process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd=folder,
                env=os.environ | {"OPENAI_BASE_URL": address.base_url, "OPENAI_API_KEY": address.key},
                start_new_session=True,
            )

            def kill() -> None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)

            def kill_children() -> None:  # that it has left behind, and that hold its output open
                if process.returncode is not None:
                    kill()

            try:
                assert process.stdin is not None
                work = asyncio.gather(_tail(process.stdout), _tail(process.stderr), _write_input(process.stdin, row))
                out, errors, _ = await watched(work, kill_children)
                code = await process.wait()
            finally:
                kill()
                await process.wait()
        if code:
            said = errors.strip().splitlines()[-1:] or ["it wrote no error message"]
            how = f"ended with exit code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
            raise ProgramFailed(f"the command {how}: {said[0]}")
        return last_line(out)


async def _tail(stream: asyncio.StreamReader | None) -> str:
    assert stream is not None
    kept = b""
    while part := await stream.read(LAST_BYTES):
        kept = (kept + part)[-LAST_BYTES:]
    return kept.decode(errors="replace")


async def _write_input(stream: asyncio.StreamWriter, row: dict[str, Any]) -> None:
    with suppress(ConnectionError):  # it need not read its input
        stream.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")
        await stream.drain()
    stream.close()


def last_line(text: str) -> Outcome:
    """The outcome in a command's output. Raises ValueError if there is none."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return Outcome()
    try:
        return outcome_of(json.loads(lines[-1]))
    except json.JSONDecodeError:
        return Outcome(answer=lines[-1].strip())


def outcome_of(value: Any) -> Outcome:
    """The checked result of a program. Raises TypeError or ValueError."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if inspect.iscoroutine(value):
        value.close()
        raise TypeError(
            "it returned a coroutine that nothing awaits: write `async def`, and functools.wraps in decorators"
        )
    if value is None or isinstance(value, str):
        return Outcome(answer=value)
    if isinstance(value, dict):
        given = dict(value)
        reward, answer = given.pop("reward", None), given.pop("answer", None)
        if answer is not None and not isinstance(answer, str):
            raise TypeError(f"it returned the answer {answer!r:.60}; expected text")
        metrics = {str(name): _number(one, f"'{name}'") for name, one in given.items()}
        return Outcome(None if reward is None else _reward(reward, "'reward'"), metrics, answer)
    return Outcome(_reward(value, "the reward"))


def _reward(value: Any, what: str) -> float:
    number = _number(value, what)
    if not is_reward(number):
        raise ValueError(f"{what} is {number}; expected at most {LARGEST_REWARD:g} in size")
    return number


def _number(value: Any, what: str) -> float:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise TypeError(f"{what} is {value!r:.60} ({type(value).__name__}); expected a finite number")
    return float(value)


def load_program(section: Any) -> Program:
    """The program of a recipe's agent task. Raises PluginError."""
    if section.agent_command is not None:
        return Command(resolved(section.agent_command))
    if section.tools:
        return Function("task.tools", {}, tool_loop(section.tools, section.options))
    return Function(section.agent, dict(section.options))


def tool_loop(tools: list[Any], options: dict[str, Any]) -> ToolLoop:
    """The agent that runs the tools of a recipe. Raises PluginError."""
    found = load_tools(tools)
    try:
        return ToolLoop(found, LoopOptions.model_validate(options))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("task.options", *first["loc"])))
        what = first["msg"].removeprefix("Value error, ")
        raise PluginError(
            f"{place}: {what}; the loop of task.tools has {', '.join(LoopOptions.model_fields)}"
        ) from error


def resolved(command: list[str]) -> list[str]:
    """A command with the paths of its relative files made absolute, because it runs in a temporary folder."""
    return [str(Path(part).resolve()) if "/" in part and Path(part).is_file() else part for part in command]
