"""The guard in runs that are broken on purpose."""

import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import lmrl
from lmrl import cli, training
from lmrl.errors import COLLAPSED
from lmrl.rollouts.sampler import Sampler
from lmrl.training.display import Display
from lmrl.training.listeners import guard
from lmrl.training.parallel.strategy import Strategy
from lmrl.training.stage import Stage
from lmrl.training.train import Result, resume_run
from tests.conftest import TINY_WALKS
from tests.runs import metrics, stopped_before

SIZES = [change for change in TINY_WALKS if not change.startswith("source.")]
BROKEN_AT, STEPS = 18, 34


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A policy that imitates the optimum well."""
    folder = tmp_path_factory.mktemp("good") / "run"
    changes = ["source.player=optimal", "source.batch_size=32", "training.steps=80", "optimizer.lr=1e-2"]
    result = lmrl.train("random_walks/bc", [*TINY_WALKS, *changes, "training.checkpoint_every=0"], output=folder)
    assert result.scores["BC"]["optimality"]["mean"] > 0.8
    return result.checkpoint


def recipe_from(start, *changes):
    own = ["objective={name: ppo, epochs: 1, minibatches: 2, value_warmup_steps: 2}", "optimizer.lr=1e-4"]
    own += [f"training.steps={STEPS}", "training.checkpoint_every=0", "rollouts.prompts=8", "rollouts.samples=4"]
    own += ["evaluation.episodes=4", "source={name: rollouts}", f"model.path={start}"]
    return lmrl.load_recipe("random_walks/bc", [*SIZES, *own, *changes])


def run_of(recipe, folder):
    """What the run printed, and its result."""
    console = Console(file=io.StringIO(), width=250)
    result = lmrl.train(recipe, output=folder, display=Display(console))
    return console.file.getvalue(), result


def lines(folder, kind):
    return [line for line in metrics(folder) if line["kind"] == kind]


def state_of(folder, name="final"):
    return json.loads((folder / "stages/main" / name / "state/trainer.json").read_text())


@pytest.fixture
def before_steps(monkeypatch):
    """Takes what is to be done to a stage before a step."""

    def use(work):
        original = Stage._step

        def step_of(self, step):
            work(self, step)
            original(self, step)

        monkeypatch.setattr(Stage, "_step", step_of)

    return use


def breaks(at=BROKEN_AT):
    """Weights that are lost before a step."""

    def work(stage, step):
        if step == at:
            with torch.no_grad():
                stage.policy.vocabulary.normal_(std=3, generator=torch.Generator().manual_seed(0))

    return work


def rewards(folder, first, last):
    found = [line["reward"] for line in lines(folder, "train") if first <= line["step"] <= last]
    return sum(found) / len(found)


# ----------------------------------------------------------------------------------------------------------------- collapse
def test_a_collapsed_run_goes_back_and_ends_well(good, tmp_path, before_steps):
    before_steps(breaks())
    said, result = run_of(recipe_from(good), tmp_path / "run")
    [line] = lines(tmp_path / "run", "guard")
    assert line["step"] in range(BROKEN_AT + 3, BROKEN_AT + 14) and line["lr_factor"] == guard.LR_FACTOR
    assert line["back_to"] < BROKEN_AT and line["rollbacks"] == 1
    assert f"reproduce with: lmrl replay {tmp_path / 'run' / line['bundle']}" in said
    [warning] = [one for one in lines(tmp_path / "run", "warning") if one["name"] == "collapse"]
    assert "lower optimizer.lr from 0.0001 to 3e-05" in warning["text"]
    assert f"back to step {line['back_to']}, learning rate x 0.3" in said
    assert said.rindex(f"warning at step {line['step']} of stage main: collapse") > said.index("Result")
    run = tmp_path / "run"
    assert rewards(run, line["step"] + 1, STEPS) > 0.9 * rewards(run, 1, BROKEN_AT - 1) > 0.5
    assert rewards(run, BROKEN_AT, line["step"]) < 0.5 * rewards(run, 1, BROKEN_AT - 1)
    assert result.ended is None and state_of(run)["ended"] is None
    assert state_of(run)["listeners"]["guard"]["lr_factor"] == guard.LR_FACTOR


def weights(folder):
    return [(folder / name).read_bytes() for name in ("model.safetensors", "heads.safetensors")]


@pytest.mark.parametrize("step", [BROKEN_AT + 1, BROKEN_AT + 14])
def test_the_guard_survives_a_resume(good, tmp_path, before_steps, step):
    """Stopped between the injury and the rollback, and after it."""
    recipe = recipe_from(good, "training.checkpoint_every=4", "training.keep_checkpoints=1")
    before_steps(breaks())
    run_of(recipe, tmp_path / "whole")
    [rollback] = lines(tmp_path / "whole", "guard")
    torn = tmp_path / "torn"
    with stopped_before(step):
        run_of(recipe, torn)
    resume_run(torn)
    assert metrics(torn) == metrics(tmp_path / "whole") and state_of(torn) == state_of(tmp_path / "whole")
    assert weights(torn / "stages/main/final") == weights(tmp_path / "whole/stages/main/final")
    assert (step > rollback["step"]) is (step == BROKEN_AT + 14)


def test_after_the_last_rollback_a_run_ends_with_its_best_policy(good, tmp_path, before_steps, monkeypatch):
    monkeypatch.setattr(guard, "MAX_ROLLBACKS", 0)
    before_steps(breaks())
    said, result = run_of(recipe_from(good), tmp_path / "run")
    [line] = lines(tmp_path / "run", "guard")
    assert state_of(tmp_path / "run")["step"] == line["step"] < STEPS
    assert (
        result.ended
        == f"guard: collapsed again after 0 rollbacks, the stage ends with the policy of step {line['back_to']}"
    )
    assert f"ended early: {result.ended}" in said
    checkpoints = tmp_path / "run/stages/main/checkpoints"
    assert weights(result.checkpoint) == weights(checkpoints / f"step-{line['back_to']:06d}")
    assert result.scores["PPO"]["optimality"]["mean"] > 0.8  # measured once more, of the policy that is left
    assert resume_run(tmp_path / "run").ended == result.ended


def test_stop_ends_at_once(good, tmp_path, before_steps):
    before_steps(breaks())
    _, result = run_of(recipe_from(good, "training.on_collapse=stop"), tmp_path / "run")
    assert "training.on_collapse=stop" in result.ended and len(lines(tmp_path / "run", "guard")) == 1
    assert result.scores["PPO"]["optimality"]["mean"] > 0.8


def test_a_strategy_that_cannot_go_back_leaves_the_best_checkpoint(good, tmp_path, before_steps, monkeypatch):
    monkeypatch.setattr(Strategy, "can_reload_weights", False)
    before_steps(breaks())
    said, result = run_of(recipe_from(good), tmp_path / "run")
    assert result.ended.startswith("guard: collapse, the stage ends with the policy of step ")
    assert "ddp cannot go back to it in the middle of a stage" in said
    kept = tmp_path / "run/stages/main/checkpoints" / f"step-{int(result.ended.rpartition(' ')[2]):06d}"
    assert weights(result.checkpoint) == weights(kept) and state_of(tmp_path / "run")["step"] < STEPS
    assert resume_run(tmp_path / "run").ended == result.ended


def test_warn_only_warns(good, tmp_path, before_steps):
    before_steps(breaks())
    _, result = run_of(recipe_from(good, "training.on_collapse=warn"), tmp_path / "run")
    said = [one for one in lines(tmp_path / "run", "warning") if one["name"] == "collapse"]
    assert len(said) == 1 and "set training.on_collapse=rollback" in said[0]["text"]
    assert not lines(tmp_path / "run", "guard") and result.ended is None and state_of(tmp_path / "run")["step"] == STEPS
    assert not (tmp_path / "run/stages/main/checkpoints/step-000000").exists()  # nobody needs it


def test_a_collapse_before_the_end_is_not_left_as_the_result(good, tmp_path, before_steps):
    before_steps(breaks(STEPS - 4))
    _, result = run_of(recipe_from(good), tmp_path / "run")
    assert "it was the last step" in result.ended and result.scores["PPO"]["optimality"]["mean"] > 0.8


def test_an_earlier_stage_that_collapsed_ends_the_run(good, tmp_path, before_steps, monkeypatch):
    monkeypatch.setattr(guard, "MAX_ROLLBACKS", 0)
    recipe = recipe_from(good, "stages.first={}", "training.steps=20", f"stages.first.training.steps={STEPS}")
    before_steps(lambda stage, step: breaks()(stage, step) if stage.name == "first" else None)
    _, result = run_of(recipe, tmp_path / "run")
    assert result.ended and not (tmp_path / "run/stages/main").exists() and "PPO" in result.scores
    went_on = resume_run(tmp_path / "run")  # from the best policy of the first
    assert went_on.ended is None and set(went_on.scores) >= {"PPO", "PPO (main)"}


def test_the_exit_code_of_a_collapse(tmp_path, monkeypatch):
    for ended, code in ((None, 0), ("guard: collapsed", COLLAPSED)):
        result = Result(tmp_path, {}, ended)
        monkeypatch.setattr(training, "train", lambda *args, result=result, **more: result)
        assert CliRunner().invoke(cli.app, ["train", "random_walks/bc"]).exit_code == code
    assert COLLAPSED == 3


def test_checkpoints_without_a_guard(good, tmp_path):
    recipe = recipe_from(good, "training.checkpoint_every=10", "training.steps=20")
    run_of(recipe, tmp_path / "run")
    main = tmp_path / "run/stages/main"
    for gone in [main / "final", *(one for one in (main / "checkpoints").iterdir() if one.name != "step-000010")]:
        shutil.rmtree(gone)
    kept = main / "checkpoints/step-000010/state/trainer.json"
    state = json.loads(kept.read_text())
    del state["listeners"]["guard"], state["ended"]
    kept.write_text(json.dumps(state))
    kept.with_name("checksums.json").unlink()  # which came later
    resume_run(tmp_path / "run")
    assert state_of(tmp_path / "run")["listeners"]["guard"]["tracker"]["kept"]["step"] >= 10


# ----------------------------------------------------------------------------------------------------------------- warnings
def repaid(monkeypatch, pay):
    """Let the episodes of training earn something else. pay: from reward and step."""
    original = Sampler.play

    def play(self, starts, samples, sampling, name, **more):
        episodes = original(self, starts, samples, sampling, name, **more)
        for one in episodes if "rollout" in name else ():
            reward = pay(one.reward, name[-1])
            for segment in one.segments:
                segment.rewards = [0.0] * len(segment.rewards)
            one.reward = reward
            for turn in one.turns:
                turn.reward = 0.0
            one.place_reward(reward)
        return episodes

    monkeypatch.setattr(Sampler, "play", play)


def names(folder):
    return [line["name"] for line in lines(folder, "warning")]


def test_text_outside_the_vocabulary_is_reported(tmp_path):
    (tmp_path / "game.py").write_text(
        "import lmrl\n\n"
        "class Game(lmrl.TextEnvironment):\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        return 'turn 7', {}\n\n"
        "    def step(self, action):\n"
        "        return '', 0.0, True, False, {}\n\n"
        "    def texts(self):\n"
        "        return ['turn 0123456789']\n"
    )
    (tmp_path / "game.yaml").write_text(
        "model: {config: {model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1,\n"
        "  num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 32}, tokenizer: word}\n"
        "task: {environment: game.py:Game}\n"
        "source: {name: rollouts}\n"
        "rollouts: {prompts: 2, samples: 2, max_new_tokens: 2}\n"
        "objective: {name: grpo}\n"
        "training: {steps: 2, threads: 1}\n"
        "evaluation: {suite: null}\n"
    )
    for level, expected in ("word", 1), ("char", 0):
        lmrl.train(tmp_path / "game.yaml", [f"model.tokenizer={level}"], output=tmp_path / level)
        found = [line["text"] for line in lines(tmp_path / level, "warning") if line["name"] == "unknown_text"]
        assert len(found) == expected and all("lacks '7'" in one and "model.tokenizer=char" in one for one in found)


def test_a_constant_reward_is_reported_once(good, tmp_path, monkeypatch):
    repaid(monkeypatch, lambda reward, step: 1.0)
    said, _ = run_of(recipe_from(good, "training.steps=20"), tmp_path / "run")
    assert names(tmp_path / "run") == ["no_signal"] and lines(tmp_path / "run", "warning")[0]["step"] == 10
    assert said.count("no signal: all episodes of a step earn the same") == 2  # as it is found, and in the end


def test_a_reversed_reward_is_a_collapse(good, tmp_path, monkeypatch):
    repaid(monkeypatch, lambda reward, step: reward if step < BROKEN_AT else -reward)
    _, result = run_of(recipe_from(good), tmp_path / "run")
    assert "collapse" in names(tmp_path / "run") and lines(tmp_path / "run", "guard")[0]["step"] <= BROKEN_AT + 12
    assert result.scores["PPO"]["optimality"]["mean"] > 0.8


def test_a_rate_thirty_times_too_high_is_found(good, tmp_path):
    changes = ["optimizer.lr=0.3", "training.kl_band=null", "objective.target_kl=null", "objective.clip=10"]
    _, result = run_of(recipe_from(good, *changes), tmp_path / "run")
    assert "collapse" in names(tmp_path / "run") and result.scores["PPO"]["optimality"]["mean"] > 0.8


def test_a_critic_blown_up_is_found(good, tmp_path, before_steps):
    def work(stage, step):
        if step == 12:
            with torch.no_grad():
                for parameter in stage.policy.values.parameters():
                    parameter.mul_(1000).add_(1000)

    before_steps(work)
    run_of(recipe_from(good, "task.graph=3"), tmp_path / "run")  # whose walks do not all end well, so that rewards vary
    found = [line for line in lines(tmp_path / "run", "warning") if line["name"] == "blind_critic"]
    assert found and found[0]["step"] <= 30 and "set optimizer.head_lr=" in found[0]["text"]


def test_a_healthy_run_is_left_alone(good, tmp_path):
    _, result = run_of(recipe_from(good), tmp_path / "run")
    assert "collapse" not in names(tmp_path / "run") and result.ended is None
