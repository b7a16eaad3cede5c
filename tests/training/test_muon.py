"""Muon or NAMO for matrices and AdamW for the rest: whose steps are whose, undone and resumed."""

import pytest
import torch
from safetensors.torch import load, save

from lmrl.errors import RecipeError
from lmrl.policy.heads import HeadsSpec
from lmrl.policy.load import load_policy
from lmrl.recipe import Lora, Model, Optimizer, estimates
from lmrl.recipe.files import load_recipe
from lmrl.training.muon import MuonWithAdamW, orthogonalized, split_matrices
from lmrl.training.parallel.strategy import Strategy
from lmrl.training.updater import Updater
from tests.conftest import TINY_LLAMA
from tests.training.test_updater_memory import batch, likelihood

MUON = Optimizer(name="muon", lr=1e-2, weight_decay=0.1)
NAMO = MUON.model_copy(update={"name": "namo"})
both = pytest.mark.parametrize("options", [MUON, NAMO], ids=["muon", "namo"])


def policy_of(heads=None, **config):
    torch.manual_seed(0)
    return load_policy(
        Model(config=TINY_LLAMA | config), texts=lambda: ["abcdefghijklmnopqrstuvwxyz .,!?"], heads=heads
    )


def by_definition(matrix, steps=5, coefficients=(3.4445, -4.7750, 2.0315)):
    """Newton-Schulz in float64, with the papers' coefficients."""
    a, b, c = coefficients
    x = matrix.double() / matrix.double().norm()
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@pytest.mark.parametrize("tied", [True, False])
def test_who_gets_what(tied):
    policy = policy_of(HeadsSpec(), tie_word_embeddings=tied)
    updater = Updater(policy, MUON, 10)
    names = {id(one): name for name, one in policy.named_parameters()}
    groups = [
        (group["muon"], group["head"], {names[id(one)] for one in group["params"]})
        for group in updater.strategy.optimizer.param_groups
    ]
    (_, _, matrices), (_, _, rest), (_, _, heads) = groups
    assert [kind[:2] for kind in groups] == [(True, False), (False, False), (False, True)]
    assert len(matrices) == 14 and all(name.endswith("_proj.weight") for name in matrices)
    tables = {"model.model.embed_tokens.weight"} | (set() if tied else {"model.lm_head.weight"})
    assert {name for name in rest if "norm" not in name} == tables and len(rest) == 5 + len(tables)
    assert heads and all(name.startswith("values.v.") for name in heads)


def test_adapters_are_matrices(tiny_folder):
    policy = load_policy(Model(path=str(tiny_folder), lora=Lora(r=2, use_dora=True, modules_to_save=["embed_tokens"])))
    matrices, rest = split_matrices({"params": list(policy.trainable().values())}, policy)
    names = {id(one): name for name, one in policy.named_parameters()}
    assert {names[id(one)].split(".")[-3] for one in matrices["params"]} == {"lora_A", "lora_B"}
    assert len(rest["params"]) == 15  # fourteen magnitudes, and the embeddings with the head


@both
def test_steps_by_definition(options):
    """Three steps: of a matrix as in the papers, in float64; of the rest as AdamW alone."""
    policy, alone = policy_of(), policy_of()
    updater = Updater(policy, options, 10)
    adamw = torch.optim.AdamW(alone.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1)
    name, norm = "model.model.layers.0.mlp.up_proj.weight", "model.model.norm.weight"
    weights, other = updater.parameters[name], dict(alone.named_parameters())
    momentum, square = torch.zeros_like(weights).double(), 0.0
    expected = weights.detach().clone().double()
    for step in range(1, 4):
        updater.strategy.zero_grad()
        updater.backward(policy, likelihood(), batch())
        for each, one in policy.named_parameters():
            other[each].grad = one.grad.clone()
        gradient = weights.grad.double()
        momentum = 0.95 * momentum + 0.05 * gradient
        update = by_definition(0.05 * gradient + 0.95 * momentum)
        square = 0.999 * square + 0.001 * float(gradient.norm()) ** 2
        agreement = float(momentum.norm()) / (1 - 0.95**step) / (square / (1 - 0.999**step)) ** 0.5
        length = agreement if options is NAMO else 0.2
        expected = expected * (1 - 1e-2 * 0.1) - 1e-2 * length * max(weights.shape) ** 0.5 * update
        updater.strategy.optimizer.step()
        adamw.step()
    begun = policy_of().trainable()[name].detach().double()
    found, right = weights.detach().double() - begun, expected - begun
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(updater.parameters[norm], other[norm], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_orthogonalized_in_the_precision_of_the_matrix(shape):
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = orthogonalized(matrix)
    torch.testing.assert_close(found, by_definition(matrix), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(orthogonalized(100 * matrix), found, rtol=1e-12, atol=1e-12)
    assert not orthogonalized(torch.zeros(shape)).any()


def test_steps_are_as_long_as_those_of_adamw():
    """By the root mean square: about .2 of the rate where the gradient has full rank, as Moonlight found it of AdamW."""
    policy = policy_of(hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    optimizer = Updater(policy, Optimizer(name="muon", lr=1e-2), 10).strategy.optimizer
    for weights in optimizer.param_groups[0]["params"]:
        weights.grad = torch.randn_like(weights)
        before = weights.detach().clone()
        optimizer.step()
        assert float((weights.detach() - before).square().mean().sqrt()) == pytest.approx(0.2e-2, rel=0.2)
        weights.grad = None


def test_namo_stops_where_gradients_cancel_or_vanish():
    """After a gradient and its opposite Muon still takes full steps, NAMO hardly any."""
    lengths = {}
    for options in (MUON, NAMO):
        optimizer = Updater(policy_of(), options.model_copy(update={"weight_decay": 0.0}), 10).strategy.optimizer
        weights = optimizer.param_groups[0]["params"][0]
        gradient = torch.randn_like(weights)
        for sign in (1, -1, 1, -1, 0):
            before = weights.detach().clone()
            weights.grad = sign * gradient
            optimizer.step()
        lengths[options.name] = float((weights.detach() - before).norm())
    assert lengths["namo"] < 0.2 * lengths["muon"]


def test_namo_takes_short_steps_where_gradients_have_become_small():
    """With a floor: equally long ones down to half of the largest norm so far, then in proportion to the gradient."""
    options = NAMO.model_copy(update={"weight_decay": 0.0, "betas": (0.9, 0.95), "norm_floor": 0.5})
    optimizer = Updater(policy_of(), options, 10).strategy.optimizer
    weights = optimizer.param_groups[0]["params"][0]
    gradient, lengths = torch.randn_like(weights), []
    for size in (1.0, 0.75, 0.1, 0.01):
        weights.grad = size * gradient
        for _ in range(300):
            before = weights.detach().clone()
            optimizer.step()
        lengths.append(float((weights.detach() - before).norm()))
    assert [length / lengths[0] for length in lengths] == pytest.approx([1, 1, 0.2, 0.02], rel=1e-2)


@both
def test_state_goes_through_a_checkpoint_to_the_bit(options):
    policies = [policy_of(HeadsSpec()), policy_of(HeadsSpec())]
    first, second = (Updater(policy, options, 10) for policy in policies)
    for _ in range(3):
        first.step(policies[0], likelihood(), batch())
    saved = save({name: tensor.contiguous() for name, tensor in first.tensors().items()})
    policies[1].load_state_dict(policies[0].state_dict())
    second.load_tensors(load(saved))
    kinds = {name.rpartition(".")[2] for name in second.tensors() if "up_proj" in name}
    assert kinds == ({"momentum_buffer"} if options is MUON else {"momentum_buffer", "mean_square", "peak", "step"})
    assert "model.model.norm.weight.exp_avg" in second.tensors()
    for _ in range(2):
        for updater, policy in zip((first, second), policies, strict=True):
            updater.step(policy, likelihood(), batch())
    for name, parameter in first.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name


@both
def test_a_step_is_undone(options):
    policy = policy_of(HeadsSpec())
    updater = Updater(policy, options, 10)
    for _ in range(2):
        updater.step(policy, likelihood(), batch())
    before = {name: one.detach().clone() for name, one in updater.parameters.items()}
    updater.step(policy, likelihood(), batch())
    moved = {name: (one - before[name]).abs().max() for name, one in updater.parameters.items()}
    updater.undo_step()
    for name, one in updater.parameters.items():
        if not name.startswith("values."):
            assert moved[name] > 1e-4, name
            torch.testing.assert_close(one.detach(), before[name], rtol=0, atol=1e-6)
    state = updater.strategy.optimizer.state
    matrix = updater.parameters["model.model.layers.0.mlp.up_proj.weight"]
    assert not state[matrix]["momentum_buffer"].any() and not updater.strategy.optimizer.moved
    kept = matrix.detach().clone()
    updater.undo_step()  # there is no second step to undo
    assert torch.equal(matrix, kept)


def test_it_learns_as_fast_as_adamw():
    losses = {}
    for name in ("muon", "namo", "adamw"):
        policy = policy_of(hidden_size=64, intermediate_size=128)
        updater = Updater(policy, Optimizer(name=name, lr=1e-2), 10)
        for step in range(1, 11):
            updater.begin(step)
            stats = updater.step(policy, likelihood(), batch())
        losses[name] = stats["loss"]
    for name in ("muon", "namo"):
        assert losses[name] < max(1.1 * losses["adamw"], 0.1) and losses[name] < 2.5  # from log(34) = 3.5


def test_sharded_matrices_are_refused(tiny_policy):
    class Shared(Strategy):
        name, synchronized = "fsdp", True

    with pytest.raises(RecipeError, match="namo orthogonalizes whole matrices, which fsdp shares out: .*adamw"):
        Updater(tiny_policy, NAMO, 10, Shared())


@pytest.mark.parametrize("tied", [True, False])
def test_memory_of_the_state(tied):
    """Momentum and the last step of matrices, and AdamW's two moments of the rest."""
    policy = policy_of(HeadsSpec(), tie_word_embeddings=tied)
    updater = Updater(policy, MUON, 10)
    updater.step(policy, likelihood(), batch())
    optimizer = updater.strategy.optimizer
    assert isinstance(optimizer, MuonWithAdamW)
    held = sum(one.numel() * 4 for entries in optimizer.state.values() for one in entries.values() if one.ndim)
    held += sum(one.numel() * 4 for one in optimizer.moved.values())
    config = TINY_LLAMA | {"tie_word_embeddings": tied, "vocab_size": len(policy.tokenizer)}
    recipe = load_recipe("random_walks/bc", [f"model.config={config}", "optimizer.name=muon"])
    shape = estimates.model_shape(recipe.model)
    moments = estimates._moments_bytes(recipe, shape)
    trunk = sum(one.numel() for name, one in updater.parameters.items() if not name.startswith("values."))
    assert moments(trunk) + moments(17, 17) == pytest.approx(held, rel=0.03)


def test_counts_that_muon_reads_stay_on_the_cpu():
    """Resumed on an accelerator, only AdamW's one kernel finds its counts there: reading one waits for all work before it."""
    matrix, vector = (torch.nn.Parameter(torch.empty(size, device="meta")) for size in ((2, 2), (2,)))
    adamw = {"betas": (0.9, 0.99), "weight_decay": 0.0, "fused": True}
    strategy = Strategy()
    strategy.optimizer = MuonWithAdamW({"params": [matrix], "lr": 0.1}, [{"params": [vector], "lr": 0.1}], 0.0, **adamw)
    strategy.load_optimizer_tensors({"a": matrix, "b": vector}, {"a.step": torch.ones(()), "b.step": torch.ones(())})
    assert [strategy.optimizer.state[one]["step"].device.type for one in (matrix, vector)] == ["cpu", "meta"]
