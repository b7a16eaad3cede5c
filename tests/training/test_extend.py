"""A resumed run may have more steps: they equal those of a run planned for that length, or the difference is reported."""

import pytest

from lmrl.errors import RunError
from lmrl.objectives.ppo import PPO
from lmrl.recipe.files import load_recipe
from lmrl.recipe.objectives import PPOObjective
from lmrl.run_folders import read_recipe
from lmrl.training import resume_run, train
from lmrl.training.checkpoint import optimizer_of
from lmrl.training.extend import _note

PPO_TEXT = """
model: {path: MODEL}
task: {prompts: {path: prompts.jsonl}, rewards: [{function: "reward.py:long"}]}
rollouts: {prompts: 2, samples: 2, max_new_tokens: 4}
objective: {name: ppo, value_warmup_steps: 1}
training: {steps: 2, checkpoint_every: EVERY, threads: 1}
evaluation: {suite: null}
"""
BC = """
model: {config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_attention_heads: 2, num_key_value_heads: 2}}
task: {environment: random_walks, graph: 3, nodes: 8}
source: {name: dataset, player: random, episodes: 40, batch_size: 4}
rollouts: {max_new_tokens: 6, prompts: 2}
objective: {name: likelihood}
training: {steps: 2, threads: 1}
evaluation: {suite: null}
"""


def written(folder, text, **values):
    for name, value in values.items():
        text = text.replace(name, str(value))
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "{letter}"}}\n' for letter in "abcdef"))
    (folder / "reward.py").write_text(
        "def long(completions, **_):\n    return [float(len(set(one))) for one in completions]\n"
    )
    (folder / "mine.yaml").write_text(text)
    return folder / "mine.yaml"


def files_of(run):
    final = run / "stages/main/final"
    return {name: (final / name).read_bytes() for name in ("model.safetensors", "state/optimizer.safetensors")}


@pytest.mark.parametrize("every", [0, 1])
def test_more_steps_are_those_of_a_longer_run(tmp_path, tiny_folder, every):
    recipe = written(tmp_path, PPO_TEXT, MODEL=tiny_folder, EVERY=every)
    train(load_recipe(recipe, ["training.steps=4"]), output=tmp_path / "long")
    train(load_recipe(recipe), output=tmp_path / "short")
    before = files_of(tmp_path / "short")
    resume_run(tmp_path / "short", load_recipe(tmp_path / "short/recipe.yaml", ["training.steps=4"]))
    assert files_of(tmp_path / "short") == files_of(tmp_path / "long") != before
    assert read_recipe(tmp_path / "short").training.steps == 4
    steps = [(tmp_path / name / "metrics.jsonl").read_text().count('"kind": "train"') for name in ("short", "long")]
    assert steps == [4, 4]
    resume_run(tmp_path / "short")  # by its own recipe, which has the further steps as well
    assert files_of(tmp_path / "short") == files_of(tmp_path / "long")


def test_a_schedule_over_all_steps_is_reported(tmp_path, capsys):
    recipe = written(tmp_path, BC)
    train(load_recipe(recipe), output=tmp_path / "run")
    resume_run(tmp_path / "run", load_recipe(recipe, ["training.steps=4"]))
    out = capsys.readouterr().out
    assert (
        "note: stage main continues to step 4 instead of 2: optimizer.schedule=linear now spans 4 steps "
        "(at step 2 the learning rate was 0.5 of its peak, and is 0.75 of it with the new length)"
    ) in " ".join(out.split())
    assert "resumed stage main at step 2" in out


def test_a_blend_of_logs_has_the_schedule_of_a_log():
    """Which spans all steps, so that more of them change it."""
    logs = "source={name: blend, batch_size: 4, parts: [{name: a, log: {player: random, episodes: 40}}]}"
    old, new = (load_recipe("random_walks/bc", [logs, f"training.steps={steps}"]) for steps in (2, 4))
    assert "optimizer.schedule=linear now spans 4 steps" in _note("main", old, new)


@pytest.mark.parametrize(("optimizer", "said"), [("namo", True), ("adamw", False)])
def test_a_line_of_entropy_over_all_steps_is_reported(optimizer, said):
    changes = [f"optimizer.name={optimizer}", "evaluation.suite=null"]
    old, new = (load_recipe("random_walks/ppo", [*changes, f"training.steps={steps}"]) for steps in (2, 4))
    assert ("by a line over 4 steps" in _note("main", old, new)) == said


def test_a_mixture_whose_share_changes_is_refused(tmp_path):
    mixture = "source={name: mixture, player: random, episodes: 40, batch_size: 4, replay: 8}"
    changes = [mixture, "objective={name: mc}"]
    recipe = written(tmp_path, BC)
    train(load_recipe(recipe, changes), output=tmp_path / "run")
    before = files_of(tmp_path / "run")
    with pytest.raises(RunError, match="training.steps cannot be raised: source.online changes over all steps"):
        resume_run(tmp_path / "run", load_recipe(recipe, [*changes, "training.steps=4"]))
    assert files_of(tmp_path / "run") == before and read_recipe(tmp_path / "run").training.steps == 2


def test_a_stage_that_others_started_from_keeps_its_steps(tmp_path):
    recipe = written(tmp_path, BC)
    stages = ["stages={first: {optimizer: {lr: 0.01}}}", "training.checkpoint_every=0"]
    train(load_recipe(recipe, stages), output=tmp_path / "run")
    message = "training.steps cannot be raised: stage first is finished, and main started from it: set stages.first.training.s"
    with pytest.raises(RunError, match=message):
        resume_run(tmp_path / "run", load_recipe(recipe, [*stages, "training.steps=3"]))
    more = ["training.steps=3", "stages.first.training.steps=2"]
    resume_run(tmp_path / "run", load_recipe(recipe, [*stages, *more]))
    assert read_recipe(tmp_path / "run").stages["first"]["training"]["steps"] == 2
    with pytest.raises(
        RunError, match="training.steps=2 is less than the run's 3: a resumed run may only have more steps"
    ):
        resume_run(tmp_path / "run", load_recipe(recipe, [*stages, "stages.first.training.steps=2"]))


def test_a_stage_keeps_the_optimizer_that_it_began_with(tmp_path, tiny_folder, monkeypatch):
    """Where the recipe leaves it open, the choice may depend on how the stage was launched; PPO's `value_pull` follows it."""
    pulls, state = [], PPO.state
    monkeypatch.setattr(PPO, "state", lambda self: pulls.append(self.value_pull) or state(self))
    recipe = written(tmp_path, PPO_TEXT, MODEL=tiny_folder, EVERY=1)
    train(load_recipe(recipe), output=tmp_path / "run")
    assert optimizer_of(tmp_path / "run/stages/main/final") == "namo"
    monkeypatch.setattr(PPOObjective, "small_optimizer", lambda *_: "adamw")
    resume_run(tmp_path / "run", load_recipe(recipe, ["training.steps=3"]))
    assert optimizer_of(tmp_path / "run/stages/main/final") == "namo"
    assert set(pulls) == {0.1}
