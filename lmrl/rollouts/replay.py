"""Playing an episode of a run again: the same start and actions, from its line in samples.jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lmrl.environments import GameEnvironment, environment_factory, version_of
from lmrl.environments.calls import NOT_ITS_OWN, begin_episode, take_step
from lmrl.errors import RunError, counted
from lmrl.rollouts.replay_game import failed, game_differences
from lmrl.run import SAMPLES_FILE
from lmrl.trajectories.trajectory import Messages, prompt_text

Line = dict[str, Any]
Tell = Callable[[str], None]
SHOWN = 5
"""Maximum differences that are listed one by one."""


def find_episodes(source: Path, wanted: str | None = None) -> list[Line]:
    """The lines with this `id` (None: all that can be played again) of a run's samples.jsonl, or of a file of such
    lines.

    An id has several lines if a step resampled prompts without a signal, or scored two policies. Raises RunError if
    there is no such line.
    """
    path = source / SAMPLES_FILE if source.is_dir() else source
    if not path.is_file():
        raise RunError(
            f"--episode: {path} does not exist: name a run folder, or a file with lines of its {SAMPLES_FILE}"
        )
    lines = [_line(path, number, text) for number, text in enumerate(path.read_bytes().splitlines(), start=1)]
    episodes = [line for line in lines if "id" in line]
    if not episodes:
        raise RunError(
            f"--episode: {path} holds no episode that can be played again: only those of environments can, not programs "
            "and tools, nor prompts, which rewards judge (see `lmrl reward check`)"
        )
    found = [line for line in episodes if wanted in (None, line["id"])]
    if not found:
        last = episodes[-1]["id"]
        raise RunError(
            f"--episode: {path} holds no '{wanted}': give an `id` of its lines (STAGE/KIND/STEP/EPISODE), such as {last}"
        )
    return found


def _line(path: Path, number: int, text: bytes) -> Line:
    try:
        line = json.loads(text)
    except ValueError:
        line = None
    if not isinstance(line, dict):
        raise RunError(f"{path}, line {number}: is not a JSON object: expected a line of a run's {SAMPLES_FILE}")
    missing = [
        name for name in ("environment", "seed", "start", "turns", "reward") if "id" in line and name not in line
    ]
    if missing:
        raise RunError(f"{path}, line {number}: has no '{missing[0]}': expected a line of a run's {SAMPLES_FILE}")
    return line


def replay_episode(line: Line, tell: Tell = lambda text: None) -> tuple[list[str], bool]:
    """Play the episode of a line again; returns the lines to show at the end, and whether it came out as recorded.

    tell: called with each observation, action and reward during play.
    """
    made = line["environment"]
    factory = environment_factory(SimpleNamespace(environment=made["name"], options=made["options"]))
    environment = factory()
    lines = [f"episode {line['id']} of {made['name']}, {_version(made)}; seed {line['seed']}, start {line['start']}"]
    now = version_of(environment)
    if any(now[name] != made[name] for name in now):
        lines.append(f"the environment has changed since: {_version(now)}")
    if isinstance(environment, GameEnvironment):
        if "game" not in line:
            raise RunError(
                f"episode {line['id']}: '{made['name']}' is now a game of several players, but no moves are recorded"
            )
        found = list(game_differences(environment.game, line, tell))
    else:
        found = list(differences(environment, line, tell))
    lines += found[:SHOWN]
    if len(found) > SHOWN:
        lines.append(f"and {counted(len(found) - SHOWN, 'more difference')}")
    turns = counted(len(line["turns"]), "turn")
    outcome = line.get("failure") or f"return {line['reward']:g}"
    return [*lines, f"{turns}, {outcome}: {'not ' if found else ''}the same"], not found


def _version(made: dict[str, Any]) -> str:
    return f"version {made['version'] or 'unknown'} (source {made['source'] or 'unknown'})"


def differences(environment: Any, line: Line, tell: Tell = lambda text: None) -> Iterator[str]:
    """Play an episode's actions; each difference from what was recorded as a line. Playing continues after a
    difference."""
    turns, failure = line["turns"], line.get("failure")
    limit = line["environment"].get("call_timeout")
    over = terminated = False
    metrics: dict[str, float | None] = {}
    try:
        observation, _ = begin_episode(environment, line["seed"], line["start"], limit)
        for number, turn in enumerate(turns):
            if over:
                yield f"turn {number}: the episode is over, recorded: {counted(len(turns), 'turn')}"
                return
            tell(prompt_text(observation))
            if observation != (recorded := _observation(line, number)):
                yield f"turn {number}: observation {observation!r:.200}, recorded {recorded!r:.200}"
            tell(f"> {turn['action']}")
            observation, reward, terminated, truncated, metrics = take_step(environment, turn["action"], limit)
            over = terminated or truncated or number + 1 >= line["environment"]["max_turns"]
            if reward:
                tell(f"  {reward:+g}")
            if reward != turn["reward"]:
                yield f"turn {number}: reward {reward:g}, recorded {turn['reward']:g}"
        tell(prompt_text(observation))
    except (Exception, SystemExit) as error:
        yield from failed(error, failure, tell)
        return
    if failure:
        if not failure.startswith(NOT_ITS_OWN):
            yield f"no failure, recorded: {failure}"
        return
    # An episode that outgrew the model's context was truncated at this observation, unknown to the environment.
    if not over and (line["terminated"] or prompt_text(observation) != line["final_observation"]):
        yield f"the episode goes on after turn {len(turns) - 1}, where the recorded one ends"
    elif over and terminated != line["terminated"]:
        yield f"{'terminated' if terminated else 'truncated'}, but recorded as the other"
    elif not terminated and prompt_text(observation) != line["final_observation"]:
        yield f"last observation {observation!r:.200}, recorded {line['final_observation']!r:.200}"
    if metrics != line["metrics"]:
        yield f"metrics {metrics}, recorded {line['metrics']}"


def _observation(line: Line, number: int) -> str | Messages:
    """The observation of a turn, as messages if it was given that way."""
    turn = line["turns"][number]
    first = number == 0 and isinstance(line["prompt"], list)
    observation: str | Messages = line["prompt"] if first else turn.get("messages", turn["observation"])
    return observation
