"""Escape codes in untrusted text never reach the terminal."""

import io

import pytest
from rich.console import Console

from lmrl.training.display import Display
from lmrl.trajectories.trajectory import Trajectory
from lmrl.visible import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("abc\rdef\x08", r"abc\rdef\x08"),
        ("a\u202eb", r"a\u202eb"),
        ("half \ud800", r"half \ud800"),
        ("héllo\t世界 👩\u200d💻\n", "héllo\t世界 👩\u200d💻\n"),
    ],
)
def test_control_characters_are_written_out(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize("terminal", [False, True])
def test_samples_and_notes_are_shown_without_escape_codes(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, color_system=None)
    display = Display(console)
    display.samples([Trajectory([], "\x1b[2Jprompt", "\x1b]0;x\x07answer")], 1)
    display.say("note: \x1b[31m")
    assert "\x1b" not in console.file.getvalue() and r"\x1b[2Jprompt" in console.file.getvalue()


def test_the_progress_line_shows_zeros():
    console = Console(file=io.StringIO())
    display = Display(console)
    display.begin("main", "ppo", 2, 0)
    display.step(1, {"reward": 0.0, "kl": 0, "nll": None})
    assert console.file.getvalue().endswith("  reward 0  kl 0\n")
