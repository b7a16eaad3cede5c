"""Playing an agent task: a program for each episode, run concurrently, and trajectories of their requests to the
policy."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmrl import distributed
from lmrl.agents.programs import Address, Outcome, Program
from lmrl.coroutines import run, watched
from lmrl.engines.base import Engine, Sampling
from lmrl.errors import RecipeError, first_of
from lmrl.policy.policy import Policy
from lmrl.recipe import SpecialTokens
from lmrl.secrets import redact
from lmrl.serve.app import SESSIONS, App, AppLimits
from lmrl.serve.endpoint import endpoint
from lmrl.serve.http import Limits
from lmrl.serve.model import ServedPolicy
from lmrl.serve.sessions import Session
from lmrl.trajectories.trajectory import Trajectory

LIMITS = Limits(body_bytes=64 * 2**20, connections=65536, grace_seconds=0)
MODEL = "policy"
"""Name of the model, for programs that ask for it; any other is served as well."""


@dataclass(frozen=True)
class Agent:
    """An agent task. rows: its data. workers: programs that run concurrently. max_calls: maximum answers per episode.

    seconds: time limit of an episode (None: none). rewarded: True if reward functions judge what the program returns.
    """

    program: Program
    rows: list[dict[str, Any]]
    workers: int
    max_calls: int
    seconds: float | None
    rewarded: bool
    special_tokens: SpecialTokens = "text"


def play_agents(
    agent: Agent,
    engine: Engine,
    starts: Sequence[int | None],
    samples: int,
    sampling: Sampling,
    name: tuple[int | str, ...],
    shared: bool = False,
    first: int = 0,
) -> list[Trajectory]:
    """`samples` episodes of each row, with the rewards that programs gave; arguments as for Sampler.play."""
    if not isinstance(engine.policy, Policy):
        raise RecipeError(
            "task: an agent's program needs a policy that is loaded here, but an address gives only text: name a model"
        )
    low, high = distributed.shard_bounds(len(starts)) if shared else (0, len(starts))
    trajectories, rows = [], []
    for group, start in enumerate(starts[low:high], start=first + low):
        for sample in range(samples):
            assert start is not None, "rows have numbers"
            row = agent.rows[start]
            trajectories.append(
                Trajectory([], "", "", group=group, episode=group * samples + sample, columns=row, start=start)
            )
            rows.append(row)
    if not engine.weights_pinned:
        engine.refresh()
    engine.forget()
    served = ServedPolicy(engine.policy, engine, sampling, MODEL, agent.special_tokens)
    try:
        run(watched(_play_all(agent, served, trajectories, rows, name), engine.check))
    finally:
        engine.forget()
    for trajectory in trajectories:
        if trajectory.version is None:
            trajectory.version = engine.syncs
    return trajectories


async def _play_all(
    agent: Agent,
    served: ServedPolicy,
    trajectories: list[Trajectory],
    rows: list[dict[str, Any]],
    name: tuple[int | str, ...],
) -> None:
    # An episode may request many answers at once: all of them are sampled, a few at a time.
    app = App(served, limits=AppLimits(1_000_000, agent.seconds or 1e9), open=False)
    places = asyncio.Semaphore(agent.workers)

    async with endpoint(app, LIMITS) as port:

        async def play(trajectory: Trajectory, row: dict[str, Any]) -> None:
            async with places:
                await _play(agent, app, port, trajectory, row, (*name, trajectory.episode))

        await asyncio.gather(*map(play, trajectories, rows))
    if app.broken is not None:
        raise app.broken


async def _play(
    agent: Agent, app: App, port: int, trajectory: Trajectory, row: dict[str, Any], name: tuple[int | str, ...]
) -> None:
    session = Session(app.served, app.served.sampling, name, agent.max_calls)
    app.sessions[session.id] = session
    address = Address(f"http://127.0.0.1:{port}{SESSIONS}{session.id}/v1", session.key, agent.seconds, app)
    limit = asyncio.timeout(agent.seconds)
    try:
        async with limit:
            outcome = await agent.program.run(copy.deepcopy(row), address)
        if mistake := problem(session, outcome, agent.rewarded):
            trajectory.failure = f"agent {mistake}"
        else:
            trajectory.reward, trajectory.metrics = outcome.reward, dict(outcome.metrics)
    except TimeoutError as error:
        over = f"timed out after {agent.seconds:g} s (task.call_timeout)" if limit.expired() else _raised(error)
        trajectory.failure = redact(f"agent {over}")
    except (Exception, SystemExit) as error:
        trajectory.failure = redact(f"agent {session.refused or _raised(error)}")
    finally:
        session.close()
        del app.sessions[session.id]
    session.write(trajectory)
    if trajectory.failure:
        trajectory.reward = None
    elif not agent.rewarded:
        trajectory.place_reward(trajectory.reward or 0.0)
    elif outcome.answer is not None:
        trajectory.completion = outcome.answer


def problem(session: Session, outcome: Outcome, rewarded: bool) -> str | None:
    """Why an outcome is invalid; None if it is valid."""
    if session.unfinished:
        return (
            "left a streamed answer before its end, so its tokens are unknown: read it all, or set stop or max_tokens"
        )
    if not session.calls:
        return "has waited for no answer of the policy" if session.begun else "has sent no request to the policy"
    if rewarded and outcome.reward is not None:
        return "returned a reward, but task.rewards judges: return text or nothing, or leave task.rewards out"
    if not rewarded and outcome.reward is None:
        return "returned no reward, and task.rewards lists none: return a number, or {'reward': number}"
    return None


def _raised(error: BaseException) -> str:
    error = first_of(error)
    return f"raised {type(error).__name__}: {error}"
