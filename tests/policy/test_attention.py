"""Attention of single tokens: equal to transformers' own, and switched back afterwards."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lmrl.policy.attention import GROUPED, decoding_attention, grouped_attention
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
    found, _ = grouped_attention(*inputs, scaling=0.3)
    assert found.shape == expected.shape == (4, positions, heads, 6)
    torch.testing.assert_close(found, expected)


def test_is_taken_while_decoding_and_no_longer():
    policy = load_policy(Model(config=dict(TINY_LLAMA) | {"num_key_value_heads": 1}), texts=lambda: ["abc"]).train()
    config = policy.causal_lm.config
    with pytest.raises(ZeroDivisionError), policy.decoding():
        assert config._attn_implementation == GROUPED and not policy.training
        raise ZeroDivisionError
    assert config._attn_implementation == "sdpa" and policy.training
    config._attn_implementation = "eager"
    with decoding_attention(policy.causal_lm):
        assert config._attn_implementation == "eager"
