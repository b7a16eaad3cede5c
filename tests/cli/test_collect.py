"""`lmrl collect`: episodes read back equal those that were played."""

import json

import pytest
import typer
from typer.testing import CliRunner

from lmrl.cli.collect import command, parse_players
from lmrl.engines.hf import HFEngine
from lmrl.errors import RecipeError, RunError
from lmrl.policy.load import open_policy
from lmrl.recipe import RandomWalksTask, Rollouts
from lmrl.rollouts.collect import collect
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import build_task
from lmrl.trajectories.render import Renderer
from lmrl.trajectories.store import DatasetFile


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What `datasets` unpacks stays in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def episodes_of(path, tokenizer, history="all"):
    file = DatasetFile(str(path), Renderer(tokenizer), history)
    return [file[index] for index in range(len(file))]


@pytest.mark.parametrize("name", ["out", "out.jsonl"])
def test_a_mixture_of_players(tmp_path, tiny_policy, name):
    printed = run("random=0.5,optimal=0.5", "-e", "random_walks", "-n", 70, "-o", name, "task.graph=1001")
    assert printed.startswith("70 episodes, 70 turns, mean return 0.") and printed.strip().endswith(f"-> {name}")
    read = episodes_of(tmp_path / name, tiny_policy.tokenizer)
    assert {episode.player for episode in read} == {"random", "optimal"}
    task = build_task(RandomWalksTask(environment="random_walks", graph=1001), tiny_policy.tokenizer)
    players = {"random": 0.5, "optimal": 0.5}
    assert read == [one for part in collect(Sampler(task), players, Rollouts(), 70, 0) for one in part]
    assert [episode.episode for episode in read] == list(range(70))


@pytest.mark.parametrize("samples", [1, 3])
def test_a_policy_token_by_token(tmp_path, tiny_folder, samples):
    changes = ["rollouts.prompts=2", f"rollouts.samples={samples}", "rollouts.max_new_tokens=5"]
    printed = run(tiny_folder, "-e", "random_walks", "-n", 7, "-o", "out", "--temperature", 0.7, *changes)
    assert printed.startswith("7 episodes, 7 turns, ") and " tokens, mean return" in printed
    policy = open_policy(str(tiny_folder))
    read = episodes_of(tmp_path / "out", policy.tokenizer)
    task = build_task(RandomWalksTask(environment="random_walks"), policy.tokenizer)
    rollouts = Rollouts(prompts=2, samples=samples, max_new_tokens=5, temperature=0.7)
    sampler = Sampler(task, HFEngine(policy), policy.decode)
    played = [one for part in collect(sampler, None, rollouts, 7, 0) for one in part]
    for trajectory in played:
        trajectory.player = str(tiny_folder)
    assert read == played and all(one.segments[0].logprobs[-1] is not None for one in read)
    assert [one.group for one in read] == [number // samples for number in range(7)]
    assert all(one.prompt == read[one.group * samples].prompt for one in read)


def test_a_run_knows_its_task(tmp_path, tiny_folder):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.symlink_to(tiny_folder)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    task = RandomWalksTask(environment="random_walks", graph=1003, max_failed=0.3)
    (copy / "lmrl.json").write_text(json.dumps({"task": task.model_dump(), "suite": None, "dtype": "float32"}))
    changes = ["rollouts.max_new_tokens=4"]
    own = run(copy, "-n", 5, "-o", "own.jsonl", *changes)
    named = run(checkpoint, "-e", "random_walks", "-n", 5, "-o", "named.jsonl", "task.graph=1003", *changes)
    assert own.split(" -> ")[0] == named.split(" -> ")[0]
    with pytest.raises(RecipeError, match="name what to play, --environment NAME"):
        run(tiny_folder, "-n", 5)


def test_prompts_without_rewards_are_not_judged(tmp_path, tiny_folder):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    task = {"prompts": {"path": str(tmp_path / "prompts.jsonl"), "holdout": 0.5}}
    (copy / "lmrl.json").write_text(json.dumps({"task": task, "suite": None, "dtype": "float32"}))
    printed = run(copy, "-n", 3, "-o", "out.jsonl", "rollouts.max_new_tokens=4")
    assert "not judged" in printed
    read = episodes_of("out.jsonl", open_policy(str(copy)).tokenizer)
    assert {one.reward for one in read} == {None} and len({one.prompt for one in read}) == 1


def test_mistakes(tmp_path, tiny_folder):
    run("random", "-e", "random_walks", "-n", 2, "-o", "out")
    with pytest.raises(RunError, match="out exists: choose another destination, or overwrite it with --force"):
        run("random", "-e", "random_walks", "-n", 2, "-o", "out")
    run("random", "-e", "random_walks", "-n", 3, "-o", "out", "--force")
    for arguments, error, message in [
        (["random=1,best=1", "-e", "random_walks"], RecipeError, "POLICY: the environment has no player 'best'"),
        (["random", "-e", "random_walk"], RecipeError, "'random_walk' .--environment.; did you mean 'random_walks'"),
        (["random", "-e", "random_walks", "task.grph=1"], RecipeError, "unknown key 'task.grph'.*did you mean"),
        (["random", "-e", "random_walks", "rollouts.prompts=0"], RecipeError, "wrong value for 'rollouts.prompts'"),
        (["random", "-e", "nowhere.py:World"], Exception, "nowhere.py"),
    ]:
        with pytest.raises(error, match=message):
            run(*arguments, "-o", "new")
    assert not (tmp_path / "new").exists()
    for text in ("random=x", "random=-1", "random=0", "a=nan", "random="):
        with pytest.raises(RecipeError, match="does not name players with their shares"):
            parse_players(text)
    assert parse_players("random=0.9, optimal=0.1") == {"random": 0.9, "optimal": 0.1}


def test_an_interrupted_collection_keeps_what_was_played(tmp_path, tiny_policy, monkeypatch):
    import signal

    from lmrl.cli import collect as command
    from lmrl.training.interrupt import Interrupted

    add = command.Totals.add

    def add_then_interrupt(self, played):
        add(self, played)
        if self.episodes >= 64:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(command.Totals, "add", add_then_interrupt)
    with pytest.raises(Interrupted):
        run("random", "-e", "random_walks", "-n", 1000, "-o", "out")
    assert len(episodes_of(tmp_path / "out", tiny_policy.tokenizer)) == 64
