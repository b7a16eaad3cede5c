"""Packed sequences against plain ones."""

import pytest
import torch

from lmrl.trajectories.batch import Batch, Sequence
from lmrl.trajectories.shared import pack, shared_length, visible


def sequence(tokens, first, **fields):
    """A sequence whose actions begin at position `first`."""
    tokens = torch.tensor(tokens)
    states = torch.arange(first - 1, len(tokens) - 1)
    return Sequence(tokens, states, tokens[states + 1], {name: torch.tensor(value) for name, value in fields.items()})


def test_what_is_shared_ends_where_actions_begin():
    assert shared_length([sequence([1, 2, 3, 4], 2), sequence([1, 2, 3, 5], 2)]) == 2
    assert shared_length([sequence([1, 2, 3, 4], 3), sequence([1, 9, 3, 4], 3)]) == 1
    assert shared_length([sequence([1, 2, 3], 2), sequence([7, 2, 3], 2)]) == 0
    assert pack([sequence([1, 2, 3], 2), sequence([7, 2, 3], 2)]) is None


def test_packing_by_hand():
    packed = pack([sequence([1, 2, 3, 4], 2, x=[0.1, 0.2]), sequence([1, 2, 5], 2, x=[0.3])])
    assert packed.tokens.tolist() == [1, 2, 3, 4, 5]
    assert packed.branches.tolist() == [0, 0, 1, 1, 2]
    assert packed.states.tolist() == [1, 2, 1]  # 5 follows the shared 2, not the 4 before it
    assert packed.targets.tolist() == [3, 4, 5]
    torch.testing.assert_close(packed.fields["x"], torch.tensor([0.1, 0.2, 0.3]))
    assert packed.positions.tolist() == [0, 1, 2, 3, 2]
    assert visible(packed.branches[None])[0, 4].tolist() == [True, True, False, False, True]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_plain(tiny_policy, attention):
    tiny_policy.causal_lm.config._attn_implementation = attention
    assert tiny_policy.shares_prompts
    pairs = [
        [sequence([3, 4, 5, 6, 7, 8], 4), sequence([3, 4, 5, 6, 9], 4), sequence([3, 4, 5, 6, 2, 1, 2], 4)],
        [sequence([5, 5, 1], 2), sequence([5, 5, 2, 3, 4], 2)],
    ]
    plain = Batch([one for pair in pairs for one in pair])
    packed = Batch([pack(pair) for pair in pairs] + [sequence([8, 9, 10, 11], 2)])  # a plain one among them
    expected = torch.cat(tiny_policy.score(plain)["logprobs"])
    found = tiny_policy.score(packed)["logprobs"]
    torch.testing.assert_close(torch.cat(found[:2]), expected, atol=1e-6, rtol=0)
    alone = tiny_policy.score(Batch([sequence([8, 9, 10, 11], 2)]))["logprobs"][0]
    torch.testing.assert_close(found[2], alone, atol=1e-6, rtol=0)


def test_packed_gradients_equal_plain_ones(tiny_policy):
    pair = [sequence([3, 4, 5, 6, 7, 8], 4), sequence([3, 4, 5, 6, 9], 4)]
    gradients = []
    for sequences in (pair, [pack(pair)]):
        tiny_policy.zero_grad()
        [micro] = Batch(sequences).microbatches(1000, tiny_policy.pad_id)
        tiny_policy(micro).logprobs.sum().backward()
        gradients.append([p.grad.clone() for p in tiny_policy.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "shares"),
    [
        ({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}, True),
        ({"model_type": "mistral", "sliding_window": 4}, False),  # a window counts tokens of other branches
        ({"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1}, False),  # a state, not attention
    ],
)
def test_models_that_cannot_share_beginnings_are_found(config, shares):
    from lmrl.policy.load import load_policy
    from lmrl.recipe import Model

    if config["model_type"] == "mistral":
        config = config | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        config |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    assert load_policy(Model(config=config), texts=lambda: ["abcdefghijklm"]).shares_prompts is shares
