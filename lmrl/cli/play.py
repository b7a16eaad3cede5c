"""`lmrl play`: play an environment in the terminal, or watch a player or a policy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmrl.cli.common import Debug, Overrides
from lmrl.cli.env import Named, task_section
from lmrl.errors import EpisodeError, RecipeError, counted, did_you_mean
from lmrl.visible import plain_console, visible

if TYPE_CHECKING:
    from rich.console import Console

    from lmrl.cli.speaker import Speaker
    from lmrl.recipe import EnvironmentTask


def command(
    environment: Named,
    options: Overrides = None,
    player: Annotated[str | None, typer.Option("--player", help="Watch a scripted player")] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="Watch a policy: a run, a folder or a hub name")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", min=0.0, help="The policy's temperature (default: 1)")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Maximum tokens per turn of the policy (default: 64)")
    ] = None,
    beta: Annotated[
        float | None, typer.Option("--beta", min=0.0, help="Weight of the Q values, for a policy that has them")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    debug: Debug = False,
) -> None:
    """Play an environment, or watch a scripted player or a policy. Ctrl-D ends the game."""
    if player is not None and policy is not None:
        raise RecipeError("--player and --policy: one of them plays, leave the other out")
    sampling = {"temperature": temperature, "max_new_tokens": max_new_tokens, "beta": beta}
    stated = {name: value for name, value in sampling.items() if value is not None}
    if stated and policy is None:
        raise RecipeError(f"--{next(iter(stated)).replace('_', '-')} is for a policy: add --policy, or leave it out")
    from lmrl.environments import GameEnvironment, environment_factory
    from lmrl.environments.calls import begin_episode, call_player, take_step
    from lmrl.seeding import stream

    task = task_section(environment, options)
    game, console = environment_factory(task)(), plain_console()
    players = tuple(getattr(game, "players", ()))
    if player is not None and player not in players:
        raise RecipeError(
            f"--player {player}: the environment has {', '.join(players) or 'no players'}{did_you_mean(player, players)}"
        )
    speakers = _speakers(policy, task, stated, seed) if policy else None
    rng, total = stream(seed, "play"), 0.0
    with _failures_in_one_line():
        observation, _ = begin_episode(game, seed, None, task.call_timeout)
    for turn in range(task.max_turns):
        console.print(visible(str(observation)), style="cyan")
        action: str | None
        side = game.referee.to_move if isinstance(game, GameEnvironment) else 0
        if isinstance(game, GameEnvironment) and game.new_opponent is None:
            console.print(f"player {side + 1}", style="dim")
        if speakers is not None:
            action = speakers(side).say(observation)
        elif player is not None:
            with _failures_in_one_line():
                action = call_player(game, player, rng, task.call_timeout)
        else:
            action = ask(console)
        if action is None:
            console.print(f"left after {counted(turn, 'turn')}: return {total:g}")
            return
        if speakers is not None or player is not None:
            console.print(f"> {visible(action)}")
        with _failures_in_one_line():
            observation, reward, terminated, truncated, metrics = take_step(game, action, task.call_timeout)
        total += reward
        if reward:
            console.print(f"  {reward:+g}", style="dim")
        if terminated or truncated:
            break
    if observation:
        console.print(visible(str(observation)), style="cyan")
    ended = "over" if terminated else "cut off"
    measured = "".join(f", {name} {value:g}" for name, value in metrics.items() if value is not None)
    console.print(f"{ended} after {counted(turn + 1, 'turn')}: return {total:g}{measured}")


@contextmanager
def _failures_in_one_line() -> Iterator[None]:
    """Around calls of an environment. Raises EpisodeError."""
    from lmrl.environments.calls import failure_text

    try:
        yield
    except (Exception, SystemExit) as error:
        raise EpisodeError(failure_text(error)) from error


def printer() -> tuple[Console, Callable[[str], None]]:
    """A console, and a function that shows an environment's text on it."""
    console = plain_console()
    return console, lambda text: console.print(visible(text), style="cyan")


def ask(console: Console) -> str | None:
    """The user's action; None at the end of the input. Bytes that are no text are replaced."""
    if isinstance(sys.stdin, TextIOWrapper) and sys.stdin.errors != "replace":
        sys.stdin.reconfigure(errors="replace")
    try:
        line = console.input("> ") if sys.stdin.isatty() else sys.stdin.readline()
    except (EOFError, KeyboardInterrupt):
        return None
    return line.rstrip("\n") if line or sys.stdin.isatty() else None


def _speakers(policy: str, task: EnvironmentTask, stated: dict[str, Any], seed: int) -> Callable[[int], Speaker]:
    """The policy as each side of a game; each side has its own dialogue. stated: how to sample, see `Sampling`."""
    from functools import cache

    from lmrl.cli.speaker import Speaker
    from lmrl.engines.base import Sampling, check_has_q
    from lmrl.policy.load import open_policy
    from lmrl.run_folders import checkpoint_of

    opened = open_policy(str(checkpoint_of(policy)))
    if "beta" in stated:
        check_has_q(opened, policy)
    sampling = Sampling(**stated)
    return cache(lambda side: Speaker(policy, opened, sampling, None, seed + side, task.chat, task.history))
