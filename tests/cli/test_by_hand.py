"""`lmrl collect --by-hand`: typed actions become episodes for training."""

import json

import pytest
from typer.testing import CliRunner

import lmrl
from lmrl import cli
from lmrl.errors import EpisodeError, RecipeError

GUESS = """
import lmrl
class Guess(lmrl.TextEnvironment):
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number = 5
        return "guess", {}
    def step(self, action):
        if action == "broken":
            raise RuntimeError("broke")
        if action.strip() == "5":
            return "", 1.0, True, False, {"metrics": {"right": 1}}
        return ("higher" if action < "5" else "lower"), -1.0, False, False, {}
    def texts(self):
        return ["guess", "higher", "lower", "0123456789"]
"""
RECIPE = """
model: {config: {model_type: gpt2, n_embd: 16, n_layer: 1, n_head: 2, n_positions: 64}}
task: {environment: guess.py:Guess, max_turns: 3}
source: {name: dataset, path: mine.jsonl, batch_size: 2}
training: {steps: 2, checkpoint_every: 0, threads: 1}
evaluation: {suite: null, diagnostics_every: 0}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "guess.py").write_text(GUESS)
    return tmp_path


def play(typed, *more):
    arguments = ["collect", "--by-hand", "-e", "guess.py:Guess", "-o", "mine.jsonl", *map(str, more)]
    return CliRunner().invoke(cli.app, arguments, input=typed)


def rows(folder):
    return [json.loads(line) for line in (folder / "mine.jsonl").read_text().splitlines()]


def test_typed_episodes_are_saved(folder):
    """Two complete episodes, one truncated after three turns, and one abandoned."""
    result = play("3\n5\n5\n1\n2\n3\n7\n", "task.max_turns=3")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("guess\n  -1\nhigher\n  +1\nover\nguess\n  +1\nover\nguess\n  -1\nhigher\n")
    assert "stopped: the unfinished episode is not saved\n3 episodes, 6 turns, mean return " in result.output
    kept = rows(folder)
    assert [[turn["action"] for turn in row["turns"]] for row in kept] == [["3", "5"], ["5"], ["1", "2", "3"]]
    assert [row["reward"] for row in kept] == [0.0, 1.0, -3.0]
    assert [row["terminated"] for row in kept] == [True, True, False] and kept[2]["final_observation"] == "higher"
    assert [row["metrics"] for row in kept] == [{"right": 1.0}, {"right": 1.0}, {}]
    assert {row["player"] for row in kept} == {"person"} and [row["episode"] for row in kept] == [0, 1, 2]


def test_bytes_that_are_no_text_are_replaced(folder):
    assert play(b"\xff5\n5\n", "-n", 1).exit_code == 0
    assert [turn["action"] for turn in rows(folder)[0]["turns"]] == ["\ufffd5", "5"]


@pytest.mark.parametrize("objective", ["likelihood", "ilql"])
def test_played_episodes_are_learned_from(folder, objective):
    assert play("3\n5\n5\n", "-n", 2).exit_code == 0
    (folder / "recipe.yaml").write_text(RECIPE + f"objective: {{name: {objective}}}\n")
    result = lmrl.train("recipe.yaml", output="run")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "train" for line in lines) == 2 and result.checkpoint.exists()


def test_a_failure_keeps_what_came_before(folder):
    result = play("5\nbroken\n")
    assert isinstance(result.exception, EpisodeError) and "RuntimeError: broke" in str(result.exception)
    assert [row["reward"] for row in rows(folder)] == [1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--by-hand"], "--by-hand: name what to play"),
        (["random", "--by-hand", "-e", "maze"], "leave 'random' out"),
        (["-e", "maze"], "POLICY: no player is named"),
    ],
)
def test_the_player_must_be_named_once(arguments, message):
    result = CliRunner().invoke(cli.app, ["collect", *arguments])
    assert isinstance(result.exception, RecipeError) and message in str(result.exception)
