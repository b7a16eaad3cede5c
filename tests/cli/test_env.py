"""`lmrl env check` and `lmrl play`."""

import json

import pytest
from typer.testing import CliRunner

from lmrl.cli import app
from lmrl.errors import EpisodeError, RecipeError

GAME = """
import random
import time
from lmrl import TextEnvironment


class Good(TextEnvironment):
    num_starts, players, metric_limits = 3, ("random",), {"return": (0, 2)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turn = 0
        return f"start {(options or {}).get('start', self.np_random.integers(3))}", {}

    def step(self, action):
        self.turn += 1
        return "go on", float(action == "yes"), self.turn == 2, False, {"metrics": {"turns": self.turn}}

    def act(self, player, rng):
        return str(rng.choice(["yes", "no"]))

    def texts(self):
        return ["start 0 1 2", "go on", "yes", "no"]


class Unmeasured(Good):
    def step(self, action):
        return "", 1.0, True, False, {"metrics": {"turns": None, "right": 1}}


class Accented(Good):
    def reset(self, **options):
        return super().reset(**options)[0] + " é", {}

    def texts(self):
        return []


class Unseeded(Good):
    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, reward + random.random(), *rest


class Fragile(Good):
    def step(self, action):
        return super().step({"yes": "yes", "no": "no"}[action])


class Strict(Fragile):
    def allowed_actions(self):
        return ["yes", "no"]


class Four(Good):
    def step(self, action):
        return super().step(action)[:4]


class Beyond(Good):
    metric_limits = {"return": (0, 0.5)}

    def texts(self):
        return ["start", "yes", "no"]


class OnePlayer(Good):
    players = "random"


class HalfStarts(Good):
    num_starts = 2.5


class NoStarts(Good):
    num_starts = 0


class Letters(Good):
    def texts(self):
        return "start yes no"


class Shared(Good):
    turn = 0

    def step(self, action):
        self.np_random.random()
        Shared.turn += 1
        return "go on", float(action == "yes"), Shared.turn == 2, False, {}

    def reset(self, **options):
        Shared.turn = 0
        return super().reset(**options)


class Remembers(Good):
    def __init__(self):
        self.said = []

    def step(self, action):
        self.said.append(action)
        observation, _, *rest = super().step(action)
        return observation, float(len(self.said) % 2), *rest

    def reset(self, **options):
        self.said = self.said[:1]
        return super().reset(**options)


class OtherMetric(Good):
    metric_limits = {"return": (0, 2), "turns": (0, 1)}


class Slow(Good):
    def step(self, action):
        time.sleep(60)


class Cheats(Good):
    players = ("random", "cheat")

    def allowed_actions(self):
        return ["yes", "no"]

    def act(self, player, rng):
        return "start" if player == "cheat" else super().act(player, rng)


class NothingAllowed(Cheats):
    def allowed_actions(self):
        return []


class Unplayed(Strict):
    players = ()

    def texts(self):
        return ["start 0 1 2", "go on", "yes no"]


class TimeLimit(Good):
    def step(self, action):
        observation, reward, over, _, info = super().step(action)
        return observation, reward, False, over, info


class Missing(Good):
    def texts(self):
        return open("missing.txt").read().split()
"""


@pytest.fixture
def game(tmp_path):
    (tmp_path / "game.py").write_text(GAME)
    return lambda name: f"{tmp_path}/game.py:{name}"


def run(*arguments, **options):
    done = CliRunner().invoke(app, list(map(str, arguments)), **options)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_a_good_environment_is_fit(game, tmp_path):
    done = run("env", "check", game("Good"), "--json", tmp_path / "found.json")
    assert done.exit_code == 0 and "fit for training" in done.output
    assert {one["passed"] for one in json.loads((tmp_path / "found.json").read_text())} == {True}


@pytest.mark.parametrize(
    ("name", "failed"),
    [
        ("Unseeded", {"the seed decides the episode", "limits of the return"}),
        ("Fragile", {"survives odd actions"}),
        ("Four", {"step"}),
        ("Beyond", {"limits of the return", "texts"}),
        ("OnePlayer", {"can be made"}),
        ("HalfStarts", {"can be made"}),
        ("NoStarts", {"can be made"}),
        ("Letters", {"texts"}),
        ("Missing", {"texts"}),
        ("Shared", {"episodes run side by side"}),
        ("Remembers", {"reset begins anew"}),
        ("OtherMetric", {"limits of the metric 'turns'"}),
        ("Nowhere", {"can be made"}),
    ],
)
def test_what_is_wrong_is_found(game, tmp_path, name, failed):
    done = run("env", "check", game(name), "--json", tmp_path / "found.json")
    assert done.exit_code == 1
    found = {one["name"] for one in json.loads((tmp_path / "found.json").read_text()) if one["passed"] is False}
    assert found >= failed if name == "Unseeded" else found == failed


def test_findings_name_the_fix(game, tmp_path):
    def found(*arguments):
        run("env", "check", *arguments, "--json", tmp_path / "found.json")
        return {
            one["name"]: (one["passed"], one["detail"]) for one in json.loads((tmp_path / "found.json").read_text())
        }

    name, raised = "survives odd actions", "action '' raises KeyError: ''"
    assert found(game("Fragile"))[name] == (False, f"{raised}: answer any text, or list allowed_actions()")
    assert found(game("Strict"))[name] == (False, f"{raised}: set task.allowed_actions=true")
    assert found(game("Strict"), "allowed_actions=true")[name][0] is None
    passed, detail = found(game("TimeLimit"))["ends by itself"]
    assert passed is None and detail.startswith("20 of 20 episodes, all by truncated=True")
    assert detail.endswith("if the limit is one of its rules, return terminated=True")
    assert found(game("Accented"))["texts"][1].endswith("letter by letter, which lacks 'é'")
    assert found(game("Strict"), "allowed_actions=true")["step"][0]
    assert found(game("Unplayed"), "allowed_actions=true")["step"][0]  # plays what is allowed, not any of its texts
    assert found(game("Cheats"), "allowed_actions=true")["player 'cheat'"] == (
        False,
        "ValueError: act('cheat', ...) returned 'start', which is not allowed: ('yes', 'no')",
    )
    assert found(game("NothingAllowed"), "allowed_actions=true")["step"] == (
        False,
        "TypeError: allowed_actions() returned []; expected a list of texts, or None for any",
    )
    assert found(game("Good"), "allowed_actions=true")["can be made"][0] is False
    line = GAME[: GAME.index("time.sleep")].count("\n") + 1
    assert found(game("Slow"), "call_timeout=0.2")["step"] == (
        False,
        f"CallTimedOut: timed out after 0.2 s (task.call_timeout) (game.py, line {line})",
    )
    assert "not all words" not in found(game("Good"))["texts"][1]
    assert found(game("OnePlayer"))["can be made"][1].endswith("'random': list their names, for instance ('random',)")
    assert found(game("NoStarts"))["can be made"][1].endswith(
        "is 0: set the number of start states, or None if the seed draws them"
    )
    assert found(game("Letters"))["texts"][1].endswith("returned 'start yes no': return a list of texts")


def test_playing(game):
    mine = run("play", game("Good"), input="yes\nno\n").output
    assert "start" in mine and "over after 2 turns: return 1, turns 2" in mine
    unmeasured = run("play", game("Unmeasured"), input="yes\n").output
    assert unmeasured.endswith("over after 1 turn: return 1, right 1\n")
    with pytest.raises(EpisodeError, match="environment raised KeyError: 'maybe'"):
        run("play", game("Fragile"), input="maybe\n")
    left = run("play", game("Good"), input="yes\n").output
    assert "left after 1 turn: return 1" in left
    watched = run("play", game("Good"), "--player", "random", "--seed", 3).output
    assert (
        watched == run("play", game("Good"), "--player", "random", "--seed", 3).output
        and "over after 2 turns" in watched
    )
    with pytest.raises(RecipeError, match="--player optimal: the environment has random"):
        run("play", game("Good"), "--player", "optimal")


def test_watching_a_policy(game, tiny_folder):
    watched = run("play", game("Good"), "--policy", tiny_folder, "--max-new-tokens", 3).output
    assert watched.count("> ") == 2 and "over after 2 turns: return 0" in watched
    with pytest.raises(RecipeError, match="--beta weighs Q values, but '.*' has no Q heads"):
        run("play", game("Good"), "--policy", tiny_folder, "--beta", 4)


@pytest.mark.parametrize("option", ["--temperature", "--max-new-tokens", "--beta"])
def test_sampling_options_need_a_policy(game, option):
    with pytest.raises(RecipeError, match=f"^{option} is for a policy: add --policy, or leave it out"):
        run("play", game("Good"), "--player", "random", option, 1)
