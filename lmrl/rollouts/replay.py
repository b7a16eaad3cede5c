"""Playing an episode of a run again: the same start and actions, from its line in samples.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lmrl.environments import environment_factory, version_of
from lmrl.errors import RunError
from lmrl.rollouts.sampler import begin_episode, failure_text, take_step
from lmrl.run import SAMPLES_FILE
from lmrl.trajectories.trajectory import Messages, prompt_text

Line = dict[str, Any]
SHOWN = 5
"""Differences that are told one by one."""


def find_episodes(run: Path, wanted: str) -> list[Line]:
    """The lines of a run's samples.jsonl with this `id`. More than one where a step played again what had taught nothing, or scored
    two policies. Raises RunError where there is none."""
    path = run / SAMPLES_FILE
    if not path.is_file():
        raise RunError(f"--episode: {path} does not exist: name a run folder")
    lines = list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))
    episodes = [line for line in lines if "id" in line]
    if not episodes:
        raise RunError(
            f"--episode: {path} holds no episode that can be played again: prompts are judged by rewards (see `lmrl reward "
            "check`), and older runs have recorded no seeds"
        )
    found = [line for line in episodes if line["id"] == wanted]
    if not found:
        last = episodes[-1]["id"]
        raise RunError(
            f"--episode: {path} holds no '{wanted}': give an `id` of its lines (STAGE/KIND/STEP/EPISODE), such as {last}"
        )
    return found


def replay_episode(line: Line) -> tuple[list[str], bool]:
    """Play the episode of a line again; what people are told, and whether it came out as recorded."""
    made = line["environment"]
    factory = environment_factory(SimpleNamespace(environment=made["name"], options=made["options"]))
    environment = factory()
    lines = [f"episode {line['id']} of {made['name']}, {_version(made)}; seed {line['seed']}, start {line['start']}"]
    now = version_of(environment)
    if any(now[name] != made[name] for name in now):
        lines.append(f"the environment is another one now: {_version(now)}")
    found = list(differences(environment, line))
    lines += found[:SHOWN]
    if len(found) > SHOWN:
        lines.append(f"and {len(found) - SHOWN} more differences")
    turns = "1 turn" if len(line["turns"]) == 1 else f"{len(line['turns'])} turns"
    outcome = line.get("failure") or f"return {line['reward']:g}"
    return [*lines, f"{turns}, {outcome}: {'not ' if found else ''}the same"], not found


def _version(made: dict[str, Any]) -> str:
    return f"version {made['version'] or 'unknown'} (source {made['source'] or 'unknown'})"


def differences(environment: Any, line: Line) -> Iterator[str]:
    """Play an episode's actions; each difference from what was recorded as a line. Playing continues after a difference."""
    turns, failure = line["turns"], line.get("failure")
    over = terminated = False
    metrics: dict[str, float | None] = {}
    try:
        observation, _ = begin_episode(environment, line["seed"], line["start"])
        for number, turn in enumerate(turns):
            if over:
                yield f"turn {number}: the episode is over, recorded are {len(turns)} turns"
                return
            if observation != (recorded := _observation(line, number)):
                yield f"turn {number}: observation {observation!r:.200}, recorded {recorded!r:.200}"
            observation, reward, terminated, truncated, metrics = take_step(environment, turn["action"])
            over = terminated or truncated or number + 1 >= line["environment"]["max_turns"]
            if reward != turn["reward"]:
                yield f"turn {number}: reward {reward:g}, recorded {turn['reward']:g}"
    except (Exception, SystemExit) as error:
        if failure_text(error) != failure:
            yield f"{failure_text(error)}, recorded {failure or 'no failure'}"
        return
    if failure:
        yield f"no failure, recorded: {failure}"
        return
    # One that outgrew the model's context was truncated at this observation, which the environment does not know.
    if not over and (line["terminated"] or prompt_text(observation) != line["final_observation"]):
        yield f"the episode goes on after turn {len(turns) - 1}, where the recorded one ends"
    elif over and terminated != line["terminated"]:
        yield f"{'terminated' if terminated else 'truncated'}, recorded the other"
    elif not terminated and prompt_text(observation) != line["final_observation"]:
        yield f"last observation {observation!r:.200}, recorded {line['final_observation']!r:.200}"
    if metrics != line["metrics"]:
        yield f"metrics {metrics}, recorded {line['metrics']}"


def _observation(line: Line, number: int) -> str | Messages:
    """The observation of a turn, as messages where it was given so."""
    turn = line["turns"][number]
    first = number == 0 and isinstance(line["prompt"], list)
    observation: str | Messages = line["prompt"] if first else turn.get("messages", turn["observation"])
    return observation
