"""The line that follows a run: its measures and the time it still takes."""

import io

from rich.console import Console

from lmrl.training.display import Display, time_left


def test_time_left_by_hand():
    assert time_left(10, 5, 20) == "0:40"
    assert time_left(600, 10, 62) == "1:02:00"
    assert time_left(3, 0, 10) == "0:30" and time_left(3, 3, 0) == "0:00"


def test_measures_of_zero_are_shown(monkeypatch):
    clock = iter([100.0, 104.0, 104.0])
    monkeypatch.setattr("lmrl.training.display.time.monotonic", lambda: next(clock))
    display = Display(Console(file=io.StringIO(), width=200))
    display.begin("main", "PPO", 12, 0)
    display.step(1, {"reward": 0.0, "kl": 0, "entropy": 1.234, "failed": 0, "skipped": 2, "unshown": 3})
    assert display.console.file.getvalue() == "main (PPO) 1/12  0:44 left  reward 0  kl 0  entropy 1.23  skipped 2\n"
