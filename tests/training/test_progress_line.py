"""The line that follows a run: its measures and the time it still takes."""

import io
import sys
import types

import pytest
from rich.console import Console

import lmrl
from lmrl.training.display import Display, short, time_left
from tests.conftest import TINY_LLAMA
from tests.runs import metrics


def test_time_left_by_hand():
    assert time_left(10, 5, 20) == "0:40"
    assert time_left(600, 10, 62) == "1:02:00"
    assert time_left(3, 0, 10) == "0:30" and time_left(3, 3, 0) == "0:00"


def test_measures_of_zero_are_shown(monkeypatch):
    clock = iter([100.0, 104.0])
    monkeypatch.setattr("lmrl.training.display.time.monotonic", lambda: next(clock))
    display = Display(Console(file=io.StringIO(), width=200))
    display.begin("main", "PPO", 12, 0)
    display.step(1, {"reward": 0.0, "kl": 0, "entropy": 1.234, "failed": 0, "skipped": 2, "unshown": 3})
    assert display.console.file.getvalue() == "main (PPO) 1/12  0:44 left  reward 0  kl 0  entropy 1.23  skipped 2\n"


class Dice(lmrl.TextEnvironment):
    players = ("random",)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "roll", {}

    def step(self, action):
        return "", float(self.np_random.random()), True, False, {}

    def act(self, player, rng):
        return "roll"

    def texts(self):
        return ["roll"]


@pytest.mark.parametrize("fresh", [False, True])
def test_only_fresh_episodes_have_a_reward_to_show(tmp_path, fresh):
    """The logged ones, and the best of the fresh ones, on which it trains, earn what the policy does not."""
    display = Display(Console(file=io.StringIO(), width=200))
    logged = {"name": "dataset", "player": "random", "episodes": 8, "batch_size": 4}
    recipe = {
        "model": {"config": TINY_LLAMA},
        "source": {"name": "rollouts", "best": 0.3} if fresh else logged,
        "rollouts": {"prompts": 4, "samples": 2, "max_new_tokens": 2},
        "objective": {"name": "likelihood"},
        "training": {"steps": 1, "threads": 1},
    }
    lmrl.train(recipe, output=tmp_path / "run", display=display, environment=Dice)
    (line,) = [one for one in display.console.file.getvalue().splitlines() if " 1/1 " in one]
    (step,) = [one for one in metrics(tmp_path / "run") if one["kind"] == "train"]
    if fresh:
        assert step["online/reward"] < step["reward"] and f"  reward {short(step['online/reward'])}  " in line
    else:
        assert "reward" in step and "reward" not in line and "nll" in line


def test_what_precedes_the_first_step_is_not_its_pace(monkeypatch):
    clock = iter([0.0, 60.0, 62.0])  # an evaluation of a minute, then a step of two seconds
    monkeypatch.setattr("lmrl.training.display.time.monotonic", lambda: next(clock))
    display = Display(Console(file=io.StringIO(), width=200))
    display.begin("main", "PPO", 11, 0)
    display.steps_begin()
    display.step(1, {})
    assert "main (PPO) 1/11  0:20 left" in display.console.file.getvalue()


def test_a_terminal_shows_the_time_left_of_slow_steps(monkeypatch):
    """rich's own estimate forgets steps after thirty seconds, and so knows nothing if each takes longer."""
    clock = iter([0.0, 0.0, 40.0, 80.0])
    monkeypatch.setattr("lmrl.training.display.time.monotonic", lambda: next(clock))
    display = Display(Console(file=io.StringIO(), width=120, force_terminal=True))
    display.begin("main", "PPO", 4, 0)
    display.steps_begin()
    display.step(1, {"reward": 0.5})
    display.step(2, {"reward": 0.5})
    display.end()
    assert "2/4" in display.console.file.getvalue() and "1:20 left reward 0.5" in display.console.file.getvalue()


@pytest.mark.parametrize(("width", "term"), [(40, "xterm"), (120, "dumb")])
def test_a_terminal_without_room_for_a_bar_gets_lines(monkeypatch, width, term):
    """A dumb terminal cannot replace a line."""
    monkeypatch.setattr("lmrl.training.display.time.monotonic", lambda: 0.0)
    console = Console(file=io.StringIO(), width=width, force_terminal=True, _environ={"TERM": term})
    display = Display(console)
    display.begin("main", "PPO", 4, 0)
    display.step(1, {"reward": 0.5, "entropy": 1.2})
    display.end()
    assert (
        console.file.getvalue().split("\n") == ["main (PPO) 1/4  0:00 left  reward 0.5  ", "entropy 1.2", ""]
        if (width == 40)
        else ["main (PPO) 1/4  0:00 left  reward 0.5  entropy 1.2", ""]
    )


def test_a_notebook_has_one_bar_that_is_replaced(monkeypatch):
    shown = []

    class Output:
        def update(self, content):
            shown.append(content)

    def display(content, display_id):
        assert display_id is True
        shown.append(content)
        return Output()

    module = types.SimpleNamespace(HTML=str, display=display)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=module))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    console = Console(file=io.StringIO(), width=200)
    console.is_jupyter = True
    view = Display(console)
    view.begin("main", "PPO <1>", 4, 0)
    view.step(1, {"reward": 0.5})
    view.step(4, {"reward": 0.75})
    view.end()
    assert len(shown) == 3 and console.file.getvalue() == ""
    assert shown[0].startswith('<pre><progress value="0" max="4">') and "main (PPO &lt;1&gt;) 0/4" in shown[0]
    assert '<progress value="4" max="4">' in shown[2] and "4/4  0:00 left  reward 0.75" in shown[2]
