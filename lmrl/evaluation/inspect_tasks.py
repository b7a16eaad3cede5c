"""Tasks of inspect_ai as suites, `inspect:TASK`: its data, solvers, tools and scorers, calling lmrl's policy at a local
address.

Imported only if such a suite is named: it needs the extra `inspect`.
"""

from __future__ import annotations

import asyncio
import math
import numbers
import re
import secrets
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import inspect_ai
from inspect_ai.log import EvalLog, EvalSample
from inspect_ai.model import get_model
from inspect_ai.scorer import value_to_float

from lmrl.coroutines import run
from lmrl.engines.base import Sampling
from lmrl.engines.build import build_engine
from lmrl.errors import RecipeError, RunError, counted
from lmrl.evaluation.bridges import INSPECT, InspectOptions
from lmrl.evaluation.scoring import Scores
from lmrl.evaluation.statistics import summarize
from lmrl.policy.policy import Policy
from lmrl.recipe import Rollouts
from lmrl.secrets import redact
from lmrl.serve.app import App, AppLimits
from lmrl.serve.endpoint import endpoint
from lmrl.serve.http import Limits
from lmrl.serve.model import ServedPolicy
from lmrl.trajectories.trajectory import Trajectory, Turn

SERVICE = "lmrl"
"""The service's name in inspect_ai's names of models."""
LIMITS = Limits(body_bytes=64 * 2**20, connections=4096, grace_seconds=0)
SECONDS = 3600.0
"""Time limit of an answer."""
MEANS = ("accuracy", "mean")
"""Metrics of inspect_ai that are the mean over samples."""
ERRORS = ("stderr", "bootstrap_stderr", "std", "var")
"""Metrics about the spread of samples, which lmrl's intervals replace."""


def run_inspect(
    policy: Policy, name: str, task: str, options: InspectOptions, log: Path | None = None
) -> tuple[Scores, list[Trajectory], str]:
    """Scores of a task, its samples as episodes, and a description of what was played. name: of the policy. log: a
    folder for its log.

    Raises RecipeError for an unknown task, RunError for one that fails.
    """
    engine = build_engine(Rollouts(engine=options.engine, max_new_tokens=options.max_tokens), policy)
    served_name = re.sub(r"[^\w.-]+", "-", name).strip("-") or "policy"
    sampling = {"temperature": options.temperature, "seed": options.seed}
    with ExitStack() as stack:
        stack.callback(engine.close)
        served = ServedPolicy(policy, engine, Sampling(options.max_tokens), served_name)
        key = secrets.token_urlsafe(24)
        port = stack.enter_context(serving(App(served, [key], AppLimits(1_000_000, SECONDS))))
        folder = str(log) if log else stack.enter_context(tempfile.TemporaryDirectory(prefix="lmrl-inspect-"))
        model = get_model(
            f"openai-api/{SERVICE}/{served_name}",
            base_url=f"http://127.0.0.1:{port}/v1",
            api_key=key,
            memoize=False,
        )
        try:
            logs = inspect_ai.eval(
                task,
                model=model,
                task_args=options.args,
                limit=options.limit,
                epochs=options.samples,
                log_dir=folder,
                display="none",
                max_connections=options.connections,
                **{setting: value for setting, value in sampling.items() if value is not None},
            )
        except Exception as error:  # an error in the user's file, or an unknown name
            raise RecipeError(f"--suite {INSPECT}{task}: {redact(' '.join(str(error).split()))[:300]}") from error
        if len(logs) != 1:
            raise RecipeError(f"--suite {INSPECT}{task}: it names {len(logs)} tasks, name one: FILE.py@TASK")
        if logs[0].status != "success":
            why = " ".join(logs[0].error.message.split()) if logs[0].error else logs[0].status
            raise RunError(f"--suite {INSPECT}{task}: inspect_ai could not finish it: {redact(why)[:300]}")
        if unknown := sorted(set(options.args) - set(logs[0].eval.task_args)):
            known = ", ".join(logs[0].eval.task_args) or "none"
            raise RecipeError(f"args: {INSPECT}{task} has no argument '{unknown[0]}'; it has {known}")
        trajectories = list(episodes_of(logs[0]))  # samples are read lazily from the log's file
    played = f"{counted(len(trajectories), 'sample')} of {logs[0].eval.task}, by inspect_ai {inspect_ai.__version__}"
    return scores_of(trajectories, logs[0]), trajectories, played


@contextmanager
def serving(app: App) -> Iterator[int]:
    """Serve the app from a separate thread inside the block; yields the port."""
    ready = threading.Event()
    found: dict[str, Any] = {}

    async def serve() -> None:
        found["loop"], found["stop"] = asyncio.get_running_loop(), asyncio.Event()
        async with endpoint(app, LIMITS) as port:
            found["port"] = port
            ready.set()
            await found["stop"].wait()

    def body() -> None:
        try:
            run(serve())
        except BaseException as error:
            found["error"] = error
        finally:
            ready.set()

    thread = threading.Thread(target=body, name="lmrl-serve", daemon=True)
    thread.start()
    ready.wait()
    if "error" in found:
        raise found["error"]
    try:
        yield found["port"]
    finally:
        found["loop"].call_soon_threadsafe(found["stop"].set)
        thread.join()


# ---------------------------------------------------------------------------------------------------------------- results
def episodes_of(log: EvalLog) -> Iterator[Trajectory]:
    """Every sample as an episode, whose components are its scores; those of the same input share a group."""
    groups: dict[Any, int] = {}
    for number, sample in enumerate(log.samples or ()):
        group = groups.setdefault(sample.id, len(groups))
        components = dict(_values(sample))
        turns = list(_turns(sample))
        yield Trajectory(
            [],
            turns[0].observation if turns and isinstance(turns[0].observation, str) else _text(sample.input),
            sample.output.completion,
            reward=next(iter(components.values()), None),
            components=components,
            columns={"id": sample.id, "epoch": sample.epoch, "target": sample.target, **sample.metadata},
            group=group,
            episode=number,
            turns=turns,
        )


def _values(sample: EvalSample) -> Iterator[tuple[str, float | None]]:
    to_float = value_to_float()
    for scorer, score in (sample.scores or {}).items():
        value = score.value
        if isinstance(value, Mapping):
            named = {f"{scorer}/{name}": one for name, one in value.items()}
        elif isinstance(value, Sequence) and not isinstance(value, str):
            named = {f"{scorer}/{place}": one for place, one in enumerate(value)}
        else:
            named = {scorer: value}
        for name, one in named.items():
            number = None if one is None else float(to_float(one))
            yield name, None if number is None or math.isnan(number) else number


def _turns(sample: EvalSample) -> Iterator[Turn]:
    seen: list[str] = []
    for message in sample.messages:
        if message.role == "assistant":
            calls = [f"{call.function}({call.arguments})" for call in message.tool_calls or ()]
            yield Turn("\n".join(seen), "\n".join([*([message.text] if message.text else []), *calls]))
            seen = []
        else:
            seen.append(message.text)


def _text(given: Any) -> str:
    return given if isinstance(given, str) else "\n".join(message.text for message in given)


def scores_of(trajectories: Sequence[Trajectory], log: EvalLog) -> Scores:
    """Means over samples with lmrl's intervals, and inspect_ai's other metrics as they are, without one."""
    scores: Scores = {}
    for name in dict.fromkeys(name for one in trajectories for name in one.components):
        held = [(one.components[name], one.group) for one in trajectories if one.components.get(name) is not None]
        if held:
            values, groups = zip(*held, strict=True)
            scores[name] = summarize([float(value) for value in values if value is not None], groups, unit="sample")
    for found in log.results.scores if log.results else ():
        for metric, one in found.metrics.items():
            mean = scores.get(found.name)
            same = metric in MEANS and mean is not None and math.isclose(one.value, mean["mean"], abs_tol=1e-9)
            if same or metric in ERRORS or not isinstance(one.value, numbers.Real):
                continue
            value, count = float(one.value), len(trajectories)
            scores[f"{found.name}/{metric}"] = {
                "mean": value,
                "ci95": [value, value],
                "n": count,
                "clusters": len({trajectory.group for trajectory in trajectories}),
                "holds_for": "these samples alone",
            }
    return scores
