"""Evaluation by default, which policy is a stage's result, and the scores that the stage reports."""

import io
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import lmrl
from lmrl.errors import RunError
from lmrl.objectives.dpo import DPO
from lmrl.recipe.document import read_yaml
from lmrl.recipe.files import load_recipe
from lmrl.run import Run
from lmrl.run_folders import read_recipe
from lmrl.training import dry_run, resume_run, train
from lmrl.training.closing import closing_lines
from lmrl.training.display import Display
from lmrl.training.listeners import evaluation
from lmrl.training.listeners.evaluation import too_far
from lmrl.training.stage import Stage
from tests.conftest import TINY_WALKS
from tests.runs import metrics

OWN = [*TINY_WALKS, "evaluation.suite=task", "training.checkpoint_every=0"]
ONLINE = [*OWN, "source={name: rollouts}", "objective={name: rloo}", "rollouts.prompts=32", "rollouts.samples=4"]
BREAKS_AT = 52
BREAKING = [*OWN, "source.player=optimal", "source.batch_size=32", "training.steps=57", "optimizer.lr=1e-2"]
BREAKING += ["evaluation.every=25", "evaluation.episodes=28", "training.on_collapse=warn"]


def run_of(changes, folder, recipe="random_walks/bc"):
    console = Console(file=io.StringIO(), width=200)
    result = train(load_recipe(recipe, changes), output=folder, display=Display(console))
    return result, console.file.getvalue()


def state_of(folder):
    return json.loads((folder / "stages/main/final/state/trainer.json").read_text())


def evaluated(folder):
    return [(line["step"], line["kind"]) for line in metrics(folder) if line["kind"] in ("eval", "final")]


def test_margins_of_held_out_pairs_have_no_limits(monkeypatch):
    measured = {"accuracy": [0.5] * 4, "margin": [0.0] * 4}  # before the first step
    monkeypatch.setattr(evaluation, "measure_heldout", lambda *_: measured)
    stage = SimpleNamespace(
        objective=DPO,
        recipe=SimpleNamespace(evaluation=SimpleNamespace(episodes=None, metric=None)),
        source=SimpleNamespace(dataset=SimpleNamespace(heldout=lambda count: [None])),
        progress=SimpleNamespace(columns=[]),
    )
    scores = evaluation.Evaluation(None, 0, False, False)._heldout(stage)
    assert scores["heldout/margin"]["ci95"] == [0, 0]  # unlike 0 of 4 successes
    low, high = scores["heldout/accuracy"]["ci95"]
    assert 0 <= low < 0.5 < high <= 1


# ------------------------------------------------------------------------------------------------------------ by default
def test_a_run_is_scored_on_its_own_task(tmp_path):
    result, said = run_of([*ONLINE, "training.steps=20"], tmp_path / "run")
    steps = [line["step"] for line in metrics(tmp_path / "run") if line["kind"] == "eval"]
    assert steps == [0, 7, 14, 20]  # room for 204 episodes: with two evaluations between, 34 in each
    sizes = {line["return"]["n"] for line in metrics(tmp_path / "run") if line["kind"] in ("eval", "final")}
    assert sizes == {28}  # 4 from each of 7 start states
    assert list(result.scores)[0] == "RLOO" and "return" in result.scores["RLOO"]
    folder = tmp_path / "run"
    assert f"checkpoint: {folder}/stages/main/final\nscore it:   lmrl eval {folder}\n" in said
    assert said.endswith(f"export it:  lmrl export {folder} FOLDER\n")


def test_a_short_run_spares_nothing(tmp_path):
    result, _ = run_of([*ONLINE, "training.steps=3", "rollouts.prompts=8"], tmp_path / "run")
    assert evaluated(tmp_path / "run") == [] and result.scores == {}


def test_evaluation_changes_nothing_of_the_training(tmp_path):
    for name, suite in (("with", "task"), ("without", "null")):
        run_of([*ONLINE, "training.steps=4", f"evaluation.suite={suite}", "evaluation.every=1"], tmp_path / name)
    lines = [[line for line in metrics(tmp_path / name) if line["kind"] == "train"] for name in ("with", "without")]
    assert lines[0] == lines[1]
    assert evaluated(tmp_path / "without") == []


def test_a_dry_run_tries_the_evaluation(monkeypatch):
    console = Console(file=io.StringIO(), width=200)
    dry_run(load_recipe("random_walks/bc", [*ONLINE, "training.steps=20"]), Display(console))
    said = console.file.getvalue()
    assert "evaluation at step 0: return" in said and "evaluation at step 1: return" in said
    assert "checkpoint:" not in said  # it is deleted


def test_a_warm_up_from_scratch_is_scored_at_its_end(tmp_path):
    run_of([*OWN, "training.steps=4", "evaluation.episodes=7"], tmp_path / "run")
    assert evaluated(tmp_path / "run") == [(4, "eval")]


@pytest.mark.parametrize(("holdout", "different", "count"), [(0.25, 40, 10), (0, 40, 0), (0.25, 1, 0)])
def test_prompts_are_scored_on_held_out_rows(tmp_path, tiny_folder, holdout, different, count):
    prompts = [f"word {number % different} " for number in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (tmp_path / "reward.py").write_text(
        "def long(completions, **_):\n    return [len(one) / 9 for one in completions]\n"
    )
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{path: {tiny_folder}}}\n"
        f"task: {{prompts: {{path: prompts.jsonl, holdout: {holdout}}}, rewards: [{{function: 'reward.py:long'}}]}}\n"
        "rollouts: {prompts: 8, samples: 4, max_new_tokens: 4}\nobjective: {name: grpo}\ntraining: {steps: 13}\n"
    )
    result, shown = run_of([], tmp_path / "run", tmp_path / "recipe.yaml")
    assert "scores flatter" not in shown
    assert ("all rows have the same prompt, so none is held out" in shown) == (different == 1)
    lines = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    trained, scored = ({line["prompt"] for line in lines if line["kind"] == kind} for kind in ("train", "eval"))
    if not count:
        assert not scored and result.scores == {}
        return
    assert scored and not scored & trained
    assert {row: score["reward"]["n"] for row, score in result.scores.items()} == {"start": 10, "GRPO": 10}


# --------------------------------------------------------------------------------------------------------- what is left
@pytest.fixture
def breaks(monkeypatch):
    """Weights that break in the middle of a run which had improved."""
    original = Stage._step

    def step(self, number):
        original(self, number)
        if number == BREAKS_AT:
            with torch.no_grad():
                self.policy.vocabulary.normal_(std=3)

    monkeypatch.setattr(Stage, "_step", step)


@pytest.mark.parametrize("final", ["auto", "best", "last"])
def test_which_policy_a_broken_run_keeps(tmp_path, breaks, final):
    result, said = run_of([*BREAKING, f"training.final={final}"], tmp_path / "run")
    folder = tmp_path / "run/stages/main"
    state = state_of(tmp_path / "run")
    assert state["best"]["step"] == 50 and state["step"] == 57 and state["kept"] == (57 if final == "last" else 50)
    kept, other = (folder / f"checkpoints/step-0000{step}" for step in ((57, 50) if final == "last" else (50, 57)))
    left = (folder / "final/model.safetensors").read_bytes()
    assert left == (kept / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()

    row, rival = ("BC, best", "BC") if final == "last" else ("BC", "BC, last")
    assert set(result.scores) == {"data", "BC", row, rival, "optimum"}
    assert result.scores[row]["return"]["mean"] > result.scores[rival]["return"]["mean"] + 0.2
    which = "last" if final == "last" else "best"
    why = "the best evaluation, of step 50, is certainly better than the last one, " if final == "auto" else ""
    assert (
        f"stage main keeps the {which} policy ({why}training.final={final}); on fresh episodes: step 50 return" in said
    )


def test_reported_scores_did_not_select(tmp_path, breaks):
    """The final table's episodes are those of `lmrl eval`, not those of evaluations during training."""
    result, _ = run_of([*BREAKING, "evaluation.suite=random_walks"], tmp_path / "run")
    lines = metrics(tmp_path / "run")
    chosen = next(line for line in lines if line["kind"] == "eval" and line["step"] == 50)
    assert chosen["optimality"] != result.scores["BC"]["optimality"]
    overrides = ["episodes=28"]
    for checkpoint, row in (("final", "BC"), ("best", "BC"), ("step-57", "BC, last")):
        report = lmrl.evaluate(tmp_path / "run", overrides=overrides, checkpoint=checkpoint)
        assert report.metrics == result.scores[row]
    finals = [line for line in lines if line["kind"] == "final"]
    assert [(line["step"], line["policy"], line["kept"]) for line in finals] == [(57, 57, False), (57, 50, True)]


def test_without_a_certain_gain_the_last_is_kept(tmp_path):
    changes = [*BREAKING, "training.steps=12", "evaluation.every=4", "optimizer.lr=1e-7"]
    run_of(changes, tmp_path / "run")
    assert state_of(tmp_path / "run")["kept"] == 12
    folder = tmp_path / "run/stages/main"
    weights = [folder / name / "model.safetensors" for name in ("final", "checkpoints/step-000012")]
    assert not weights[1].exists() or weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("gone", [("final",), ("final", "checkpoints/step-000057")])
def test_the_choice_is_the_same_on_resume(tmp_path, breaks, gone):
    """Without `final/`, from the last checkpoint or from the best."""
    run_of([*BREAKING, "training.keep_checkpoints=9"], tmp_path / "whole")
    assert state_of(tmp_path / "whole")["kept"] == 50
    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    for name in gone:
        shutil.rmtree(tmp_path / "torn/stages/main" / name)
    resume_run(tmp_path / "torn")
    final = "stages/main/final/model.safetensors"
    assert (tmp_path / "whole" / final).read_bytes() == (tmp_path / "torn" / final).read_bytes()
    assert state_of(tmp_path / "whole") == state_of(tmp_path / "torn")
    for name in ("results.json", "samples.jsonl"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "torn" / name).read_text()
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "torn")


def test_the_scores_of_weights_that_were_rolled_back_select_nothing():
    """The checkpoint of their step holds the weights that the stage went back to."""
    stage = SimpleNamespace(
        progress=SimpleNamespace(best=None, step=0),
        recipe=SimpleNamespace(evaluation=SimpleNamespace(metric="return"), objective=None),
    )
    listener = evaluation.Evaluation(None, every=1)
    for step, value in [(1, 2.0), (2, 3.0)]:
        stage.progress.step, listener.values = step, {"0": value}
        listener.consider(stage, step, {"return": {"mean": value}})
    listener.rolled_back(stage, 1)
    assert stage.progress.best == {"step": 1, "metric": "return", "value": 2.0} and listener.best_values == {"0": 2.0}
    listener.rolled_back(stage, 1)  # nothing of this step is left to forget
    assert stage.progress.best["step"] == 1


def test_the_kl_limit_leaves_policies_out():
    def at(low):
        return {"kl": {"mean": low + 1, "ci95": [low, low + 2], "n": 9}}

    assert not too_far(at(1.9), 2.0) and too_far(at(2.1), 2.0)
    assert not too_far(at(2.1), None) and not too_far({}, 2.0)


@pytest.mark.parametrize(
    ("recipe", "changes", "lines"),
    [
        ("random_walks/ppo", [], ["score it:   lmrl eval runs/a", "export it:  lmrl export runs/a FOLDER"]),
        (
            "maze/ilql",
            [],
            ["score it:   lmrl eval runs/a", "export it:  lmrl export runs/a FOLDER --beta 64 --distill"],
        ),
        (
            "maze/ilql",
            ["objective.q_head=tied", "objective.trunk=shared", "objective.beta=8"],
            ["score it:   lmrl eval runs/a", "export it:  lmrl export runs/a FOLDER --beta 8"],
        ),
        (
            "dialogues/dpo",
            ["task.rewards=[]", "evaluation.suite=null"],
            [
                "score it:   lmrl eval runs/a --suite SUITE",
                "talk to it: lmrl chat runs/a",
                "export it:  lmrl export runs/a FOLDER",
            ],
        ),
        (
            "dialogues/reward_model",
            [],
            [
                "score texts: lmrl reward score runs/a/stages/main/final --data SAMPLES.jsonl",
                "serve it:    lmrl reward serve runs/a/stages/main/final",
            ],
        ),
    ],
)
def test_the_last_lines_are_commands_that_fit(tmp_path, monkeypatch, recipe, changes, lines):
    monkeypatch.chdir(tmp_path)
    run = SimpleNamespace(recipe=load_recipe(recipe, changes), folder=tmp_path.resolve() / "runs/a")
    said = closing_lines(run)
    assert said[0].split() == ["checkpoint:", "runs/a/stages/main/final"] and said[1:] == lines


# -------------------------------------------------------------------------------------------------------- runs of before
def test_an_older_run_continues_unchanged(tmp_path):
    recipe = load_recipe("random_walks/bc", ONLINE)
    Run.create(tmp_path / "run", recipe)
    data = read_yaml(tmp_path / "run/recipe.yaml").data
    del data["training"]["final"]
    data["evaluation"] |= {"suite": None, "every": 0}
    (tmp_path / "run/recipe.yaml").write_text(json.dumps(data))
    assert read_recipe(tmp_path / "run").evaluation.suite is None
    run = Run.resume(tmp_path / "run", recipe)
    assert (run.recipe.evaluation.suite, run.recipe.evaluation.every) == (None, 0)
    del run
    with pytest.raises(RunError, match=r"'evaluation\.every' differs"):
        Run.resume(tmp_path / "run", load_recipe("random_walks/bc", [*ONLINE, "evaluation.every=2"]))
