"""Tasks of inspect_ai as suites, by the package itself: what is asked, answered and scored; where it is installed, with openai."""

import json
from importlib.util import find_spec

import pytest
import torch

import lmrl
from lmrl.engines.base import Sampling
from lmrl.engines.hf import HFEngine
from lmrl.errors import RecipeError, RunError
from lmrl.evaluation.bridges import inspect_options, inspect_task, is_foreign
from lmrl.policy.load import open_policy

# A folder of the same name without code would be found as well.
installed = all(find_spec(name) is not None and find_spec(name).origin for name in ("inspect_ai", "openai"))
needs_inspect = pytest.mark.skipif(not installed, reason="inspect-ai and openai are not installed")

TASKS = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import SampleScore, Score, includes, mean, metric, scorer
from inspect_ai.solver import generate, system_message

QUESTIONS = ["add", "be", "cat", "deed"]


@metric
def largest():
    def of(scores: list[SampleScore]) -> float:
        return max((one.score.as_float() for one in scores), default=0.0)
    return of


@scorer(metrics={"*": [mean(), largest()]})
def lengths():
    async def score(state, target):
        said = state.output.completion
        return Score(value={"characters": float(len(said)), "words": float(len(said.split()))})
    return score


@task
def letters(letter="a"):
    data = [Sample(input=one, target=letter, id=one, metadata={"place": n}) for n, one in enumerate(QUESTIONS)]
    return Task(data, solver=[system_message("Say it."), generate()], scorer=includes())


@task
def long():
    return Task([Sample(input="add", target="x")], solver=[generate()], scorer=lengths())


@task
def broken():
    def fail():
        async def solve(state, generate):
            raise ValueError("the solver is broken")
        return solve
    from inspect_ai.solver import solver
    return Task([Sample(input="add", target="x")], solver=[solver(fail)()], scorer=includes())
"""


@pytest.fixture(scope="module")
def model(tiny_folder, tmp_path_factory):
    """A model whose answers differ from prompt to prompt."""
    torch.manual_seed(0)
    policy = open_policy(str(tiny_folder))
    with torch.no_grad():
        for parameter in policy.causal_lm.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("inspected") / "model"
    policy.save(folder)
    return folder


@pytest.fixture
def tasks(tmp_path):
    path = tmp_path / "my_tasks.py"
    path.write_text(TASKS)
    return str(path)


@needs_inspect
def test_completions_are_the_engines(model, tasks, tmp_path):
    log = tmp_path / "log"
    report = lmrl.evaluate(model, f"inspect:{tasks}@letters", ["temperature=0", "max_tokens=12"], log=log)
    policy = open_policy(str(model))
    prompts = [f"[system]Say it.<eos>\n[user]{one}<eos>\n[assistant]" for one in ("add", "be", "cat", "deed")]
    tokens = [policy.tokenizer(one, add_special_tokens=False).input_ids for one in prompts]
    expected = HFEngine(policy).complete(tokens, Sampling(12, temperature=0), [("k", n) for n in range(4)])
    said = [policy.decode(one.tokens) for one in expected]
    assert [one.completion for one in report.trajectories] == said and len({*said}) > 1
    hits = [float("a" in text.lower()) for text in said]
    score = report.metrics["includes"]
    assert score["mean"] == pytest.approx(sum(hits) / 4) and score["n"] == score["clusters"] == 4
    assert [one.reward for one in report.trajectories] == hits
    first = report.trajectories[0]
    assert first.columns == {"id": "add", "epoch": 1, "target": "a", "place": 0}
    assert [turn.action for turn in first.turns] == said[:1] and first.turns[0].observation == "Say it.\nadd"
    assert report.suite == f"inspect:{tasks}@letters" and "4 samples of letters" in report.played
    (kept,) = log.iterdir()  # inspect_ai's own log, for its viewer
    from inspect_ai.log import read_eval_log

    assert read_eval_log(str(kept)).results.scores[0].metrics["accuracy"].value == pytest.approx(score["mean"])


@needs_inspect
def test_options_reach_the_task(model, tasks):
    changes = ["args={letter: b}", "samples=3", "limit=2", "max_tokens=6", "connections=2"]
    report = lmrl.evaluate(model, f"inspect:{tasks}@letters", changes)
    found = report.trajectories
    assert [one.columns["target"] for one in found] == ["b"] * 6
    assert [one.group for one in found] in ([0, 0, 0, 1, 1, 1], [0, 1] * 3)
    assert report.metrics["includes"]["n"] == 6 and report.metrics["includes"]["clusters"] == 2
    assert all(len(one.completion) <= 6 for one in found) and len({one.completion for one in found}) > 2


@needs_inspect
def test_several_values_and_own_metrics(model, tasks):
    report = lmrl.evaluate(model, f"inspect:{tasks}@long", ["samples=2", "max_tokens=8"])
    lengths = [float(len(one.completion)) for one in report.trajectories]
    assert report.metrics["lengths/characters"]["mean"] == pytest.approx(sum(lengths) / 2)
    named = [name for name in report.metrics if name.endswith("largest")]
    assert named and report.metrics[named[0]]["holds_for"] == "these samples alone"


@needs_inspect
def test_mistakes_are_named(model, tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without a task's name inspect_ai finds files in this folder alone
    with pytest.raises(RecipeError, match="inspect:nothing_like_it"):
        lmrl.evaluate(model, "inspect:nothing_like_it")
    with pytest.raises(RecipeError, match="it names 3 tasks"):
        lmrl.evaluate(model, "inspect:my_tasks.py", ["max_tokens=2"])
    with pytest.raises(RunError, match="could not finish it: .*the solver is broken"):
        lmrl.evaluate(model, f"inspect:{tasks}@broken")
    with pytest.raises(RecipeError, match="has no argument 'nothing'; it has letter"):
        lmrl.evaluate(model, f"inspect:{tasks}@letters", ["args={nothing: 1}"])
    with pytest.raises(RecipeError, match="unknown key 'limits'.*did you mean 'limit'"):
        lmrl.evaluate(model, f"inspect:{tasks}@letters", ["limits=1"])
    with pytest.raises(RecipeError, match="all `samples` of a prompt would be the same"):
        lmrl.evaluate(model, f"inspect:{tasks}@letters", ["seed=1", "samples=2"])
    with pytest.raises(RecipeError, match="it does not support --beta, --log-every or --overlap"):
        lmrl.evaluate(model, f"inspect:{tasks}@letters", betas=[1.0])
    with pytest.raises(RecipeError, match="can score an address itself"):
        lmrl.evaluate("http://127.0.0.1:1/v1#some-model", f"inspect:{tasks}@letters")
    with pytest.raises(RecipeError, match="scored, not compared"):
        lmrl.compare([model, model], f"inspect:{tasks}@letters")


def test_names_of_suites():
    assert (
        inspect_task("inspect:a.py@b") == "a.py@b" and inspect_task("lm-eval:a") is None and inspect_task(None) is None
    )
    assert is_foreign("inspect:a") and is_foreign("lm-eval:a") and not is_foreign("gsm8k")


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("lmrl.extras.find_spec", lambda name: None if name == "openai" else json.__spec__)
    with pytest.raises(RecipeError, match="inspect:TASK needs openai, .*install the extra 'inspect'"):
        inspect_options([])
