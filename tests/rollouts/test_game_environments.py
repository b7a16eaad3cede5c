"""Games as environments: what the referee and the other player do between two turns, on the command line too."""

import json
from functools import partial

import pytest
from typer.testing import CliRunner

import lmrl
from lmrl import cli
from lmrl.environments import GameEnvironment, environment_factory
from lmrl.environments.check import check_environment
from lmrl.environments.games import Referee
from lmrl.environments.nim import Nim
from lmrl.errors import PluginError, RecipeError
from lmrl.recipe import CustomTask
from tests.rollouts import echo
from tests.rollouts.echo import Echo, nim


class Own(lmrl.TextEnvironment):
    def __init__(self, opponent="none"):
        self.opponent = opponent

    def reset(self, *, seed=None, options=None):
        return self.opponent, {}

    def step(self, action):
        return "", 0.0, True, False, {}


def test_an_own_option_called_opponent_stays():
    assert environment_factory(CustomTask(environment=f"{__file__}:Own", opponent="strong"))().opponent == "strong"
    with pytest.raises(PluginError, match="is not a game of several players: leave it out"):
        environment_factory(CustomTask(environment=f"{__file__}:Own", opponent_in_evaluation="strong"))


def test_a_game_with_an_opponent_is_an_environment():
    """The player's turns alone are steps; the optimal opponent answers 5 - 2 = 3 by taking all."""
    game = environment_factory(nim(opponent="optimal"))()
    assert isinstance(game, GameEnvironment) and game.num_starts == 14
    assert game.reset(seed=0, options={"start": 8})[0] == "5 left"
    assert game.step("2") == ("", -1.0, True, False, {"metrics": {"illegal": 0.0, "won": 0.0}})
    # Of a heap of one as the second player nothing is left: the first side is played instead.
    assert game.reset(seed=0, options={"start": 1})[0] == "1 left"
    assert game.step("1")[1:3] == (1.0, True)


def test_without_an_opponent_all_sides_are_played():
    game = environment_factory(nim())()
    assert game.reset(seed=0, options={"start": 4})[0] == "5 left"
    assert game.step("3")[:3] == ("2 left", 0.0, False) and game.step("2")[1] == -1.0  # the second player has won


def test_play_and_by_hand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    play = partial(CliRunner().invoke, cli.app)
    shown = play(["play", "nim", "sticks=2", "--player", "optimal", "--seed", "1"]).output
    assert "player 1" in shown and "over after" in shown
    result = play(["collect", "--by-hand", "-e", "nim", "-n", "1", "-o", "m.jsonl", "task.sticks=2"], input="1\n")
    assert isinstance(result.exception, RecipeError) and "task.opponent=NAME" in str(result.exception)
    arguments = [
        "collect",
        "--by-hand",
        "-e",
        "nim",
        "-n",
        "2",
        "-o",
        "m.jsonl",
        "task.sticks=3",
        "task.opponent=optimal",
    ]
    result = play(arguments, input="9\n9\n")
    assert result.exit_code == 0 and result.output.count("\n  -1\nover\n") == 2, result.output
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows] == [-1.0, -1.0] and {row["player"] for row in rows} == {"person"}


def test_referee_counts_wins():
    referee = Referee(Nim(7))
    referee.begin(0, 4)
    for action in ("1", "3", "1"):
        referee.step(action)
    assert referee.totals == [1.0, -1.0] and referee.terminated
    assert (referee.metrics_of(0)["won"], referee.metrics_of(1)["won"]) == (1.0, 0.0)


class Stuck(Echo):
    """A game that forgets whose turn it is."""

    def step(self, action):
        result = super().step(action)
        self.to_move = 0
        return result


@pytest.mark.parametrize(("name", "passed", "detail"), [("Echo", True, "players"), ("Stuck", None, "never has one")])
def test_a_player_who_never_moves_is_found(name, passed, detail):
    path = echo.__file__ if name == "Echo" else __file__
    findings = {one.name: one for one in check_environment(CustomTask(environment=f"{path}:{name}"), episodes=2)}
    found = findings["all players have turns"]
    assert found.passed is passed and detail in found.detail
