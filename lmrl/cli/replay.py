"""`lmrl replay`: compute again what went wrong in a run, or play one of its episodes again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmrl.cli.common import Debug


def command(
    folder: Annotated[Path, typer.Argument(help="A bundle, a folder below RUN/bundles/; with --episode, a run")],
    episode: Annotated[
        str | None, typer.Option(help="Play this episode again: an `id` in the run's samples.jsonl", metavar="ID")
    ] = None,
    debug: Debug = False,
) -> None:
    """Repeat an update or pass that went wrong, or an episode; exit code 1 where it comes out differently."""
    if episode is None:
        from lmrl.training.replay import replay

        replayed = replay(folder)
        lines, same = replayed.lines, replayed.same is not False
    else:
        from lmrl.rollouts.replay import find_episodes, replay_episode

        played = [replay_episode(line) for line in find_episodes(folder, episode)]
        lines, same = [line for part, _ in played for line in part], all(one for _, one in played)
    for line in lines:
        print(line)
    if not same:
        raise typer.Exit(1)
