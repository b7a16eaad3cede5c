"""8-bit AdamW: its state in checkpoints to the bit, and one line if it is not available."""

import importlib.util
import sys

import pytest
import torch
from safetensors.torch import load, save

from lmrl.errors import RecipeError
from lmrl.policy.load import load_policy
from lmrl.recipe import Model, Optimizer
from lmrl.recipe.files import load_recipe
from lmrl.training.optimizers import state_bytes
from lmrl.training.parallel.optimizer_state import entry_from_tensor, entry_to_tensor, fused_parameters
from lmrl.training.parallel.strategy import Strategy
from lmrl.training.updater import Updater
from tests.conftest import TINY_LLAMA
from tests.training.test_updater_memory import batch, likelihood

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
EIGHT = Optimizer(name="adamw_8bit", lr=1e-2)


def policy_of(hidden=64):
    """Wide enough for its matrices to be in 8 bits: smaller ones than 4,096 numbers stay as they are."""
    torch.manual_seed(0)
    config = dict(TINY_LLAMA) | {"hidden_size": hidden, "intermediate_size": 2 * hidden}
    return load_policy(Model(config=config), texts=lambda: ["abcdefghijklmnopqrstuvwxyz .,!?"])


@needs_bitsandbytes
def test_state_goes_through_a_checkpoint_to_the_bit():
    policies = [policy_of(), policy_of()]
    first, second = (Updater(policy, EIGHT, 10) for policy in policies)
    for _ in range(3):
        first.step(policies[0], likelihood(), batch())
    saved = save({name: tensor.contiguous() for name, tensor in first.tensors().items()})
    policies[1].load_state_dict(policies[0].state_dict())
    second.load_tensors(load(saved))
    matrix = "model.model.layers.0.mlp.up_proj.weight"
    held = second.tensors()
    assert held[f"{matrix}.state1"].dtype == held[f"{matrix}.state2"].dtype == torch.uint8
    assert held[f"{matrix}.absmax1"].shape == (64 * 128 / 256,) and held[f"{matrix}.step"] == 3
    assert held["model.model.embed_tokens.weight.state1"].dtype == torch.float32
    assert held["model.model.norm.weight.state1"].dtype == torch.float32
    assert first.tensors().keys() == held.keys()
    for name, tensor in first.tensors().items():
        assert tensor.dtype == held[name].dtype and torch.equal(tensor, held[name]), name
    for _ in range(2):
        for updater, policy in zip((first, second), policies, strict=True):
            updater.step(policy, likelihood(), batch())
    for name, parameter in first.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name


@needs_bitsandbytes
def test_it_learns_like_adamw():
    losses = []
    for options in (EIGHT, Optimizer(lr=1e-2)):
        policy = policy_of()
        updater = Updater(policy, options, 10)
        for step in range(1, 11):
            updater.begin(step)
            stats = updater.step(policy, likelihood(), batch())
        losses.append(stats["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.1) and losses[0] < 2.5  # from log(34) = 3.5


@needs_bitsandbytes
def test_nothing_is_left_with_the_process(monkeypatch):
    from bitsandbytes.optim import GlobalOptimManager

    Updater(policy_of(), EIGHT, 10)
    assert not GlobalOptimManager.get_instance().pid2config


def test_entries_of_the_state():
    """bitsandbytes holds a plain count, and one table for all parameters."""
    table = torch.linspace(-1, 1, 256)
    one, other = (entry_to_tensor("qmap1", table) for _ in range(2))
    assert torch.equal(one, table) and one.data_ptr() != other.data_ptr()
    steps = entry_from_tensor("step", entry_to_tensor("step", 7), torch.device("cpu"))
    assert type(steps) is int and steps == 7
    plain = entry_from_tensor("step", entry_to_tensor("step", torch.tensor(7.0)), torch.device("cpu"))
    assert torch.equal(plain, torch.tensor(7.0))
    # One kernel on an accelerator reads the count there; the usual one on the CPU.
    kept, moved = (entry_from_tensor("step", plain, torch.device("meta"), fused) for fused in (False, True))
    assert kept.device.type == "cpu" and moved.device.type == "meta"
    weights = torch.nn.Parameter(table)
    assert fused_parameters(torch.optim.AdamW([weights], fused=True)) == {weights}
    assert not fused_parameters(torch.optim.AdamW([weights]))
    state = torch.arange(4, dtype=torch.uint8)
    assert torch.equal(entry_from_tensor("state1", entry_to_tensor("state1", state), torch.device("cpu")), state)
    assert state_bytes(EIGHT, [torch.zeros(10)]) == 20 and state_bytes(Optimizer(lr=1e-4), [torch.zeros(10)]) == 80


def test_it_is_not_there(tiny_policy, monkeypatch):
    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RecipeError, match="optimizer.name=adamw_8bit needs bitsandbytes .* the extra 'quantization'"):
        Updater(tiny_policy, EIGHT, 10)


def test_sharding_is_refused(tiny_policy):
    class Shared(Strategy):
        name, synchronized = "fsdp", True

    with pytest.raises(RecipeError, match="8-bit state cannot be shared out by fsdp, .* set optimizer.name=adamw"):
        Updater(tiny_policy, EIGHT, 10, Shared())


def test_reward_models_have_their_own(tmp_path):
    changes = ["model.path=.", "source.path=nobody/pairs", "optimizer.name=adamw_8bit"]
    with pytest.raises(RecipeError, match="`optimizer.name=adamw_8bit`: a reward model is trained with adamw"):
        load_recipe("dialogues/reward_model", changes)
