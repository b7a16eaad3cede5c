"""`lmrl replay`: recompute a failed update of a run, or play its episodes again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmrl.cli.common import Debug


def command(
    source: Annotated[
        Path,
        typer.Argument(
            help="A bundle, a folder below RUN/bundles/; with --episode, a run; or a file with lines of a run's samples.jsonl",
            metavar="FOLDER|FILE",
        ),
    ],
    episode: Annotated[
        str | None, typer.Option(help="Play this episode again: an `id` in samples.jsonl", metavar="ID")
    ] = None,
    debug: Debug = False,
) -> None:
    """Repeat a failed update or pass, or episodes; exit code 1 if one comes out differently."""
    same = _play(source, episode) if episode is not None or source.is_file() else _compute(source)
    if not same:
        raise typer.Exit(1)


def _compute(bundle: Path) -> bool:
    from lmrl.training.replay import replay

    replayed = replay(bundle)
    for line in replayed.lines:
        print(line)
    return replayed.same is not False


def _play(source: Path, episode: str | None) -> bool:
    """Play episodes again: one turn by turn, several with a few lines each."""
    from lmrl.rollouts.replay import find_episodes, replay_episode
    from lmrl.visible import visible

    found, every = find_episodes(source, episode), True
    for line in found:
        told, same = replay_episode(line, _show if len(found) == 1 else lambda text: None)
        for text in told:
            print(visible(text))
        every = every and same
    if len(found) > 1:
        print(f"{len(found)} episodes: {'all' if every else 'not all'} the same")
    return every


def _show(text: str) -> None:
    from lmrl.visible import visible

    if text:
        print(visible(text))
