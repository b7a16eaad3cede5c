"""Exact resume: however a run is stopped, its weights and metrics end up equal to the bit."""

import json
import signal
from pathlib import Path

import pytest
import yaml

from lmrl.errors import RunError
from lmrl.recipe.files import load_recipe
from lmrl.training import resume_run, train
from tests.conftest import TINY_WALKS
from tests.launcher import launch
from tests.runs import assert_same_run, metrics, stopped_before

SMALL = [
    "task.nodes=8",
    "rollouts.max_new_tokens=10",
    "evaluation.episodes=4",
    "training.steps=6",
    "training.checkpoint_every=2",
    "stages.warmup.training.steps=4",
    "stages.warmup.source.episodes=40",
    "stages.warmup.source.batch_size=16",
    "rollouts.prompts=4",
    "rollouts.samples=2",
    "model.config.hidden_size=16",
    "model.config.intermediate_size=32",
    "objective.kl_coef=0.1",
    "objective.kl_target=1",
    "evaluation.every=3",
]


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    """SIGKILL in six places, a torn line and a SIGTERM; the resumed run equals the uninterrupted one."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    command = ["train", "random_walks/ppo", *SMALL, "--output"]
    done = launch(*command, str(whole))
    assert done.returncode == 0, done.stderr

    kill, term = int(signal.SIGKILL), int(signal.SIGTERM)
    first = launch(*command, str(torn), stop=("record", 2, kill))  # before any checkpoint
    assert first.returncode == -kill
    stops = [
        # what stops the process, what the resumed process says first
        (("_fsync", 3, kill), "there is no checkpoint yet: starting over"),  # in the warm-up's first checkpoint
        (("record", 5, kill), "starting over"),  # between two checkpoints of the warm-up
        (("_fsync", 12, kill), "resumed stage warmup at step 2"),  # around the end of the warm-up
        (("record", 6, term), "warmup"),  # in the second stage, asked politely
        (("record", 2, kill), "resumed stage main"),
    ]
    for stop, said in stops:
        with open(torn / "metrics.jsonl", "a") as file:
            file.write('{"stage": "main", "st')  # a line the kernel had only half of
        done = launch("train", str(torn), "--resume", stop=stop)
        assert said in done.stdout, (stop, done.stdout, done.stderr)
        assert done.returncode == (143 if stop[2] == term else -kill), (stop, done.stdout, done.stderr)
        if stop[2] == term:
            assert "saved a checkpoint at step" in done.stdout
    done = launch(*command, str(torn), "--resume")
    assert done.returncode == 0, done.stderr
    assert "stage warmup is finished: not run again" in done.stdout
    assert_same_run(whole, torn)
    assert not list(torn.glob("stages/**/.writing-*"))


@pytest.mark.parametrize("where", ["record", "publish"])
def test_killed_as_a_stage_ends(tmp_path, where):
    """Its closing lines are written once, whether the kill comes just before `final/` or just after."""
    whole, torn, kill = tmp_path / "whole", tmp_path / "torn", int(signal.SIGKILL)
    small = ["training.steps=2", "training.checkpoint_every=0", "evaluation.episodes=2", "evaluation.every=2"]
    command = ["train", "random_walks/bc", *TINY_WALKS, *small, "--output"]
    assert launch(*command, str(whole)).returncode == 0
    kinds = [json.loads(line)["kind"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    count = kinds.index("final") + 1 if where == "record" else len(list(whole.rglob("config.json")))
    assert launch(*command, str(torn), stop=(where, count, kill)).returncode == -kill
    assert (torn / "stages/main/final").exists() == (where == "publish")
    assert "final" in (torn / "metrics.jsonl").read_text()
    assert launch("train", str(torn), "--resume").returncode == 0
    assert_same_run(whole, torn, weights=1)


def prompt_recipe(tmp_path: Path, tiny_folder: Path, **changes) -> Path:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(12)))
    (tmp_path / "mine.py").write_text(
        "def vowels(completions, **_): return [sum(c < 'P' for c in t) for t in completions]"
    )
    data = {
        "model": {"path": str(tiny_folder), "lora": {"r": 4, "alpha": 8, "dropout": 0.1}, "dtype": "bfloat16"},
        "task": {"prompts": {"path": "prompts.jsonl"}, "rewards": [{"function": "mine.py:vowels"}]},
        "rollouts": {"prompts": 4, "max_new_tokens": 6},
        "objective": {"name": "ppo", "kl_coef": 0.1, "kl_target": 2.0, "minibatches": 2},
        "optimizer": {"lr": 1e-2, "schedule": "cosine"},
        "training": {"steps": 4, "checkpoint_every": 1, "threads": 1},
    } | changes
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "mine.yaml"


@pytest.mark.parametrize("kind", ["lora", "full", "adapter_after_adapter", "dora"])
def test_interrupted_at_a_step(tmp_path, tiny_folder, kind):
    """Adapters with dropout, full weights, a stage whose reference is a second adapter, and DoRA beside a whole head."""
    changes = {}
    if kind == "dora":
        lora = {
            "r": 4,
            "alpha": 8,
            "dropout": 0.1,
            "use_dora": True,
            "use_rslora": True,
            "modules_to_save": ["lm_head"],
        }
        changes["model"] = {"path": str(tiny_folder), "lora": lora}
    if kind == "full":
        changes["model"] = {"path": str(tiny_folder)}
    if kind == "adapter_after_adapter":
        changes["stages"] = {"first": {"training": {"steps": 2}, "objective": {"kl_coef": 0.0, "kl_target": None}}}
    recipe = load_recipe(prompt_recipe(tmp_path, tiny_folder, **changes))
    train(recipe, output=tmp_path / "whole")

    with stopped_before(3, stage="main"):
        train(recipe, output=tmp_path / "torn")
    resume_run(tmp_path / "torn")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "torn")
    for file in (tmp_path / "whole").glob("stages/main/final/**/*.safetensors"):
        other = tmp_path / "torn" / file.relative_to(tmp_path / "whole")
        assert file.read_bytes() == other.read_bytes(), file
    kls = [line["kl"] for line in metrics(tmp_path / "whole") if line["stage"] == "main" and line["kind"] == "train"]
    assert kls[0] == pytest.approx(0, abs=1e-6) and abs(kls[-1]) > 1e-4  # the reference stays where the stage began


@pytest.mark.parametrize(("steps", "saved"), [(3, {"start"}), (15, {"start", "checkpoints"})])
def test_stopped_before_the_first_step(tmp_path, tiny_folder, steps, saved):
    """Values have no units yet: new heads, resumed from the saved start or the guard's first checkpoint, are still new."""
    training = {"steps": steps, "threads": 1}
    recipe = load_recipe(prompt_recipe(tmp_path, tiny_folder, model={"path": str(tiny_folder)}, training=training))
    train(recipe, output=tmp_path / "whole")
    with stopped_before(1):
        train(recipe, output=tmp_path / "torn")
    assert {path.name for path in (tmp_path / "torn/stages/main").iterdir()} == saved
    resume_run(tmp_path / "torn")
    assert_same_run(tmp_path / "whole", tmp_path / "torn", weights=2)


def test_cutting_keeps_every_earlier_line(tmp_path):
    from lmrl.run import Run

    run = Run.create(tmp_path / "run", load_recipe("random_walks/bc"))
    for step in range(1, 6):
        run.record_samples([{"stage": "main", "step": step, "completion": "a\u2028b\x85c"}])
    run.cut("main", 4)
    assert len((tmp_path / "run" / "samples.jsonl").read_text().split("\n")[:-1]) == 4


def test_a_run_is_not_overwritten_nor_mixed_up(tmp_path, tiny_folder):
    recipe = load_recipe(prompt_recipe(tmp_path, tiny_folder), ["training.steps=1"])
    train(recipe, output=tmp_path / "run")
    with pytest.raises(RunError, match="holds a run: continue it with --resume"):
        train(recipe, output=tmp_path / "run")
    other = load_recipe(tmp_path / "mine.yaml", ["training.steps=1", "training.seed=1"])
    with pytest.raises(RunError, match="'training.seed' differs"):
        train(other, output=tmp_path / "run", resume=True)
    harmless = load_recipe(tmp_path / "mine.yaml", ["training.steps=1", "training.keep_checkpoints=5"])
    train(harmless, output=tmp_path / "run", resume=True)


def test_a_named_file_that_changed_is_told_of(tmp_path, tiny_folder, capsys):
    """Files that did not change are not, nor those that the recipe does not name."""
    train(load_recipe(prompt_recipe(tmp_path, tiny_folder), ["training.steps=1"]), output=tmp_path / "run")
    resume_run(tmp_path / "run")
    assert "has changed" not in capsys.readouterr().out
    rewards = tmp_path / "mine.py"
    rewards.write_text(rewards.read_text().replace("< 'P'", "> 'P'"))
    resume_run(tmp_path / "run")
    told = " ".join(capsys.readouterr().out.split())
    assert f"note: {rewards} has changed since the run began: from here on, its new content counts" in told
    assert told.count("has changed") == 1
    (tmp_path / "run/versions.json").write_text("torn")  # which a run can do without
    resume_run(tmp_path / "run")
    assert "has changed" not in capsys.readouterr().out
