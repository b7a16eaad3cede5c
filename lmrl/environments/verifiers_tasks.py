"""Tasksets of verifiers (https://github.com/PrimeIntellect-ai/verifiers, from 0.4 on) by name: `environment:
verifiers:TASKSET`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from importlib import import_module, metadata
from itertools import islice
from typing import Any

from lmrl.coroutines import run
from lmrl.environments.base import TextEnvironment
from lmrl.errors import PluginError

SAMPLED = 200
"""How many prompts the vocabulary is taken from."""


class VerifiersTasks(TextEnvironment):
    """Single-answer tasks, scored by the taskset's own rewards and judges; its rewards and metrics are reported as
    metrics by name.

    id: an installed taskset. size: how many tasks to take from an endless one. Further keys are the taskset's own.
    Tasks that need tools, a sandbox or a conversation are refused: verifiers runs these as programs, which an agent
    task plays (`task.agent`).
    """

    def __init__(self, id: str, size: int = 500, **options: Any):
        try:
            v1, loaders = import_module("verifiers.v1"), import_module("verifiers.v1.utils.loaders")
        except ImportError as error:
            raise PluginError(
                f"task.environment: verifiers cannot be imported ({error}): pip install -e '.[verifiers]'"
            ) from error
        try:
            cls = loaders.taskset_class(id)
        except ModuleNotFoundError as error:
            raise PluginError(f"task.environment: verifiers has no taskset '{id}': {error}") from error
        config = config_of(cls, v1.TasksetConfig).model_validate({"id": id, **options})
        taskset = cls(config)
        if not issubclass(loaders.environment_class(id), v1.SingleAgentEnv) or cls.toolsets(config):
            raise PluginError(_program(id, "a conversation or tools of its own"))
        self.tasks = list(islice(taskset, size))
        if not self.tasks:
            raise PluginError(f"task.environment: verifiers' taskset '{id}' yields no tasks")
        for task in self.tasks:
            if needs := _needs(task, v1.Task):
                raise PluginError(_program(id, needs))
        self.num_starts = len(self.tasks)
        self.version = f"verifiers {metadata.version('verifiers')}"

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(len(self.tasks)))
        self.task = self.tasks[(options or {}).get("start", drawn)]
        return prompt_of(self.task.data), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        trace = _trace(self.task, action)
        run(self.task.score(trace))
        named = {name: reward.score for name, reward in trace.rewards.items() if reward is not None}
        measured = {name: value for name, value in trace.metrics.items() if value is not None}
        return "", float(trace.reward), True, False, {"metrics": named | measured}

    def texts(self) -> Iterable[str]:
        return [text for task in self.tasks[:SAMPLED] for text in _texts(task.data.model_dump(mode="json"))]


def prompt_of(data: Any) -> str | list[dict[str, str]]:
    """A task's prompt: text, or messages if it has a system message or several messages."""
    messages = [] if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}]
    if isinstance(data.prompt, str):
        return [*messages, {"role": "user", "content": data.prompt}] if messages else data.prompt
    return messages + [{"role": one.role, "content": _text(one.content)} for one in data.prompt]


def config_of(cls: type, base: type) -> Any:
    """The class of a taskset's configuration."""
    return import_module("verifiers.v1.utils.generic").concrete_type(cls, base) or base


def _text(content: Any) -> str:
    return content if isinstance(content, str) else str(import_module("verifiers.v1.types").content_text(content))


def _trace(task: Any, answer: str) -> Any:
    """What verifiers would record of a rollout: the prompt's messages, and the answer as a sampled one."""
    v1, records = import_module("verifiers.v1"), import_module("verifiers.v1.trace")
    node = import_module("verifiers.v1.graph").MessageNode
    trace = records.Trace(
        task=records.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
        state=import_module("verifiers.v1.state").state_cls(type(task))(),
        agent=records.AgentInfo(config=v1.AgentConfig()),
    )
    prompt = prompt_of(task.data)
    kinds = {"system": v1.SystemMessage, "user": v1.UserMessage, "assistant": v1.AssistantMessage}
    for one in [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt:
        trace.nodes.append(node(parent=_last(trace), message=kinds[one["role"]](content=one["content"])))
    trace.nodes.append(node(parent=_last(trace), message=v1.AssistantMessage(content=answer), sampled=True))
    trace.is_completed = trace.ok = True
    return trace


def _last(trace: Any) -> int | None:
    return len(trace.nodes) - 1 if trace.nodes else None


def _needs(task: Any, base: type[Any]) -> str | None:
    """The first thing that a task needs besides one answer; None: nothing."""
    cls = type(task)
    if task.NEEDS_CONTAINER:
        return "a container"
    if cls.toolsets(task.config):
        return "tools"
    if cls.setup is not base.setup or cls.finalize is not base.finalize:
        return "a sandbox to set up"
    if task.data.prompt is None:
        return "a user who opens the conversation"
    for hook in [*task.hooks("reward"), *task.hooks("metric"), *(judge.score for judge in task.plugged_judges())]:
        wanted = inspect.signature(hook).parameters.get("runtime")
        if wanted is not None and wanted.default is inspect.Parameter.empty:
            return "a sandbox to be scored in"
    return None


def _program(id: str, needs: str) -> str:
    return (
        f"task.environment: verifiers' taskset '{id}' needs {needs}: play it as a program that calls the policy at an address, task.agent "
        "(see docs/agents.md)"
    )


def _texts(value: Any) -> list[str]:
    """The texts in JSON."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for one in inner for text in _texts(one)]
