"""Episodes of a run, played again from its samples.jsonl."""

import json

import pytest
from typer.testing import CliRunner

import lmrl
from lmrl import cli
from lmrl.environments import TextEnvironment, version_of
from lmrl.errors import EpisodeError, RunError
from lmrl.rollouts.replay import differences, find_episodes, replay_episode
from lmrl.training.monitoring.measures import sample_line
from lmrl.trajectories.trajectory import Trajectory, Turn
from lmrl.visible import visible
from tests.conftest import TINY_WALKS

DICE = """
import lmrl
class Dice(lmrl.TextEnvironment):
    version = 3
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._roll(), {}
    def _roll(self):
        return str(self.np_random.integers(1000))
    def step(self, action):
        if action.startswith("9"):
            raise RuntimeError("nine")
        return self._roll(), float(len(action)), action.startswith("1"), False, {"metrics": {"first": len(action)}}
    def texts(self):
        return ["0123456789"]
"""
RECIPE = """
model: {config: {model_type: gpt2, n_embd: 16, n_layer: 1, n_head: 2, n_positions: 64}}
task: {environment: dice.py:Dice, max_turns: 3, max_failed: 1}
rollouts: {prompts: 8, max_new_tokens: 4}
objective: {name: ppo}
training: {steps: 2, checkpoint_every: 0, threads: 1}
evaluation: {episodes: 4}
"""


@pytest.fixture(scope="module")
def dice(tmp_path_factory):
    """A run in an environment whose states come from its seed, and which fails at times."""
    folder = tmp_path_factory.mktemp("dice")
    (folder / "dice.py").write_text(DICE)
    (folder / "recipe.yaml").write_text(RECIPE)
    lmrl.train(folder / "recipe.yaml", output=folder / "run")
    return folder


def samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def command(*arguments):
    return CliRunner().invoke(cli.app, ["replay", *map(str, arguments)])


def test_every_episode_comes_out_the_same(dice):
    lines = samples(dice / "run")
    kinds = {line["kind"] for line in lines}
    assert {"train", "eval"} <= kinds and any("failure" in line for line in lines)
    assert any(not line["terminated"] and len(line["turns"]) == 3 for line in lines)
    for line in lines:
        told, same = replay_episode(line)
        assert same and len(told) == 2, told
        assert told[0].startswith(f"episode {line['id']} of ") and ":Dice, version 3 (source " in told[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line | {"seed": line["seed"] + 1}, "turn 0: observation"),
        (lambda line: line["turns"][0].update(reward=7.5) or line, "turn 0: reward "),
        (lambda line: line | {"turns": line["turns"][:-1]}, "the episode goes on after turn 1"),
        (lambda line: line | {"turns": line["turns"] + line["turns"][:1]}, "turn 3: the episode is over, recorded: 4"),
        (lambda line: line | {"terminated": True}, "truncated, but recorded as the other"),
        (lambda line: line | {"final_observation": "x"}, "last observation '"),
        (lambda line: line | {"metrics": {"first": -1.0}}, "metrics {'first': "),
        (lambda line: line | {"failure": "environment raised ValueError: x"}, "no failure, recorded: environment raised"),
    ],
)  # fmt: skip
def test_a_difference_is_named(dice, change, message):
    lines = [line for line in samples(dice / "run") if len(line["turns"]) == 3 and not line["terminated"]]
    line = next(line for line in lines if "failure" not in line)
    told, same = replay_episode(change(line))
    assert not same and any(one.startswith(message) for one in told), told
    assert told[-1].endswith(": not the same")


def test_a_failure_of_the_model_is_not_looked_for(dice):
    """The environment does not know how much the model can read."""
    line = next(line for line in samples(dice / "run") if "failure" not in line)
    line |= {"turns": [], "reward": None, "failure": "model has 4 positions, but a first observation of 3 tokens ..."}
    assert replay_episode(line)[1]


def test_another_environment_is_named(dice):
    line = next(line for line in samples(dice / "run") if "failure" not in line)
    line["environment"] |= {"version": "2", "source": "0123"}
    told, same = replay_episode(line)
    assert same and told[1].startswith("the environment has changed since: version 3 (source ")
    assert ", version 2 (source 0123); seed " in told[0]


def test_the_command(dice):
    line = next(line for line in samples(dice / "run") if line["kind"] == "train")
    result = command(dice / "run", "--episode", line["id"])
    assert result.exit_code == 0 and result.output.endswith(": the same\n")
    with pytest.raises(RunError, match=r"holds no 'main/train/1/99': give an `id` .*such as main/eval/"):
        find_episodes(dice / "run", "main/train/1/99")


def test_one_episode_is_shown_turn_by_turn(dice, tmp_path):
    line = next(line for line in samples(dice / "run") if len(line["turns"]) == 3 and "failure" not in line)
    (tmp_path / "one.jsonl").write_text(json.dumps(line) + "\n")
    result = command(tmp_path / "one.jsonl")
    assert result.exit_code == 0
    expected = []
    for turn in line["turns"]:
        reward = [f"  {turn['reward']:+g}"] if turn["reward"] else []
        expected += [turn["observation"], f"> {turn['action']}", *reward]
    shown = result.output.splitlines()
    assert shown[: len(expected)] == [visible(text) for text in expected]
    assert shown[-1].startswith("3 turns, return ") and shown[-1].endswith(": the same")


def test_a_file_of_several_is_played_whole(dice, tmp_path):
    lines = [line for line in samples(dice / "run") if line["turns"]][:2]
    lines[1]["turns"][0]["action"] += "0"
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = command(tmp_path / "some.jsonl")
    assert result.exit_code == 1 and "> " not in result.output
    assert result.output.endswith("\n2 episodes: not all the same\n")
    assert command(tmp_path / "some.jsonl", "--episode", lines[0]["id"]).exit_code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "one.jsonl, line 1: is not a JSON object"), ('{"id": "a", "seed": 1}', "line 1: has no 'environment'")],
)
def test_broken_lines_are_refused(tmp_path, text, message):
    (tmp_path / "one.jsonl").write_text(text)
    with pytest.raises(RunError, match=message):
        find_episodes(tmp_path / "one.jsonl")


def test_a_hang_is_interrupted_again(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import lmrl, time\nclass Slow(lmrl.TextEnvironment):\n"
        "    def reset(self, *, seed=None, options=None):\n        return 'go', {}\n"
        "    def step(self, action):\n        time.sleep(30)\n"
    )
    made = {"name": f"{tmp_path}/slow.py:Slow", "options": {}, "max_turns": 3, "call_timeout": 0.2}
    failure = "environment timed out after 0.2 s (task.call_timeout)"
    line = {"id": "main/train/1/0", "environment": made | {"version": None, "source": None}, "seed": 1, "start": None}
    line |= {"prompt": "go", "turns": [{"observation": "go", "action": "a", "reward": 0.0}], "reward": None}
    told, same = replay_episode(line | {"failure": failure})
    assert same and told[-1] == f"1 turn, {failure}: the same"


def test_a_batch_that_stops_the_run_is_kept(dice, tmp_path, capsys):
    (tmp_path / "dice.py").write_text(
        DICE.replace('action.startswith("9")', "True").replace('"nine"', r'"nine\nin a row"')
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("max_failed: 1", "max_failed: 0.5"))
    with pytest.raises(EpisodeError, match="failed on 8 of 8"):
        lmrl.train(tmp_path / "recipe.yaml", output=tmp_path / "run", overrides=["evaluation.suite=null"])
    lines = samples(tmp_path / "run")
    assert [line["id"] for line in lines] == [f"main/failed/1/{number}" for number in range(8)]
    shown = capsys.readouterr().out
    assert "   8 x environment raised RuntimeError: nine in a row\n" in shown
    assert f"lmrl replay {tmp_path / 'run'} --episode main/failed/1/0" in shown
    result = command(tmp_path / "run", "--episode", "main/failed/1/7")
    assert result.exit_code == 0 and result.output.endswith(
        "environment raised RuntimeError: nine\nin a row: the same\n"
    )


def test_a_changed_environment_fails_the_command(dice, tmp_path):
    """Its file pays another reward since."""
    own = tmp_path / "dice.py"
    own.write_text(DICE.replace("float(len(action))", "float(len(action) + 1)"))
    lines = [line for line in samples(dice / "run") if line["turns"] and "failure" not in line]
    lines[0]["environment"]["name"] = f"{own}:Dice"
    (tmp_path / "samples.jsonl").write_text(json.dumps(lines[0]) + "\n")
    result = command(tmp_path, "--episode", lines[0]["id"])
    assert result.exit_code == 1 and "the environment has changed since" in result.output
    assert "turn 0: reward " in result.output


def test_numbered_starts_and_shipped_environments(tmp_path):
    own = [one for one in TINY_WALKS if not one.startswith("source.")]
    own += ["objective={name: ppo}", "source={name: rollouts}", "rollouts.prompts=4", "rollouts.samples=2"]
    lmrl.train("random_walks/bc", [*own, "training.steps=1"], output=tmp_path / "run")
    lines = [line for line in samples(tmp_path / "run") if "id" in line]
    assert {line["start"] for line in lines if line["kind"] == "train"} > {lines[0]["start"]}
    assert lines[0]["environment"]["options"]["nodes"] == 8
    assert all(replay_episode(line)[1] for line in lines)
    moved = lines[0] | {"start": (lines[0]["start"] + 1) % 4}
    assert not replay_episode(moved)[1]


class Chat(TextEnvironment):
    """Says messages, in the second turn as well."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.said = 0
        return self._say(), {}

    def _say(self):
        self.said += 1
        return [{"role": "user", "content": str(self.np_random.integers(1000))} for _ in range(self.said)]

    def step(self, action):
        return self._say(), 1.0, False, False, {}


@pytest.mark.parametrize("place", [None, 0, 1, "final"])
def test_messages_are_compared(place):
    environment = Chat()
    said = [environment.reset(seed=5)[0], environment.step("a")[0], environment.step("b")[0]]
    turns = [Turn(said[0], "a", 1.0), Turn(said[1], "b", 1.0)]
    trajectory = Trajectory([], "", "", terminated=False, reward=2.0, messages=said[0], turns=turns, seed=5)
    trajectory.final_observation = said[2]
    if place == "final":
        trajectory.final_observation = [{"role": "user", "content": "other"}]
    elif place is not None:
        turns[place].observation[0]["role"] = "system"  # the same text
    line = sample_line("main", 1, "train", trajectory, {"max_turns": 2})
    found = list(differences(Chat(), json.loads(json.dumps(line))))
    begin = {None: [], 0: ["turn 0: obs"], 1: ["turn 1: obs"], "final": ["last observation"]}[place]
    assert [one[: len(text)] for one, text in zip(found, begin, strict=True)] == begin


def test_samples_without_episodes(tmp_path):
    (tmp_path / "samples.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b", "reward": 1.0}) + "\n")
    with pytest.raises(RunError, match="holds no episode that can be played again: only those of environments can"):
        find_episodes(tmp_path, "main/train/1/0")


def test_versions(tmp_path):
    class Own(TextEnvironment):
        version = 1.5

    class Plain:
        pass

    assert version_of(Own())["version"] == "1.5"
    found = version_of(Plain())
    assert found["version"] is None and len(found["source"]) == 16  # of this file
    assert version_of(TextEnvironment())["version"] == lmrl.__version__
