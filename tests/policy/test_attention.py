"""Attention of single tokens: equal to transformers' own; of short bfloat16 sequences: closer to the exact one."""

import json

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lmrl.policy.attention import ATTENTION, attention, take_attention
from lmrl.policy.load import load_policy
from lmrl.recipe import Model
from tests.conftest import TINY_LLAMA


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "positions"), [(6, 1), (2, 1), (6, 3)])
def test_equals_that_of_transformers(heads, positions, masked):
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = heads // 2, True
    query, key, value = torch.randn(4, heads, positions, 8), torch.randn(4, 2, 5, 8), torch.randn(4, 2, 5, 6)
    mask = torch.ones(4, 1, positions, 5, dtype=torch.bool)
    mask[1, :, :, :2] = mask[2, :, :, :4] = False
    inputs = (module, query, key, value, mask if masked else None)
    expected, _ = sdpa_attention_forward(*inputs, scaling=0.3)
    found, _ = attention(*inputs, scaling=0.3)
    assert found.shape == expected.shape == (4, positions, heads, 6)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mask", [None, "bool", "bfloat16"])
@pytest.mark.parametrize("autocast", [False, True])
def test_short_bfloat16_attention_is_as_exact_as_that_of_float32(mask, autocast):
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 3, True
    shapes = ((2, 6, 7, 8), (2, 2, 7, 8), (2, 2, 7, 8))
    inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    visible = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    visible[1, :, :, 0] = False
    visible[1, :, 0, 0] = True
    masks = {None: None, "bool": visible, "bfloat16": torch.zeros(2, 1, 7, 7).masked_fill(~visible, -1e9)}
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected, _ = sdpa_attention_forward(module, *exact, None if mask is None else visible, scaling=0.3)
    given = masks[mask].bfloat16() if mask == "bfloat16" else masks[mask]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found, _ = attention(module, *inputs, given, scaling=0.3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)  # one rounding
    weights = torch.randn(expected.shape).bfloat16()
    expected.backward(weights.double())
    found.backward(weights)
    for one, other in zip(inputs, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=2**-8, atol=1e-5)


def test_is_taken_where_the_attention_is_sdpa():
    policy = load_policy(Model(config=dict(TINY_LLAMA)), texts=lambda: ["abc"])
    lm = policy.causal_lm
    assert lm.config._attn_implementation == ATTENTION
    assert "attn" not in json.dumps(lm.config.to_dict())  # and goes into no checkpoint
    lm.config._attn_implementation = "eager"
    take_attention(policy)
    assert lm.config._attn_implementation == "eager"


def test_a_frozen_reference_computes_like_the_policy():
    policy = load_policy(Model(config=dict(TINY_LLAMA)), texts=lambda: ["abc"], reference=True)
    with policy._reference_model() as reference:
        assert reference is not policy.causal_lm
        assert reference.config._attn_implementation == ATTENTION
