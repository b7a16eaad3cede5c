"""What terminals of 80 and 120 columns show: lines broken between words, counts whole, names beside their texts."""

import io

import pytest
from rich.console import Console

from lmrl.cli.ls import _laid_out, listing
from lmrl.training import display
from lmrl.training.display import Display

WORDS = (
    "evaluation on the stage's own task: 256 episodes each, at the start, every 20 steps and at the end of the stage"
)
COMMAND = (
    "export it:  lmrl export runs/a-name-that-is-as-long-as-names-of-runs-may-be/2026-11-26 FOLDER --beta 64 --distill"
)


def shown(width, show, terminal=True):
    """The lines that a terminal, or a file, is given."""
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False, color_system=None)
    show(console)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_lines_break_between_words(width):
    lines = shown(width, lambda console: Display(console).say(WORDS))
    assert max(map(len, lines)) <= width and " ".join(lines) == WORDS


def test_commands_stay_in_one_piece():
    assert shown(80, lambda console: Display(console).say(COMMAND, whole=True)) == [COMMAND]
    assert shown(80, lambda console: Display(console).say(WORDS), terminal=False) == [WORDS]


@pytest.mark.parametrize("width", [80, 120])
def test_progress_shows_its_counts_whole(width, monkeypatch):
    """However much there is to say beside them."""
    metrics = dict.fromkeys(display.SHOWN, 0.123)

    def show(console):
        terminal = Display(console)
        terminal.begin("warmup", "BC", 20_000, 0)
        terminal.step(19_999, metrics)
        terminal.end()

    text = "\n".join(shown(width, show))
    assert "19999/20000" in text and "0:00:0" in text and "…" not in text
    assert all(f"{name} 0.123" in " ".join(text.split()) for name in display.SHOWN)


@pytest.mark.parametrize(
    ("width", "beginning", "column"),
    [(80, "      1 if a completion is the", 6), (130, "  lmrl.reward_models.answers.exact   ", 46)],
)
def test_long_names_leave_room_for_texts(width, beginning, column):
    """Texts stand beside the longest name, or below the names where that leaves no room."""
    found = listing("rewards")
    lines = shown(width, lambda console: console.print(_laid_out(found, width)))
    assert max(map(len, lines)) <= width and len(found) <= len(lines)
    (first,) = [line for line in lines if "1 if a completion is the" in line]
    assert first.startswith(beginning) and first.index("1 if") == column


def test_each_kind_has_columns_of_its_own():
    found = {"short": "What it is.", "longer [one]": "[Brackets] are no markup."}
    assert shown(80, lambda console: console.print(_laid_out(found, 80))) == [
        "  short          What it is.",
        "  longer [one]   [Brackets] are no markup.",
    ]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_cells_titles_and_captions_stay_whole(width):
    """A table too wide for its cells stands on its side, and its title is not wrapped at its width."""
    heads = [f"metric-{number}" for number in range(6)]
    lines = [["", *heads, "n"], ["reward model", *["0.526 ± 0.032"] * 6, "3"]]
    title, caption = "Result over the runs", "mean ± half width of the interval"

    def show(console):
        Display(console).grid(title, lines, caption)
        Display(console).grid(title, [["", "a"], ["b", "1"]], caption)

    text = shown(width, show)
    assert text.count(title) == text.count(caption) == 2 and max(map(len, text)) <= width
    assert "\n".join(text).count("0.526 ± 0.032") == 6 and all(any(head in line for line in text) for head in heads)
