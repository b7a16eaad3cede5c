"""`lmrl chat`: talk to a policy, or to two side by side."""

from __future__ import annotations

import io
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from lmrl.cli.common import Checkpoint, Debug, TrustRemoteCode
from lmrl.errors import RecipeError
from lmrl.visible import plain_console, visible

HELP = "/new  start over     /system TEXT    /temperature T    /quit"


def command(
    policies: Annotated[list[str], typer.Argument(help="A run, checkpoint, folder or hub name; one or two of them")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Send only this, and print the answer")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message")] = None,
    temperature: Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0: the most likely token")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Maximum tokens per answer")] = 256,
    beta: Annotated[
        float | None, typer.Option("--beta", min=0.0, help="Weight of the Q values, for a policy that has them")
    ] = None,
    checkpoint: Checkpoint = "final",
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Talk to a policy, or to two side by side."""
    if len(policies) > 2:
        raise RecipeError(f"chat takes one policy or two, got {len(policies)}")
    from lmrl.cli.speaker import Speaker
    from lmrl.engines.base import Sampling, check_has_q
    from lmrl.policy.load import open_policy
    from lmrl.run_folders import checkpoint_of

    sampling = Sampling(max_new_tokens, temperature, beta=beta)
    speakers = []
    for name in policies:
        policy = open_policy(checkpoint_of(name, checkpoint), trust_remote_code=trust_remote_code)
        if beta is not None:
            check_has_q(policy, name)
        if system is not None and not policy.tokenizer.chat_template:
            raise RecipeError(f"--system needs a chat template, and '{name}' has none: leave it out")
        speakers.append(Speaker(Path(name).name or name, policy, sampling, system, seed))

    console = plain_console()
    if prompt is not None:
        _answer(console, speakers, prompt)
        return
    if not sys.stdin.isatty() and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # `_answer` replaces what is no text
    if sys.stdin.isatty():
        console.print(HELP, style="dim")
        if not speakers[0].renderer.chat:
            console.print("no chat template: the text is continued as it is", style="dim")
    while (line := _read(console)) is not None:
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            return
        if word == "/new":
            for speaker in speakers:
                speaker.forget()
        elif word == "/system":
            for speaker in speakers:
                speaker.system = rest or None
                speaker.forget()
        elif word == "/temperature":
            try:
                heat = float(rest)
            except ValueError:
                heat = math.nan
            if 0 <= heat < math.inf:
                for speaker in speakers:
                    speaker.sampling = replace(speaker.sampling, temperature=heat)
            else:
                console.print(f"/temperature takes a number of 0 or more, got {rest!r}")
        elif word.startswith("/"):
            console.print(HELP, style="dim")
        elif line.strip():
            _answer(console, speakers, line)


def _read(console: Console) -> str | None:
    """A line that the user types; None at the end of the input."""
    try:
        line = console.input("> ") + "\n" if sys.stdin.isatty() else sys.stdin.readline()
    except (EOFError, KeyboardInterrupt):
        return None
    return line.rstrip("\r\n") if line else None


def _answer(console: Console, speakers: list[Any], said: str) -> None:
    """Show each policy's answer as it comes. Bytes that are not UTF-8 are replaced, as by editors."""
    said = os.fsencode(said).decode(errors="replace")
    answers = [""] * len(speakers)

    def shown() -> RenderableType:
        texts = [Text(visible(answer)) for answer in answers]
        if len(texts) == 1:
            return texts[0]
        half = console.width // 2 - 1
        return Columns(
            [Panel(text, title=speaker.name, width=half) for text, speaker in zip(texts, speakers, strict=True)]
        )

    live = (
        Live(shown(), console=console, refresh_per_second=12, vertical_overflow="visible")
        if console.is_terminal
        else None
    )

    def hear(place: int, answer: str) -> None:
        answers[place] = answer
        if live:
            live.update(shown())

    if live:
        live.start()
    try:
        for place, speaker in enumerate(speakers):
            answers[place] = speaker.say(said, lambda answer, place=place: hear(place, answer))
    finally:
        if live:
            live.update(shown())
            live.stop()
    if not live:
        for speaker, answer in zip(speakers, answers, strict=True):
            name = f"{speaker.name}: " if len(speakers) > 1 else ""
            console.print(f"{name}{visible(answer)}", soft_wrap=True)
