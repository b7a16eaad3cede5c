"""Preference losses against trl, and pairs from episodes."""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmrl.errors import DataError
from lmrl.objectives.dpo import DPO, Pairs, best_and_worst, log1mexp, preference_loss
from lmrl.policy.reference_cache import ReferenceCache, model_key
from lmrl.recipe import DPOObjective, Optimizer
from lmrl.recipe.objectives.preferences import PREFERENCE_LOSSES
from lmrl.training.monitoring.bundle import batch_of, batch_tensors
from lmrl.training.updater import Updater
from lmrl.trajectories.trajectory import CONTEXT, Segment, Trajectory
from tests.objectives.test_group import game

LOSSES = PREFERENCE_LOSSES.__args__
OF_TRL = [loss for loss in LOSSES if loss not in ("simpo", "orpo")]


def options(**changes) -> DPOObjective:
    if changes.get("loss") == "exo_pair":
        changes = {"label_smoothing": 1e-3} | changes
    return DPOObjective(name="dpo", **changes)


def episode(context, action, reward, group=0):
    tokens = [*context, *action]
    turns = [CONTEXT] * len(context) + [0] * len(action)
    segment = Segment(tokens, turns, [None] * len(tokens), [0.0] * len(tokens))
    return Trajectory([segment], "", "", reward=reward, group=group)


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([[3.0, 5.0], [7.0, 2.0], [4.0, 4.0]])
    logprobs, reference = (-torch.rand(3, 2, generator=generator) * 2 * lengths for _ in range(2))
    return Pairs(logprobs, reference, lengths)


# ------------------------------------------------------------------------------------------------------------- by hand
def test_sigmoid_by_hand():
    # beta .5, ratios 2 and -2: the logit is 2
    pair = Pairs(torch.tensor([[-1.0, -4.0]]), torch.tensor([[-3.0, -2.0]]), torch.ones(1, 2))
    assert preference_loss(pair, options(beta=0.5)).item() == pytest.approx(math.log(1 + math.exp(-2)))
    smooth = preference_loss(pair, options(beta=0.5, label_smoothing=0.25)).item()
    assert smooth == pytest.approx(0.75 * math.log(1 + math.exp(-2)) + 0.25 * math.log(1 + math.exp(2)))


def test_log1mexp_is_exact():
    values = torch.tensor([-1e-4, -0.5, -3.0, -40.0], dtype=torch.float64)
    torch.testing.assert_close(log1mexp(values), torch.log1p(-values.exp()), rtol=1e-9, atol=1e-18)


def test_a_kept_minibatch_keeps_packs_and_pairs(tiny_policy, tmp_path):
    """As `lmrl replay` reads it: the same loss and gradient."""
    method = DPO(options(loss="simpo"))  # without a reference
    episodes = [episode([3, 4, 5], action, reward, group) for action, reward, group in (([6, 7], 1, 0), ([8], 0, 0))]
    episodes += [
        episode([9], [3, 3, 3, 3], 1, 1),
        episode([5, 5], [4], 0, 1),
    ]  # one pair that is packed, and one that is not
    batch = method.prepare(tiny_policy, episodes)
    assert [one.branches is not None for one in batch.sequences] == [True, False, False]
    save_file(batch_tensors(batch), tmp_path / "batch.safetensors")
    found = []
    for one in (batch, batch_of(load_file(tmp_path / "batch.safetensors"))):
        stats = Updater(tiny_policy, Optimizer(lr=1e-4), 10).backward(tiny_policy.train(), method, one)
        found.append([stats["loss"], *(p.grad.clone() for p in tiny_policy.model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_best_and_worst_of_a_group():
    group = [episode([1], [2], reward, group=4) for reward in (0.5, 2.0, -1.0)]
    ties = [episode([1], [2], 1.0, group=5) for _ in range(3)]
    assert [[one.reward for one in pair] for pair in best_and_worst(group + ties)] == [[2.0, -1.0]]


def test_rounding_prefers_no_episode():
    """1 - .1 - .1 - .1 is more than -.1 - .1 - .1 + 1 in double precision."""
    early, late = (game(*rewards) for rewards in ((1.0, -0.1, -0.1, -0.1), (-0.1, -0.1, -0.1, 1.0)))
    assert early.reward > late.reward and best_and_worst([early, late]) == []
    smaller = game(1e-9, 0.0)
    assert best_and_worst([smaller, game(0.0, 0.0)])[0][0] is smaller


def test_options_that_do_nothing_are_refused():
    with pytest.raises(ValueError, match="label_smoothing"):
        options(loss="hinge", label_smoothing=0.1)
    with pytest.raises(ValueError, match="exo_pair"):
        DPOObjective(name="dpo", loss="exo_pair")
    with pytest.raises(ValueError, match="no reference"):
        options(loss="simpo", cache_reference=True)


# ----------------------------------------------------------------------------------------------------- trl as an oracle
@pytest.fixture(scope="module")
def dialogues():
    """Token rows of four pairs, with prompts of different lengths."""
    return [
        ([3, 4, 5, 6], [7, 8, 9], [10, 11]),
        ([5, 6], [7, 7, 7, 7, 2], [1, 2, 3]),
        ([9, 8, 7, 6, 5, 4], [3], [2, 1, 2, 1]),
        ([1, 2, 3], [4, 5, 6, 7], [4, 5, 9, 10, 11]),
    ]


@pytest.fixture
def moved_policy(tiny_folder):
    """A policy with a reference, a little away from it."""
    from lmrl.policy.load import load_policy
    from lmrl.recipe import Model

    torch.manual_seed(1)
    policy = load_policy(Model(path=str(tiny_folder)), reference=True)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return policy


def ours(policy, dialogues, **changes):
    objective = DPO(options(**changes))
    episodes = []
    for group, (prompt, chosen, rejected) in enumerate(dialogues):
        episodes += [episode(prompt, chosen, 1.0, group), episode(prompt, rejected, -1.0, group)]
    batch = objective.prepare(policy, episodes)
    policy.eval()
    [micro] = batch.microbatches(10_000, policy.pad_id)
    loss = objective.loss(policy(micro, objective.forward_request), micro)
    return loss.sum / objective.count(micro)


def trl_loss(policy, dialogues, loss, beta, label_smoothing, tmp_path):
    """DPOTrainer's own loss on its own collation of the same tokens."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    config = DPOConfig(
        str(tmp_path), loss_type=[loss], beta=beta, label_smoothing=label_smoothing, report_to="none", use_cpu=True,
        bf16=False, gradient_checkpointing=False, per_device_train_batch_size=4,
    )  # fmt: skip
    rows = [{"prompt": "ab", "chosen": "c", "rejected": "d"}] * 4
    trainer = DPOTrainer(
        policy.model, ref_model=policy._reference[0], args=config, processing_class=policy.tokenizer,
        train_dataset=Dataset.from_list(rows),
    )  # fmt: skip
    collate = DataCollatorForPreference(pad_token_id=policy.pad_id)
    batch = collate([{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in dialogues])
    trainer.model.eval()
    return trainer.compute_loss(trainer.model, dict(batch))


@pytest.mark.parametrize("loss", OF_TRL)
@pytest.mark.parametrize("share_prompts", [True, False])
def test_losses_equal_those_of_trl(moved_policy, dialogues, loss, share_prompts, tmp_path):
    smoothing = 0.1 if loss in ("robust", "exo_pair") else 0.0
    own = ours(moved_policy, dialogues, loss=loss, beta=0.3, label_smoothing=smoothing, share_prompts=share_prompts)
    other = trl_loss(moved_policy, dialogues, loss, 0.3, smoothing, tmp_path)
    torch.testing.assert_close(own.detach(), other.detach(), atol=1e-4, rtol=1e-4)


def test_simpo_equals_that_of_trl(pairs):
    from trl.experimental.cpo import CPOTrainer

    stub = SimpleNamespace(
        loss_type="simpo",
        simpo_gamma=0.7,
        beta=2.0,
        alpha=0.0,
        label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    means = pairs.logprobs_P2 / pairs.lengths_P2
    expected, _, _ = CPOTrainer.cpo_loss(stub, means[:, 0], means[:, 1])
    free = Pairs(pairs.logprobs_P2, torch.zeros(3, 2), pairs.lengths_P2)
    found = preference_loss(free, options(loss="simpo", beta=2.0, target_margin=0.7))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_orpo_equals_that_of_trl(pairs):
    from trl.experimental.orpo import ORPOTrainer

    stub = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    means = pairs.logprobs_P2 / pairs.lengths_P2
    expected = ORPOTrainer.odds_ratio_loss(stub, means[:, 0], means[:, 1])[0]
    free = Pairs(pairs.logprobs_P2, torch.zeros(3, 2), pairs.lengths_P2)
    torch.testing.assert_close(preference_loss(free, options(loss="orpo")), -expected, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------ the whole
def test_pairs_of_many_segments_are_summed(tiny_policy):
    """An episode in two contexts counts all of its actions, and stays beside its partner."""
    tiny_policy._reference = [tiny_policy.model]
    one = episode([1, 2], [3, 4], 1.0)
    one.segments += episode([5], [6], 0.0).segments
    objective = DPO(options())
    batch = objective.prepare(tiny_policy, [one, episode([1, 2], [9], 0.0)])
    assert [sequence.chain for sequence in batch.sequences] == [0, 0, 0]
    assert [sequence.fields["episode"].tolist() for sequence in batch.sequences] == [[0, 0], [0], [1]]
    assert objective.heldout(tiny_policy, [one, episode([1, 2], [9], 0.0)]) == {"accuracy": [0.5], "margin": [0.0]}


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "discopop"])  # not convex: may stay near 0
def test_every_loss_learns_the_preference(tiny_policy, loss):
    import copy

    from lmrl.recipe import Optimizer

    tiny_policy._reference = [copy.deepcopy(tiny_policy.model)]
    episodes = [
        episode([1, 2, 3], action, reward, group)
        for group in range(2)
        for action, reward in (([4 + group, 5], 1.0), ([6, 7 + group], -1.0))
    ]
    objective = DPO(options(loss=loss))
    updater = Updater(tiny_policy, Optimizer(lr=1e-2), 20)
    before = objective.heldout(tiny_policy, episodes)["margin"]
    for step in range(1, 21):
        updater.begin(step)
        stats = updater.step(tiny_policy, objective, objective.prepare(tiny_policy, episodes))
    assert stats["loss"] < math.inf
    after = objective.heldout(tiny_policy, episodes)
    assert sum(after["margin"]) > sum(before) and after["accuracy"] == [1.0, 1.0]


def test_pairs_without_rewards_are_refused(tiny_policy):
    with pytest.raises(DataError, match="has no reward"):
        DPO(options()).prepare(tiny_policy, [episode([1], [2], None)])


# ------------------------------------------------------------------------------------------------- the cached reference
def test_a_restricted_action_has_a_reference_of_its_own(tiny_policy, tmp_path, monkeypatch):
    """The same tokens, chosen from two and from the whole vocabulary."""
    monkeypatch.setenv("LMRL_CACHE", str(tmp_path))
    free, restricted = episode([1, 2], [3], 1.0), episode([1, 2], [3], 1.0)
    restricted.segments[0].allowed = {2: (3, 5)}
    cache = ReferenceCache("key")
    cache.add(tiny_policy, [restricted])
    assert cache.missing([restricted, free]) == [free]
    cache.add(tiny_policy, [free])
    assert cache[free] < cache[restricted]


def train(tmp_path, name, *changes, resume=False):
    import json

    import lmrl

    rows = [{"prompt": f"say {n}", "chosen": "yes " * (n % 3 + 1), "rejected": "no " * (n % 2 + 1)} for n in range(10)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    recipe = {
        "model": {"config": config},
        "task": {"prompts": {"holdout": 0.2}},
        "source": {"name": "dataset", "path": str(tmp_path / "pairs.jsonl"), "batch_size": 4},
        "objective": {"name": "dpo"},
        "optimizer": {"lr": 1e-2},
        "training": {"steps": 4, "threads": 1, "checkpoint_every": 2},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    result = lmrl.train(tmp_path / "recipe.yaml", changes, output=tmp_path / name, resume=resume)
    lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    return result, [line["loss"] for line in lines if line["kind"] == "train"]


def test_a_cached_reference_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LMRL_CACHE", str(tmp_path / "cache"))
    result, kept = train(tmp_path, "kept")
    again, cached = train(tmp_path, "cached", "objective.cache_reference=true")
    assert cached == pytest.approx(kept, abs=1e-6)
    assert result.scores["DPO"]["heldout/accuracy"]["n"] == 2
    scores = [run.scores["DPO"]["heldout/margin"]["mean"] for run in (result, again)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5) and scores[0] != 0
    [file] = (tmp_path / "cache" / "reference").iterdir()
    before = file.read_text()
    assert len(before.split()) // 4 == 20  # both sides of ten pairs
    file.write_text(before[:-10])  # torn
    train(tmp_path, "later", "objective.cache_reference=true", "optimizer.lr=2e-2")
    assert len(file.read_text().splitlines()) == len(before.splitlines()) + 1


def test_a_lost_cache_is_reported(tmp_path, monkeypatch):
    import shutil

    from lmrl.errors import RunError

    monkeypatch.setenv("LMRL_CACHE", str(tmp_path / "cache"))
    train(tmp_path, "run", "objective.cache_reference=true")
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "run" / "stages" / "main" / "final")
    with pytest.raises(RunError, match="the reference's cache lacks 16 episodes of this run"):
        train(tmp_path, "run", "objective.cache_reference=true", resume=True)


def test_the_reference_cache_tells_configurations_apart(tiny_policy):
    """The same weights compute something else with other norms; a model that was moved computes the same."""
    config, before = tiny_policy.causal_lm.config, model_key(tiny_policy)
    config._name_or_path = "elsewhere"
    assert model_key(tiny_policy) == before
    config.rms_norm_eps *= 10
    assert model_key(tiny_policy) != before
