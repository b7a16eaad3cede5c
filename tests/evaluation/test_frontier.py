"""Frontiers: divergence of checkpoints from the initial policy, by hand, and best-of-n at equal divergence."""

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lmrl
from lmrl import cli
from lmrl.errors import RecipeError, RunError
from lmrl.evaluation.frontier import BestOf, at_divergence, best_of_n, divergence_of, powers, start_of
from lmrl.evaluation.scoring import Scoring
from lmrl.trajectories.trajectory import Trajectory


@pytest.fixture(scope="module")
def run(tiny_folder, tmp_path_factory):
    """Four steps towards long completions of six prompts."""
    folder = tmp_path_factory.mktemp("frontier")
    rows = [{"prompt": f"say {number}"} for number in range(6)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judge.py").write_text(
        "def small(completions, **columns):\n    return [sum(map(str.islower, text)) / 8 for text in completions]\n"
    )
    (folder / "recipe.yaml").write_text(
        f"model: {{path: {tiny_folder}}}\n"
        "task: {prompts: {path: prompts.jsonl, holdout: 0}, rewards: [judge.py:small]}\n"
        "rollouts: {prompts: 6, samples: 4, max_new_tokens: 8}\nobjective: {name: rloo}\noptimizer: {lr: 0.01}\n"
        "training: {steps: 4, checkpoint_every: 2, keep_checkpoints: 5, final: last}\n"
    )
    lmrl.train(str(folder / "recipe.yaml"), [], output=folder / "run")
    return folder / "run"


def kl_by_hand(trajectories, checkpoint, start):
    """Mean over episodes of log(policy / start) of what was sampled, by transformers in float64."""
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(folder).double() for folder in (checkpoint, start)]
    found = []
    for one in trajectories:
        (segment,) = one.segments
        with torch.no_grad():
            own, other = (model(torch.tensor([segment.tokens])).logits[0].log_softmax(-1) for model in models)
        found.append(
            sum(float(own[at - 1, segment.tokens[at]] - other[at - 1, segment.tokens[at]]) for at in segment.actions)
        )
    return sum(found) / len(found)


def test_divergence_from_the_start_by_hand(run, tiny_folder):
    overrides = ["samples=3", "rollouts.temperature=1"]
    found = lmrl.frontier(run, overrides=overrides, checkpoints=["step-2", "final"], best_of=4)
    start, middle, last = found.points
    assert (start.label, start.kl, start.gain) == ("start", 0.0, 0.0)
    assert [middle.label, last.label] == ["step-2", "final"]
    for point, folder in ((middle, "checkpoints/step-000002"), (last, "final")):
        report = lmrl.evaluate(run, overrides=overrides, checkpoint=point.label)
        assert point.score == report.metrics["reward"]["mean"]
        expected = kl_by_hand(report.trajectories, run / "stages/main" / folder, tiny_folder)
        assert point.kl == pytest.approx(expected, abs=1e-4)
    assert 0 < middle.kl < last.kl
    assert last.kl_ci95[0] <= last.kl <= last.kl_ci95[1]


def test_yardstick_is_best_of_n_of_the_start(run, tiny_folder):
    found = lmrl.frontier(run, overrides=["samples=4"], checkpoints=["step-2"], best_of=4)
    assert [one.n for one in found.yardstick] == [1, 2, 4]
    assert found.yardstick[0].score == pytest.approx(found.points[0].score)  # of the same episodes
    assert found.yardstick[0].score < found.yardstick[1].score < found.yardstick[2].score
    (_, point) = found.points
    if point.best_of_n is not None:
        assert point.gain == pytest.approx(point.score - point.best_of_n)
    assert json.loads(found.to_json())["yardstick"][1]["kl"] == pytest.approx(math.log(2) - 1 / 2)


def test_numbers_of_samples():
    assert powers(1) == [1] and powers(16) == [1, 2, 4, 8, 16] and powers(12) == [1, 2, 4, 8, 12]
    assert divergence_of(1) == 0 and divergence_of(4) == pytest.approx(1.386294 - 0.75)


def test_between_two_n_the_yardstick_is_straight():
    yard = [BestOf(1, 0.0, 0.0, [0, 0]), BestOf(2, 0.2, 1.0, [0, 0]), BestOf(4, 0.6, 3.0, [0, 0])]
    assert at_divergence(yard, 0.1) == pytest.approx(0.5) and at_divergence(yard, 0.4) == pytest.approx(2.0)
    assert at_divergence(yard, -0.1) == 0.0 and at_divergence(yard, 0.7) is None


def test_start_is_where_the_last_stage_began(run, tmp_path, tiny_folder):
    assert Path(start_of(run)) == tiny_folder or Path(start_of(run)) == run / "stages/main/start"
    staged = tmp_path / "staged"
    recipe = (run / "recipe.yaml").read_text()
    (staged / "stages/warmup/final").mkdir(parents=True)
    (staged / "recipe.yaml").write_text(recipe.replace("stages: {}", "stages: {warmup: {training: {steps: 1}}}"))
    assert Path(start_of(staged)) == staged / "stages/warmup/final"
    (staged / "stages/warmup/final").rmdir()
    with pytest.raises(RunError, match="has left no"):
        start_of(staged)


def test_command_draws_a_picture(run, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["frontier", str(run), "--checkpoints", "final", "--best-of", "2"]
    arguments += ["--plot", str(tmp_path / "out.png"), "--json", str(tmp_path / "out.json")]
    shown = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "best of 2" in shown.output and (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out.json").read_text())["metric"] == "reward"


def test_greedy_suites_have_no_frontier(run):
    with pytest.raises(RecipeError, match="rollouts.temperature above 0"):
        lmrl.frontier(run, overrides=["rollouts.temperature=0"])
    with pytest.raises(RunError, match="is not a run"):
        lmrl.frontier(run / "stages")


def test_every_n_is_about_all_prompts():
    """Rewards 0 and 4 of one prompt; 3 of another, whose second sample was not judged."""
    judged = [(0, 0.0), (0, 4.0), (1, 3.0)]
    episodes = [
        Trajectory([], f"p{group}", "", reward=reward, components={"judge": reward}, group=group)
        for group, reward in judged
    ]
    means = [best_of_n(episodes, "reward", n, Scoring(["reward"])).score for n in (1, 2)]
    assert means == [(2 + 3) / 2, (4 + 3) / 2]


def test_failed_episodes_are_named(run, tmp_path):
    (tmp_path / "judge.py").write_text(
        "def some(prompts, completions):\n    return [None if prompt == 'say 1' else 1.0 for prompt in prompts]\n"
    )
    changes = [f"task.rewards={tmp_path / 'judge.py'}:some", "task.max_failed=0.5", "samples=2"]
    found = lmrl.frontier(run, overrides=changes, checkpoints=["step-2", "final"], best_of=2)
    failed = ", ".join(f"2 of 12 episodes of {label}" for label in ("start", "step-2", "final"))
    assert found.played.endswith(f"; failed and left out: {failed}")


def test_policies_with_q_values_are_refused(ilql_run):
    """Log-probabilities of the language model alone are not those of what it plays."""
    with pytest.raises(RecipeError, match=r"plays with Q values.* rollouts.beta=0 rollouts.support=0"):
        lmrl.frontier(ilql_run, overrides=["samples=2"])
    found = lmrl.frontier(ilql_run, overrides=["samples=2", "rollouts.beta=0", "rollouts.support=0"], best_of=2)
    assert found.points[-1].kl > 0
