"""The precision of activations under autocast, and that nothing changes without it."""

import copy

import pytest
import torch
import transformers
from torch.nn.functional import rms_norm

from lmrl.policy.load import load_policy
from lmrl.policy.mixed_precision import take_mixed_precision
from lmrl.recipe import Model
from tests.conftest import TINY_LLAMA

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "attention_dropout": 0.0,
}


def model_of(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **SIZES)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # that begin as 1, or as 0 where 1 is added
            torch.nn.init.normal_(parameter, parameter.mean().item(), 0.1)
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
def test_layers_output_bfloat16_and_stay_near_float32(kind):
    plain, taken = model_of(kind), model_of(kind)
    take_mixed_precision(taken)
    tokens = torch.arange(2, 12)[None]
    exact = plain(tokens).logits
    assert torch.equal(taken(tokens).logits, exact)  # without autocast: to the bit
    seen = []
    for layer in taken.model.layers:
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before, found = plain(tokens).logits.float(), taken(tokens).logits.float()
    assert seen == [torch.bfloat16] * 2
    scale = exact.std()
    assert (found - exact).abs().max() < 0.1 * scale
    assert (found - exact).abs().mean() < 3 * (before - exact).abs().mean()


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_norm_is_that_of_float32_rounded_once_more(kind):
    model = model_of(kind)
    norm, states = copy.deepcopy(model.model.norm), 3 * torch.randn(4, 16)
    expected = model.model.norm(states)
    take_mixed_precision(model)
    assert type(norm).__name__ == type(model.model.norm).__name__ and isinstance(model.model.norm, type(norm))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.model.norm(states)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=1e-3)


def test_a_copy_has_weights_of_its_own():
    model = model_of("llama")
    take_mixed_precision(model)
    other = copy.deepcopy(model)
    torch.nn.init.constant_(other.model.norm.weight, 2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one, two = (lm.model.norm(torch.ones(1, 16)).float() for lm in (model, other))
    assert not torch.equal(one, two)
    torch.testing.assert_close(two, torch.full((1, 16), 2.0), rtol=1e-2, atol=0)


def test_applying_it_twice_changes_nothing():
    model = model_of("llama")
    take_mixed_precision(model)
    kind, hooks = type(model.model.norm), len(model.model.embed_tokens._forward_hooks)
    take_mixed_precision(model)
    assert type(model.model.norm) is kind and len(model.model.embed_tokens._forward_hooks) == hooks == 1


def test_modules_that_only_look_like_norms_are_left_alone():
    class OddRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(4)), 1e-6

        def forward(self, states):
            return 3 * rms_norm(states, (4,), self.weight, self.eps)

    model = torch.nn.Sequential(OddRMSNorm())
    take_mixed_precision(model)
    assert type(model[0]) is OddRMSNorm


@pytest.mark.parametrize("separate", [False, True])
def test_gradients_reach_every_weight_in_float32(separate):
    from lmrl.policy.heads import HeadsSpec
    from lmrl.policy.passes import ForwardRequest
    from lmrl.trajectories.batch import Batch, Sequence

    heads = HeadsSpec(value=True, trunk="separate" if separate else "shared")
    policy = load_policy(Model(config=dict(TINY_LLAMA)), texts=lambda: ["abc"], heads=heads)
    policy.autocast_dtype = torch.bfloat16
    tokens = torch.tensor([3, 2, 1, 3])
    micro = Batch([Sequence(tokens, torch.arange(3), torch.arange(3), {})]).collate([0], policy.pad_id, policy.packs)
    outputs = policy(micro, ForwardRequest(logprobs=True, values=True))
    assert outputs.values.dtype == outputs.logprobs.dtype == torch.float32
    (outputs.logprobs.sum() + outputs.values.sum()).backward()
    for name, parameter in policy.trainable().items():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
