"""Playing a game of several players again, from the recorded moves of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lmrl.environments.calls import NOT_ITS_OWN, failure_text
from lmrl.environments.games import Game, Referee
from lmrl.errors import counted
from lmrl.trajectories.trajectory import prompt_text


def failed(error: BaseException, recorded: str | None, tell: Callable[[str], None]) -> Iterator[str]:
    """Show how an episode failed; yields the difference from the recorded failure, if there is one."""
    text = failure_text(error)
    tell(text)
    if text != recorded:
        yield f"{text}, recorded {recorded or 'no failure'}"


def game_differences(game: Game, line: dict[str, Any], tell: Callable[[str], None]) -> Iterator[str]:
    """Play the game of a line of samples.jsonl again; each difference from one player's recorded episode as a line."""
    recorded, turns, failure = line["game"], line["turns"], line.get("failure")
    player, limit = recorded["player"], line["environment"].get("call_timeout")
    referee, rewards = Referee(game), [0.0] * len(turns)
    waiting, turn, last = 0.0, 0, None
    try:
        referee.begin(line["seed"], recorded["start"], limit)
        for number, (mover, action) in enumerate(recorded["moves"]):
            if referee.over:
                yield f"move {number}: the game is over, recorded: {counted(len(recorded['moves']), 'move')}"
                return
            if referee.to_move != mover:
                yield f"move {number}: is of player {referee.to_move}, recorded of player {mover}"
                return
            observation = prompt_text(referee.observe(mover, limit))
            if mover == player:
                tell(observation)
                if turn >= len(turns):
                    yield f"turn {turn}: recorded: {counted(len(turns), 'turn')}"
                    return
                if observation != turns[turn]["observation"]:
                    yield f"turn {turn}: observation {observation!r:.200}, recorded {turns[turn]['observation']!r:.200}"
                turn += 1
            tell(f"{'>' if mover == player else f'player {mover}:'} {action}")
            waiting += referee.step(action, limit)[player]
            if turn:
                rewards[turn - 1], waiting = rewards[turn - 1] + waiting, 0.0
        if not referee.over and line["final_observation"] is not None:
            last = prompt_text(referee.observe(player, limit))
        elif failure and not failure.startswith(NOT_ITS_OWN) and not referee.over:  # it had failed before another move
            referee.observe(referee.to_move, limit)
    except (Exception, SystemExit) as error:
        yield from failed(error, failure, tell)
        return
    if failure:
        if not failure.startswith(NOT_ITS_OWN):
            yield f"no failure, recorded: {failure}"
        return
    for number, (reward, given) in enumerate(zip(rewards, turns, strict=True)):
        if reward != given["reward"]:
            yield f"turn {number}: reward {reward:g}, recorded {given['reward']:g}"
    if not referee.over and line["terminated"]:
        yield f"the game goes on after move {len(recorded['moves']) - 1}, where the recorded one ends"
    elif referee.terminated and not line["terminated"]:
        yield "terminated, but recorded as truncated"
    elif last is not None and last != line["final_observation"]:
        yield f"last observation {last!r:.200}, recorded {line['final_observation']!r:.200}"
    if referee.metrics_of(player) != line["metrics"]:
        yield f"metrics {referee.metrics_of(player)}, recorded {line['metrics']}"
