"""Reward models as stages: they learn, resume to the bit, and judge the stages after them."""

import json
import os
import random
import signal

import pytest
import torch
import transformers
import yaml

import lmrl.run
from lmrl.errors import ModelError, NonFiniteError, RecipeError, RunError
from lmrl.recipe.files import load_recipe
from lmrl.training import dry_run, resume_run, train
from lmrl.training.interrupt import Interrupted
from lmrl.training.reward_model import pairs_at_once

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def write_pairs(path, count=120):
    """Preferences for vowels: chosen completions have three, rejected ones none."""
    rng = random.Random(0)
    with open(path, "w") as file:
        for number in range(count):
            chosen, rejected = ("".join(rng.choices(letters, k=3)) for letters in ("aeiou", "bcdfg"))
            noise = rng.choices("xyz", k=3)
            row = {
                "prompt": f"{number % 60}: ",
                "chosen": chosen + "".join(noise),
                "rejected": rejected + "".join(noise),
            }
            file.write(json.dumps(row) + "\n")


def write_recipe(tmp_path, **changes):
    write_pairs(tmp_path / "pairs.jsonl")
    data = {
        "model": {"config": TINY},
        "source": {"name": "dataset", "path": "pairs.jsonl", "batch_size": 8},
        "objective": {"name": "reward_model", "holdout": 0.2, "max_length": 32},
        "optimizer": {"lr": 3e-3},
        "training": {"steps": 6, "checkpoint_every": 2, "threads": 1, "microbatch_tokens": 128},
    } | changes
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    return tmp_path / "mine.yaml"


def stages_recipe(tmp_path, tiny_folder, **changes):
    """Imitate the chosen and the rejected, learn what is preferred, and improve by it."""
    data = {
        "model": {"path": str(tiny_folder), "lora": {"r": 4}},
        "task": {"prompts": {"path": "pairs.jsonl"}, "rewards": [{"model": "stages/rm", "normalize": "running"}]},
        "stages": {
            "warmup": {
                "source": {"name": "dataset", "path": "pairs.jsonl", "batch_size": 4},
                "objective": {"name": "likelihood"},
            },
            "rm": {
                "source": {"name": "dataset", "path": "pairs.jsonl", "batch_size": 4},
                "objective": {"name": "reward_model", "max_length": 32},
            },
        },
        "source": {"name": "rollouts"},
        "objective": {"name": "ppo"},
        "rollouts": {"prompts": 4, "max_new_tokens": 6},
        "training": {"steps": 2, "checkpoint_every": 1, "threads": 1},
    } | changes
    return write_recipe(tmp_path, **data)


def lines(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in found if line["kind"] not in ("check", "memory")]  # every process measures these anew
    return [{name: value for name, value in line.items() if name != "time"} for line in found]


def weights(run, stage="main"):
    return (run / "stages" / stage / "final" / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------------------- the stage
def test_it_learns_and_leaves_a_transformers_classifier(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path), ["training.steps=40", "evaluation.every=20"])
    result = train(recipe, output=tmp_path / "run")
    row = result.scores["reward model"]
    assert row["accuracy"]["mean"] > 0.95 and row["accuracy"]["n"] == 24
    assert row["margin"]["ci95"][0] > 0.5 and row["brier"]["mean"] < 0.15
    kinds = [(line["kind"], line["step"]) for line in lines(tmp_path / "run") if line["kind"] == "eval"]
    assert kinds == [("eval", 20), ("eval", 40)]

    model = transformers.AutoModelForSequenceClassification.from_pretrained(result.checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.checkpoint)
    assert model.config.num_labels == 1 and tokenizer.model_max_length == 32

    def reward(text):
        with torch.no_grad():
            return float(model(input_ids=tokenizer(text + "<eos>", return_tensors="pt").input_ids).logits)

    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert samples[-1]["rewards"] == pytest.approx(
        [reward(samples[-1]["prompt"] + samples[-1][side]) for side in ("chosen", "rejected")], abs=1e-5
    )


class Killed(BaseException):
    pass


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("where", "call"),
    [("record", 1), ("record", 5), ("_fsync", 3), ("_fsync", 14)],
    ids=["before a checkpoint", "between checkpoints", "in the first checkpoint", "in a later checkpoint"],
)
def test_a_killed_run_resumes_to_the_bit(tmp_path, tiny_folder, monkeypatch, where, call, lora):
    model = {"path": str(tiny_folder), "lora": {"r": 4, "dropout": 0.1}, "dtype": "bfloat16"}
    optimizer = {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 2}
    recipe = load_recipe(write_recipe(tmp_path, optimizer=optimizer, **({"model": model} if lora else {})))
    train(recipe, output=tmp_path / "whole")

    home, calls = (lmrl.run.Run if where == "record" else lmrl.run), 0
    original = getattr(home, where)

    def stop(*arguments):
        nonlocal calls
        calls += 1
        original(*arguments)
        if calls == call:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(home, where, stop)
        with pytest.raises(Killed):
            train(recipe, output=tmp_path / "torn")
    resume_run(tmp_path / "torn")
    assert lines(tmp_path / "torn") == lines(tmp_path / "whole")
    assert weights(tmp_path / "torn") == weights(tmp_path / "whole")
    checkpoints = tmp_path / "torn" / "stages" / "main" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-000004", "step-000006"]


@pytest.mark.parametrize("step", [3, 6])
def test_sigterm_saves_first(tmp_path, monkeypatch, step):
    recipe = load_recipe(write_recipe(tmp_path))
    train(recipe, output=tmp_path / "whole")
    original, calls = torch.optim.AdamW.step, 0

    def stop(*arguments, **more):
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", stop)
        with pytest.raises(Interrupted):
            train(recipe, output=tmp_path / "torn")
    assert (tmp_path / "torn" / "stages" / "main" / "checkpoints" / f"step-{step:06d}").is_dir()
    resume_run(tmp_path / "torn")
    assert lines(tmp_path / "torn") == lines(tmp_path / "whole")
    assert weights(tmp_path / "torn") == weights(tmp_path / "whole")


def test_the_size_of_microbatches_changes_nothing(tmp_path):
    recipe = write_recipe(tmp_path)
    small = train(load_recipe(recipe, ["training.microbatch_tokens=16"]), output=tmp_path / "small").scores
    large = train(load_recipe(recipe, ["training.microbatch_tokens=4096"]), output=tmp_path / "large").scores
    for metric in ("accuracy", "margin", "brier"):
        mean = small["reward model"][metric]["mean"]
        assert mean == pytest.approx(large["reward model"][metric]["mean"], abs=1e-4)


def test_too_many_skipped_updates_stop_the_stage(tmp_path):
    broken = load_recipe(write_recipe(tmp_path), ["optimizer.lr=1e30", "training.max_nonfinite=2"])
    with pytest.raises(NonFiniteError, match="2 updates in a row had a non-finite loss or gradient"):
        train(broken, output=tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------- in a recipe
def test_three_stages_in_one_recipe(tmp_path, tiny_folder):
    """Warm-up, reward model and PPO: the policy comes from the warm-up, its reward from the stage in between."""
    recipe = load_recipe(stages_recipe(tmp_path, tiny_folder))
    dry_run(recipe)
    result = train(recipe, output=tmp_path / "run")
    assert "reward model" in result.scores
    last = [line for line in lines(tmp_path / "run") if line["kind"] == "train"][-1]
    assert last["stage"] == "main" and "reward/rm" in last and "reward" in last

    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    played = [line for line in samples if line["stage"] == "main"]
    from lmrl.rewards.model import RewardModel

    judge = RewardModel(str(tmp_path / "run" / "stages" / "rm" / "final"))
    cut = [line.get("completion_cut", False) for line in played]
    assert any(cut) and not all(cut)
    expected = judge([line["prompt"] for line in played], [line["completion"] for line in played], cut)
    assert [line["components"]["rm"] for line in played] == pytest.approx(expected, abs=1e-5)

    # A checkpoint finds its reward where the run lies now.
    (tmp_path / "run").rename(tmp_path / "moved")
    report = lmrl.evaluate(tmp_path / "moved", suite="sentiment", overrides=["episodes=2"])
    assert "rm" in report.metrics
    assert result.checkpoint.name == "final"


def test_a_policy_does_not_start_from_a_reward_model(tmp_path, tiny_folder):
    """With a learning rate that changes nothing, PPO ends with the adapter of the warm-up two stages before."""
    changes = [
        "optimizer.lr=1e-30",
        "training.steps=1",
        "stages.warmup.optimizer.lr=1e-2",
        "stages.rm.optimizer.lr=1e-2",
    ]
    train(load_recipe(stages_recipe(tmp_path, tiny_folder), changes), output=tmp_path / "run")
    stages = tmp_path / "run" / "stages"
    warmup, main = ((stages / name / "final" / "adapter_model.safetensors").read_bytes() for name in ("warmup", "main"))
    assert warmup == main


def test_running_statistics_survive_a_stop(tmp_path, tiny_folder, monkeypatch):
    recipe = load_recipe(stages_recipe(tmp_path, tiny_folder), ["training.steps=4"])
    train(recipe, output=tmp_path / "whole")
    original = lmrl.run.Run.record

    def stop(self, line):
        original(self, line)
        if (line["stage"], line["step"]) == ("main", 3):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(lmrl.run.Run, "record", stop)
        with pytest.raises(Killed):
            train(recipe, output=tmp_path / "torn")
    resume_run(tmp_path / "torn")
    assert lines(tmp_path / "torn") == lines(tmp_path / "whole")
    kept = [tmp_path / name / "stages" / "main" / "final" / "state" / "rewards.json" for name in ("torn", "whole")]
    assert kept[0].read_text() == kept[1].read_text() and json.loads(kept[0].read_text())["rm"]["count"] == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["start=rm"], "`start`: stage 'rm' trains a reward model, and leaves no policy to start from"),
        (["task.rewards.0.model=stages/mr"], "no stage 'mr' trains a reward model; valid here: rm"),
        (["task.rewards.0.model=stages/warmup"], "no stage 'warmup' trains a reward model"),
        (
            ["stages.warmup.source={name: rollouts, best: 0.5}"],
            "stage warmup is judged by stage rm, which is trained later: move rm before warmup",
        ),
        (["stages.rm.source.best=0.5"], "have no returns to rank them by: leave source.best at 1"),
        (
            ["stages.rm.source={name: rollouts}"],
            "learns from pairs of a chosen and a rejected completion: set source.name",
        ),
        (["stages.rm.evaluation.suite=sentiment"], "`stages.rm.evaluation.suite`: a reward model plays no suite"),
        (
            ["stages.rm.rollouts.samples=2"],
            "`stages.rm.rollouts`: a reward model is trained on pairs, and plays nothing",
        ),
        (["task=null"], "missing key 'task': what the policy plays"),
    ],
)
def test_invalid_combinations_are_refused(tmp_path, tiny_folder, changes, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(stages_recipe(tmp_path, tiny_folder), changes)


def test_a_reward_model_run_is_no_policy(tmp_path):
    train(load_recipe(write_recipe(tmp_path), ["training.steps=1"]), output=tmp_path / "run")
    with pytest.raises((ModelError, RunError, RecipeError), match="reward model"):
        lmrl.evaluate(tmp_path / "run", suite="sentiment")


# ------------------------------------------------------------------------------------------------------------------- data


def test_pairs_at_once_divide_the_batch():
    assert pairs_at_once(16, 100, 4096) == 16
    assert pairs_at_once(16, 200, 4096) == 8
    assert pairs_at_once(6, 200, 2000) == 3
    assert pairs_at_once(7, 200, 2000) == 1
    assert pairs_at_once(16, 5000, 4096) == 1


def test_plain_text_goes_to_the_trainer_as_trl_tokenizes_it(tmp_path, tiny_folder):
    """trl's own preparation of the same pairs as the reference."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from lmrl.policy.classifier import Classifier

    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    row = {"prompt": "hm: ", "chosen": "yes", "rejected": "no<eos>"}
    arguments = RewardConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True)
    trainer = RewardTrainer(model, arguments, train_dataset=Dataset.from_list([row]), processing_class=tokenizer)
    prepared = trainer.train_dataset[0]
    own = Classifier(model, tokenizer)
    assert own.tokens(row["prompt"], row["chosen"]) == prepared["chosen_ids"]
    assert own.tokens(row["prompt"], row["rejected"], special_tokens="parse") == prepared["rejected_ids"]
    assert prepared["chosen_ids"][-1] == tokenizer.eos_token_id
