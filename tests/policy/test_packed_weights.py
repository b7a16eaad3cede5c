"""Packed weights multiply as the plain ones do, and step aside where they must not be used."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lmrl.engines.base import Sampling
from lmrl.engines.hf import HFEngine
from lmrl.policy import packed_weights
from lmrl.policy.load import load_policy
from lmrl.policy.packed_weights import pack_weights, unpack_weights
from lmrl.recipe import Lora, Model, estimates

BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def a_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A model with matrices of 131,072 numbers, and others of 32,768, which are too small to pack."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=600, attention_bias=True)
    return LlamaForCausalLM(config).to(dtype).eval()


TOKENS = torch.arange(2, 26).view(2, 12)


@pytest.mark.parametrize(
    "dtype, autocast",
    [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None)],
    ids=["float32", "autocast", "bfloat16"],
)
@torch.no_grad()
def test_products_are_those_of_the_plain_weights(dtype, autocast):
    if torch.bfloat16 in (dtype, autocast) and not BFLOAT16:
        pytest.skip("this CPU does not multiply bfloat16")
    model = a_model(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        expected = model(TOKENS).logits
        layers = pack_weights(model, autocast)
        assert len(layers) == 2 * 3 + 1, "gate, up and down of two layers, and the head"
        found = model(TOKENS).logits
    exact = torch.bfloat16 in (dtype, autocast)
    torch.testing.assert_close(found, expected, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)
    unpack_weights(layers)
    assert not any("forward" in vars(part) for part in model.modules())


@torch.no_grad()
def test_biases_are_added():
    layer = nn.Linear(400, 500)
    x = torch.randn(3, 5, 400)
    expected = layer(x)
    assert pack_weights(layer, None) == [layer]
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[:, :0]), expected[:, :0])


def test_passes_with_gradient_use_the_weights_themselves():
    layer = nn.Linear(400, 500)
    pack_weights(layer, None)
    layer(torch.ones(2, 400)).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.full((500, 400), 2.0))


@torch.no_grad()
def test_a_weight_that_changed_is_not_multiplied_by_its_old_copy():
    layer, x = nn.Linear(400, 500), torch.ones(2, 400)
    pack_weights(layer, None)
    layer.weight.zero_()
    layer.bias.zero_()
    assert not layer(x).any()


def test_what_is_too_large_for_the_memory_is_not_packed(monkeypatch):
    model = a_model()
    size = 4 * (6 * 256 * 512 + 600 * 256)
    monkeypatch.setattr(packed_weights, "limit_bytes", lambda: 8 * size - 1)
    assert not pack_weights(model, None)
    monkeypatch.setattr(packed_weights, "limit_bytes", lambda: 8 * size)
    assert pack_weights(model, None)
    assert not pack_weights(model, None), "a second engine leaves them to the first"


def test_memory_is_predicted_by_the_same_rules():
    assert (estimates.SMALLEST_PACKED, estimates.PACKED_SHARE) == (packed_weights.SMALLEST, packed_weights.SHARE)


def packed(policy) -> int:
    return sum("forward" in vars(part) for part in policy.modules())


@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "adapter"])
def test_an_engine_packs_until_the_weights_change(lora, tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 2}
    policy = load_policy(Model(config={"model_type": "llama", **sizes}), texts=lambda: ["abcdefgh"])
    if lora is not None:
        policy.save(tmp_path)
        policy = load_policy(Model(path=str(tmp_path), lora=lora))
    engine, prompts, names = HFEngine(policy), [[5, 6, 7], [5]], [("a", 0), ("a", 1)]
    sampling = Sampling(max_new_tokens=8)
    found = engine.complete(prompts, sampling, names)
    assert packed(policy) == 2 * 3, "kept for the next turn"
    with torch.no_grad():
        for layer in policy.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(1.5)
    engine.stale = True
    changed = engine.complete(prompts, sampling, names)
    assert packed(policy) == 2 * 3
    engine.release_memory()
    assert packed(policy) == 0
    monkeypatch.setattr(packed_weights, "SMALLEST", 10**9)
    expected = HFEngine(policy).complete(prompts, sampling, names)
    for one, other in zip(changed, expected, strict=True):
        assert one.tokens == other.tokens
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=1e-4, atol=1e-5)
    assert [one.logprobs for one in changed] != [one.logprobs for one in found]
