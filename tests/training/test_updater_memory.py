"""Updates that run out of memory: the same gradient from smaller microbatches, kept over a resume; and the worst case."""

import gc
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmrl.errors import MemoryShortError
from lmrl.objectives.likelihood import Likelihood
from lmrl.policy import policy as policy_module
from lmrl.recipe import LikelihoodObjective, Optimizer
from lmrl.recipe.files import load_recipe
from lmrl.rollouts.task import Task
from lmrl.training import resume_run, train
from lmrl.training.monitoring.worst_case import worst_case
from lmrl.training.updater import Updater
from lmrl.trajectories.batch import Batch, to_batch
from lmrl.trajectories.trajectory import Segment, Trajectory
from tests.conftest import TINY_WALKS
from tests.runs import metrics


class Limited(torch.autograd.Function):
    """Passes on what it is given, and says that there is no memory for more than so many tokens."""

    @staticmethod
    def forward(ctx, hidden, tokens, where, seen):
        ctx.args = tokens, where, seen
        Limited.check(hidden, "forward", *ctx.args)
        return hidden.clone()

    @staticmethod
    def backward(ctx, grad):
        Limited.check(grad, "backward", *ctx.args)
        return grad.clone(), None, None, None

    @staticmethod
    def check(hidden, here, tokens, where, seen):
        size = hidden.shape[0] * hidden.shape[1]
        seen.append((here, size))
        if here == where and size > tokens:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} tokens.\nGPU 0 has none left.")


@contextmanager
def limit_memory(policy, tokens, where="forward"):
    """Let a pass of more tokens fail in the second layer; gives a list of the passes seen."""
    seen = []

    def hook(module, args, output):
        return Limited.apply(output, tokens, where, seen)

    handle = policy.causal_lm.model.layers[1].register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def batch(count=9):
    """Sequences of two to six tokens."""
    trajectories = []
    for index in range(count):
        segment = Segment()
        segment.observe([3, 4, 5][: 1 + index % 3])
        segment.act([6 + index % 9, 7, 8][: 1 + index % 4], None, 0)
        trajectories.append(Trajectory([segment], "", ""))
    return to_batch(trajectories)


def likelihood():
    objective = Likelihood(LikelihoodObjective(name="likelihood"))
    objective.dropout = False
    return objective


def gradient(policy, tokens, batch):
    policy.microbatch_tokens = tokens
    updater = Updater(policy, Optimizer(lr=1e-4), 10)
    stats = updater.backward(policy.train(), likelihood(), batch)
    return stats, {name: p.grad.clone() for name, p in updater.parameters.items() if p.grad is not None}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("tokens", "limit"), [(1000, 20), (11, 9)])
def test_the_gradient_is_unchanged(tiny_policy, where, tokens, limit):
    policy = tiny_policy.double()
    expected_stats, expected = gradient(policy, 1000, batch())
    with limit_memory(policy, limit, where) as seen:
        stats, found = gradient(policy, tokens, batch())
    failed = [index for index, (here, size) in enumerate(seen) if here == where and size > limit]
    assert failed and policy.microbatch_tokens <= limit
    before = [size for here, size in seen[: failed[0]] if here == "backward"]
    assert before == ([] if tokens == 1000 else [6, 8, 8])  # so there are gradients of a failed attempt to forget
    assert stats == pytest.approx(expected_stats, rel=1e-12)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def test_the_size_is_halved_and_stays(tiny_policy):
    updater = Updater(tiny_policy, Optimizer(lr=1e-4), 10)
    sequences = 8 * batch(3).sequences[2:]  # 8 of six tokens
    with limit_memory(tiny_policy, 13) as seen:
        updater.step(tiny_policy, likelihood(), Batch(sequences))
        assert [size for here, size in seen if here == "forward"] == [48, 24, 12, 12, 12, 12]
        assert tiny_policy.microbatch_tokens == 12 and updater.state()["microbatch_tokens"] == 12
        seen.clear()
        updater.step(tiny_policy, likelihood(), Batch(sequences))
        assert [size for here, size in seen if here == "forward"] == [12, 12, 12, 12]


def test_one_sequence_does_not_fit(tiny_policy):
    updater = Updater(tiny_policy, Optimizer(lr=1e-4), 10)
    before = {name: p.clone() for name, p in updater.parameters.items()}
    message = (
        r"a pass over one sequence of 6 tokens does not fit .* training.microbatch_tokens cannot cut it further: set "
        r"training.gradient_checkpointing=true .* shorten the longest sequences .*Tried to allocate 12 tokens"
    )
    with (
        limit_memory(tiny_policy, 5, "backward"),
        pytest.raises(MemoryShortError, match=message.replace("12", "6")) as caught,
    ):
        updater.step(tiny_policy, likelihood(), batch())
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert all(torch.equal(before[name], p) for name, p in updater.parameters.items())


def test_a_chain_is_not_torn(tiny_policy):
    updater = Updater(tiny_policy, Optimizer(lr=1e-4), 10)
    whole = batch()
    for number, sequence in enumerate(whole.sequences):
        sequence.chain = number // 3
    with (
        limit_memory(tiny_policy, 10),
        pytest.raises(MemoryShortError, match="3 sequences that belong together, of . tok"),
    ):
        updater.step(tiny_policy, likelihood(), whole)


def test_the_step_of_the_optimizer(tiny_policy, monkeypatch):
    updater = Updater(tiny_policy, Optimizer(lr=1e-4), 10)

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(updater.strategy.optimizer, "step", fail)
    with pytest.raises(MemoryShortError, match="optimizer's step .* optimizer.name=adamw_8bit"):
        updater.step(tiny_policy, likelihood(), batch())


def test_nothing_of_a_failed_pass_is_kept(tiny_policy):
    """The tensors of an attempt are gone when the next one begins."""
    updater, alive = Updater(tiny_policy, Optimizer(lr=1e-4), 10), []

    class Big(torch.Tensor):
        pass

    def hook(module, args, output):
        gc.disable()  # nothing else is to collect them
        alive.append(sum(isinstance(one, Big) for one in gc.get_objects() if type(one) is Big))
        held = torch.zeros(3).as_subclass(Big)
        module.held_by_frame = None
        if len(alive) == 1:
            raise torch.OutOfMemoryError(f"CUDA out of memory with {held.shape}")

    handle = tiny_policy.causal_lm.model.layers[1].register_forward_hook(hook)
    try:
        updater.step(tiny_policy, likelihood(), batch())
    finally:
        handle.remove()
        gc.enable()
    assert len(alive) > 1 and not any(alive)


# ------------------------------------------------------------------------------------------------------------------- runs
SHORT = [
    *TINY_WALKS,
    "training.steps=4",
    "training.checkpoint_every=2",
    "training.microbatch_tokens=200",
    "evaluation.episodes=2",
]


def short_of_memory(monkeypatch, tokens):
    """Let every policy have memory for passes of so many tokens."""
    original = policy_module.run_pass

    def run(policy, lm, micro, want):
        if micro.tokens_BT.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(policy, lm, micro, want)

    monkeypatch.setattr(policy_module, "run_pass", run)


def lines_of(folder, kind):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind and "microbatch_tokens" in line]


def assert_same(a, b):
    """Metrics and the last stage's result, to the bit."""
    assert metrics(a) == metrics(b)
    files = [path.relative_to(a) for path in (a / "stages/main/final").rglob("*.safetensors")]
    assert len(files) >= 2
    for file in files:
        one, other = load_file(a / file), load_file(b / file)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), file


def test_a_run_goes_on_and_resumes(tmp_path, monkeypatch, capsys):
    short_of_memory(monkeypatch, 60)
    recipe = load_recipe("random_walks/bc", SHORT)
    train(recipe, output=tmp_path / "whole")
    [line] = lines_of(tmp_path / "whole", "memory")
    assert line["step"] in (0, 1) and line["before"] == 200 and line["microbatch_tokens"] <= 60
    assert capsys.readouterr().out.count("memory ran out") == 1

    train(recipe, output=tmp_path / "torn")
    shutil.rmtree(tmp_path / "torn/stages/main/final")
    shutil.rmtree(tmp_path / "torn/stages/main/checkpoints/step-000004")
    capsys.readouterr()
    monkeypatch.undo()  # more memory than before: still the size that was found
    resume_run(tmp_path / "torn")
    assert "memory ran out" not in capsys.readouterr().out
    assert_same(tmp_path / "whole", tmp_path / "torn")
    state = json.loads((tmp_path / "torn/stages/main/final/state/trainer.json").read_text())
    assert state["updater"]["microbatch_tokens"] == line["microbatch_tokens"]


def test_prediction_beside_measurement(tmp_path, capsys):
    changes = [*SHORT, "stages.warmup={training: {steps: 1}}"]
    train(load_recipe("random_walks/bc", changes), output=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "measured_mb" in line]
    assert [(line["stage"], line["step"]) for line in found] == [("warmup", 1), ("main", 4)]
    for line in found:
        assert line["kind"] == "memory" and line["predicted_mb"] > 400
        assert line["ratio"] == pytest.approx(line["measured_mb"] / line["predicted_mb"], rel=0.01)
    assert "MB predicted" in capsys.readouterr().out


def test_the_size_may_be_changed_for_a_resume(tmp_path):
    train(load_recipe("random_walks/bc", SHORT), output=tmp_path / "run")
    shutil.rmtree(tmp_path / "run/stages/main/final")
    shutil.rmtree(tmp_path / "run/stages/main/checkpoints/step-000004")
    smaller = load_recipe("random_walks/bc", [*SHORT, "training.microbatch_tokens=50"])
    train(smaller, output=tmp_path / "run", resume=True)
    state = json.loads((tmp_path / "run/stages/main/final/state/trainer.json").read_text())
    assert state["updater"]["microbatch_tokens"] is None and state["step"] == 4


@pytest.mark.parametrize(("name", "changes"), [
    ("random_walks/bc", TINY_WALKS),
    ("random_walks/stitching", [*TINY_WALKS, "stages.bc.training.steps=1", "stages.filtered_bc.training.steps=1"]),
    ("random_walks/ppo", [
        "model.config.hidden_size=16", "rollouts.prompts=4", "rollouts.samples=2", "stages.warmup.training.steps=1",
        "objective.value_warmup_steps=1",
    ]),
])  # fmt: skip
def test_the_worst_case_changes_nothing(tmp_path, name, changes):
    """Runs with and without it end alike, to the bit, with dropout too."""
    common = [*changes, "model.config.attention_dropout=0.2", "training.steps=2", "evaluation.suite=null"]
    for tried in ("true", "false"):
        recipe = load_recipe(name, [*common, f"training.try_worst_case={tried}"])
        train(recipe, output=tmp_path / tried)
    assert_same(tmp_path / "true", tmp_path / "false")


def test_the_worst_case_fails_or_halves_before_anything_else(tmp_path, monkeypatch, capsys):
    short_of_memory(monkeypatch, 100)
    tried = [*SHORT, "training.try_worst_case=true", "source.batch_size=32"]
    train(load_recipe("random_walks/bc", tried), output=tmp_path / "run")
    [line] = lines_of(tmp_path / "run", "memory")
    assert line == {
        "stage": "main",
        "step": 0,
        "kind": "memory",
        "microbatch_tokens": line["microbatch_tokens"],
        "before": 200,
    }
    assert "the longest sequences, 32 tokens, fit" in capsys.readouterr().out
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["kind"] == "memory"

    short_of_memory(monkeypatch, 30)
    with pytest.raises(MemoryShortError, match="one sequence of 3[12] tokens"):
        train(load_recipe("random_walks/bc", tried), output=tmp_path / "other")
    assert not (tmp_path / "other" / "metrics.jsonl").exists()


def test_worst_case_of_recipes(tiny_policy):
    tiny_policy.microbatch_tokens = 100

    def shapes(task, *changes, pairs=False, name="sentiment/ppo"):
        found = worst_case(load_recipe(name, ["model.path=.", *changes]), tiny_policy, task, pairs)
        return [len(one.tokens) for one in found.sequences], [one.chain for one in found.sequences]

    task = Task(None, None, None, None, longest_prompt=16)
    lengths, chains = shapes(task, "rollouts.max_new_tokens=24")
    assert lengths == [40, 40, 40, 39] and set(chains) == {None}  # two microbatches of two
    assert shapes(task, "rollouts.max_new_tokens=24", "rollouts.prompts=3")[0] == [40, 40, 39]
    assert shapes(task, "rollouts.max_new_tokens=100")[0] == [64, 63]  # the model has 64 positions
    logged = ["source.path=nobody/pairs", "source.batch_size=4"]
    lengths, chains = shapes(task, *logged, "source.max_tokens=30", pairs=True, name="dialogues/dpo")
    assert lengths == [30] * 5 + [29] and chains == [0, 0, 1, 1, 2, 2]
    assert shapes(task, *logged, "source.max_tokens=null", name="dialogues/dpo")[0] == [64, 63]  # nothing limits them


def test_the_worst_case_leaves_no_gradient(tiny_policy):
    updater = Updater(tiny_policy.eval(), Optimizer(lr=1e-4), 10)
    state = torch.random.get_rng_state()
    before = {name: p.clone() for name, p in tiny_policy.state_dict().items()}
    objective = likelihood()
    objective.dropout = True
    with limit_memory(tiny_policy, 10**6) as seen:
        updater.rehearse(tiny_policy, objective, batch())
    assert [here for here, _ in seen] == ["forward", "backward"]
    assert all(p.grad is None for p in tiny_policy.parameters()) and not updater.tensors()
    assert torch.equal(state, torch.random.get_rng_state()) and not tiny_policy.training
    assert all(torch.equal(before[name], p) for name, p in tiny_policy.state_dict().items())


SHORTAGE = """
import resource, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from tests.conftest import TINY_LLAMA
from tests.training.test_updater_memory import likelihood
from lmrl.policy.load import load_policy
from lmrl.recipe import Model, Optimizer
from lmrl.training.updater import Updater
from lmrl.trajectories.batch import Batch
from lmrl.training.monitoring.worst_case import full_sequence

config = dict(TINY_LLAMA) | {{"hidden_size": 64, "intermediate_size": 2048, "max_position_embeddings": 256}}
policy = load_policy(Model(config=config), texts=lambda: ["abcdefgh"])
policy.microbatch_tokens = 32 * 256
updater = Updater(policy, Optimizer(lr=1e-4), 10)
batch = Batch([full_sequence(256) for _ in range(32)])
updater.backward(policy, likelihood(), Batch(batch.sequences[:1]))
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + {room} * 2**20, -1))
stats = updater.step(policy, likelihood(), batch)
print(policy.microbatch_tokens, stats["loss"])
"""


@pytest.mark.slow
def test_a_cpu_that_is_really_short(tmp_path):
    """With an address space that holds no pass over the whole minibatch: real failures, in real allocations."""
    found = {}
    for room in (400, 4000):
        script = SHORTAGE.format(root=str(Path(__file__).parents[2]), room=room)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
        found[room] = done.stdout.split()
    assert int(found[4000][0]) == 32 * 256 > int(found[400][0])
    assert float(found[400][1]) == pytest.approx(float(found[4000][1]), rel=1e-6)
