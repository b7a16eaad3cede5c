"""Exported students of guided policies: the targets and states they learn from, and that they match their teachers."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import lmrl
from lmrl.cli.export import command
from lmrl.errors import ModelError, RecipeError, RunError
from lmrl.evaluation import distill
from lmrl.evaluation.distill import Distillation, States, thinned
from lmrl.evaluation.export import export
from lmrl.policy.load import open_policy
from lmrl.run_folders import final_checkpoint
from lmrl.trajectories.batch import Batch, Sequence, to_batch
from lmrl.trajectories.trajectory import Segment, Trajectory
from tests.conftest import TINY_WALKS

BETA = 2.0
HEADS = {
    "separate": "{name: ilql, q_head: mlp, support: 0.05}",
    "categories": "{name: mc, q_head: mlp, trunk: detached, value_loss: hl_gauss, support: 0}",
    "probability": "{name: q_sft, support: 0.02}",
}
SMALL = "model.config.initializer_range=0.02"
"""Initial weights of a policy that is close to uniform, which a student can match in few steps."""


def run_of_kind(folder, objective, *changes):
    """A run of a single step, whose Q heads are then drawn: unlike learned ones, they are strong wherever one looks."""
    steps = ["training.steps=1", "training.checkpoint_every=0", "evaluation.suite=null"]
    lmrl.train("random_walks/bc", [*TINY_WALKS, SMALL, *changes, f"objective={objective}", *steps], output=folder)
    final = final_checkpoint(folder)
    policy = open_policy(str(final))
    torch.manual_seed(0)
    for part in (policy.values.target_q, policy.values.target_trunk):
        for parameter in part.parameters() if part is not None else ():
            torch.nn.init.normal_(parameter.data, std=0.2)
    if policy.values.spec.q != "probability":
        policy.values.calibrate(start=0.0, mean=0.0, scale=2.0, low=-40.0, high=40.0)
    policy.save(final)
    return folder


@pytest.fixture(scope="module", params=["categories", "probability"])
def guided_run(tmp_path_factory, request):
    return run_of_kind(tmp_path_factory.mktemp(request.param) / "run", HEADS[request.param])


@pytest.fixture(scope="module")
def separate_run(tmp_path_factory):
    return run_of_kind(tmp_path_factory.mktemp("alone") / "run", HEADS["separate"])


@pytest.fixture
def short(monkeypatch):
    """Rounds that take a second, and a rate at which tiny models learn something in them."""
    monkeypatch.setattr(distill, "default_rates", lambda *_: SimpleNamespace(lr=1e-2))
    monkeypatch.setattr(distill, "ROUND", 20)
    monkeypatch.setattr(distill, "EPISODES", 12)
    monkeypatch.setattr(distill, "WARMUP", 3)


def distillation(run, beta=BETA):
    return Distillation(final_checkpoint(run), run, beta)


def by_definition(teacher, logits, q, beta, support):
    """KL(guided || student) of one state, in float64 and token by token."""
    policy = torch.tensor(teacher, dtype=torch.float64).softmax(-1)
    weights = policy * (beta * torch.tensor(q, dtype=torch.float64)).exp()
    weights[(policy < support) & (policy < policy.max())] = 0
    guided = weights / weights.sum()
    student = torch.tensor(logits, dtype=torch.float64).softmax(-1)
    return sum(float(p * (p / s).log()) for p, s in zip(guided, student, strict=True) if p > 0)


# ------------------------------------------------------------------------------------------------------------------ parts
def test_divergence_of_a_state(separate_run):
    """Against the definition; the token that the mask rules out has the highest Q and no share in it."""
    work = distillation(separate_run)
    teacher, q, student = [[3.0, 1.0, -4.0]], [[0.0, 1.0, 9.0]], [[0.5, -0.5, 2.0]]
    work.teacher = SimpleNamespace(
        states=lambda micro: SimpleNamespace(logits_NV=torch.tensor(teacher), q_NV=torch.tensor(q))
    )
    work.student = SimpleNamespace(logits=lambda micro: torch.tensor(student))
    expected = by_definition(teacher[0], student[0], q[0], BETA, 0.05)
    assert float(work._kl(None)) == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(by_definition(teacher[0], student[0], q[0], BETA, 0.0), rel=0.1)


def test_half_of_a_batch_is_logged():
    logged = SimpleNamespace(
        taken=[], take=lambda first, count: logged.taken.append((first, count)) or [episode] * count
    )
    segment = Segment()
    segment.observe([1, 2])
    segment.act([3], None, 0)
    episode = Trajectory([segment], "", "")
    states = States([logged], 5, 10, ("a", "test"))
    states.add([Sequence(torch.tensor([7, 8]), torch.tensor([0]), torch.tensor([8]))])
    batches = [states.batch(step) for step in range(3)]
    assert logged.taken == [(0, 5), (5, 5), (10, 5)]
    assert [[len(one.tokens) for one in batch.sequences] for batch in batches] == [[3] * 5 + [2] * 5] * 3
    states.logs = []
    assert [len(one.tokens) for one in states.batch(0).sequences] == [2] * 5


def test_long_sequences_are_thinned():
    sequence = Sequence(torch.arange(100), torch.arange(99), torch.arange(1, 100))
    few = thinned(sequence, 10, np.random.default_rng(0))
    assert len(set(few.states.tolist())) == 10 and torch.equal(few.targets, few.states + 1)
    assert torch.equal(few.tokens, sequence.tokens) and thinned(sequence, 99, None) is sequence


def test_a_microbatch_stays_under_the_limit(separate_run):
    """No table of states by vocabulary is larger than the limit allows."""
    work = distillation(separate_run)
    work.states.longest = 6
    batch = Batch([thinned(one, 6, np.random.default_rng(0)) for one in to_batch(work.play(work.student, 1)).sequences])
    assert max(micro.targets_N.numel() for micro in work._microbatches(batch)) <= 6


# ---------------------------------------------------------------------------------------------------------------- students
def test_a_student_matches_its_teacher(separate_run, short):
    """On episodes of its own that it did not learn from."""
    work = distillation(separate_run)
    plain = work.divergence(to_batch(work.play(work.student, -1)))
    fit = work.fit(60, good=lambda student: False)
    fresh = work.divergence(to_batch(work.play(work.student, -2)))
    assert fit.steps == 60 and plain > 0.3
    assert fresh < plain / 5 and fit.kl == pytest.approx(fresh, rel=0.5), (plain, fit.kl, fresh)


def test_heads_of_other_kinds(guided_run, short):
    work = distillation(guided_run, 8.0)
    played = to_batch(work.play(work.student, -1))
    plain = work.divergence(played)
    work.fit(40)
    assert plain > 0.1 and work.divergence(played) < 0.6 * plain


def test_it_stops_once_close_and_good(separate_run, short, monkeypatch):
    asked, said = [], []
    monkeypatch.setattr(distill, "CLOSE", 1e9)
    work = distillation(separate_run)
    fit = work.fit(200, good=lambda student: asked.append(student) or len(asked) == 2, report=said.append)
    assert fit.steps == 40 and asked == [work.student] * 2
    assert said[1] == f"update 40 of at most 200: {fit.kl:.4f} nats per token from the guided policy"
    monkeypatch.setattr(distill, "CLOSE", 0.0)
    fit = distillation(separate_run).fit(2, good=lambda student: pytest.fail("asked before it was close"))
    assert fit.steps == 2


def test_an_adapter_is_merged_into_the_student(tmp_path, tiny_folder, short):
    model = f"model={{path: {tiny_folder}, lora: {{r: 4, alpha: 8}}}}"
    changes = [change for change in TINY_WALKS if not change.startswith("model.")]
    steps = ["training.steps=1", "evaluation.suite=null", "optimizer.lr=1e-1"]
    objective = "objective={name: ilql, q_head: mlp, trunk: shared, support: 0}"
    lmrl.train("random_walks/bc", [*changes, model, objective, *steps], output=tmp_path / "run")
    work = distillation(tmp_path / "run")
    batch = to_batch(work.play(work.student, 1))
    (micro,) = batch.microbatches(10**6, 0)
    assert torch.allclose(work.student.logits(micro), work.teacher.states(micro).logits_NV, atol=1e-4)
    names = [name for name, parameter in work.student.named_parameters() if parameter.requires_grad]
    assert "model.model.embed_tokens.weight" in names and not any("lora" in name for name in names)


# ------------------------------------------------------------------------------------------------------------- the command
def test_an_exported_student(tmp_path, separate_run, short):
    said = []
    result = export(separate_run, tmp_path / "out", BETA, max_loss=25.0, distill=60, report=said.append)
    assert set(result.rows) >= {"guided", "exported"} and result.loss <= 25 and len(said) >= 1
    assert not list((tmp_path / "out").glob("heads*"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = open_policy(str(separate_run)).causal_lm
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight) and model.dtype == torch.float32
    assert lmrl.evaluate(tmp_path / "out").metrics == result.rows["exported"]
    card = (tmp_path / "out/README.md").read_text()
    assert "It was distilled from the policy guided by Q values of weight 2." in card


def test_a_student_that_falls_short_is_not_kept(tmp_path, separate_run, short):
    message = r"the export scores -?[\d.]+ on return where the guided policy scores -?[\d.]+: .* After 1 updates it is [\d.]+ nats"
    with pytest.raises(RunError, match=message + ".*raise --steps, or allow it with --max-loss"):
        export(separate_run, tmp_path / "out", BETA, max_loss=-1000, distill=1)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_distilled(tmp_path, separate_run, ilql_run):
    with pytest.raises(RunError, match="add their weight, --beta B; a run without Q values is exported without"):
        export(separate_run, tmp_path / "out", distill=1)
    with pytest.raises(RunError, match="name a folder, and convert it with llama.cpp's"):
        export(separate_run, tmp_path / "out.gguf")
    with pytest.raises(RunError, match="which no adapter holds: drop --adapter-only"):
        export(separate_run, tmp_path / "out", 1.0, adapter_only=True, distill=1)
    with pytest.raises(ModelError, match="this one is not: leave it out"):  # neither weight nor mask
        export(ilql_run, tmp_path / "out", 0.0, distill=1)
    lone = shutil.copytree(final_checkpoint(separate_run), tmp_path / "lone")
    with pytest.raises(RunError, match="lone' lies outside its run: name the run folder"):
        export(lone, tmp_path / "out", 1.0, distill=1)
    assert not (tmp_path / "out").exists()


def test_distill_on_the_command_line(tmp_path, separate_run, capsys):
    with pytest.raises(RecipeError, match="--steps counts the updates of --distill: leave it out"):
        command(separate_run, tmp_path / "out", beta=1.0, steps=3)
    command(separate_run, tmp_path / "out", beta=1.0, distill=True, steps=3, check=False)
    said = capsys.readouterr().out
    assert "update 3 of at most 3: " in said and said.endswith("out, with a model card\n")
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "llama"
