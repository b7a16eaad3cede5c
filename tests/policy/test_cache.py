"""The cache of rows: what joins, leaves and grows, against plain concatenation."""

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lmrl.policy.cache import SPARE, Cache, RowsLayer, new_cache
from lmrl.policy.load import load_policy
from lmrl.recipe import Model
from tests.conftest import TINY_LLAMA


def states(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys and values, which need not be equally wide."""
    return torch.randn(rows, 2, columns, 4), torch.randn(rows, 2, columns, 3)


def test_growth_equals_concatenation():
    torch.manual_seed(0)
    layer, plain, buffers = RowsLayer(), DynamicLayer(), set()
    for columns in (5, *[1] * (2 * SPARE + 3), SPARE + 9, 1):
        new = states(3, columns)
        assert layer.get_mask_sizes(columns) == plain.get_mask_sizes(columns)
        for found, expected in zip(layer.update(*new), plain.update(*new), strict=True):
            assert torch.equal(found, expected)
        assert layer.get_seq_length() == plain.get_seq_length()
        buffers.add(layer.keys.data_ptr())
    assert len(buffers) <= 6  # written in place nearly always


def test_rows_join_move_and_are_trimmed():
    """A random history, against a list of rows that are each kept for themselves."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layer, rows = RowsLayer(), []  # of each row: keys (2, T, 4) and values (2, T, 3)
    for _ in range(60):
        if len(rows) < 6:
            width = int(torch.randint(1, 90, (), generator=generator))
            other = RowsLayer()
            new = states(3, width)
            other.update(*new)
            chosen = torch.randint(3, (2,), generator=generator)
            layer.join(other, chosen)
            rows += [(new[0][index], new[1][index]) for index in chosen]
        new = states(len(rows), 1)
        rows = [
            tuple(torch.cat([old, part[row]], 1) for old, part in zip(kept, new, strict=True))
            for row, kept in enumerate(rows)
        ]
        found = layer.update(*new)
        for row, kept in enumerate(rows):
            for all_rows, expected in zip(found, kept, strict=True):
                assert torch.equal(all_rows[row, :, -expected.shape[1] :], expected)
        assert found[0].isfinite().all() and found[0].shape[2] == max(kept[0].shape[1] for kept in rows)
        leaver = int(torch.randint(len(rows), (), generator=generator))
        if len(rows) > 1:
            if leaver < len(rows) - 1:
                layer.move(torch.tensor([len(rows) - 1]), torch.tensor([leaver]))
            rows[leaver] = rows[-1]
            rows.pop()
            layer.trim(len(rows), max(kept[0].shape[1] for kept in rows))


def test_a_row_is_inserted_into_all():
    torch.manual_seed(0)
    layer, other = RowsLayer(), RowsLayer()
    rows, one = states(3, 9), states(1, 4)
    layer.update(*(part.clone() for part in rows))
    layer.trim(3, 8)
    other.update(*one)
    layer.insert(other, torch.tensor([0, 2, 4]))
    for found, old, new in zip((layer.keys, layer.values), rows, one, strict=True):
        for row, first in enumerate((0, 2, 4)):
            expected = old[row].clone()
            expected[:, 1 + first : 5 + first] = new[0]
            assert torch.equal(found[row], expected)


def test_buffers_shrink_with_the_rows_expected():
    layer, other = RowsLayer(), RowsLayer()
    other.update(*states(8, 4))
    layer.room = 8
    layer.join(other, torch.arange(8))
    layer.room = 2
    layer.trim(2, 4)
    for _ in range(SPARE + 1):
        layer.update(*states(2, 1))
    assert len(layer.keys) == 2


WINDOW = {"model_type": "mistral", "sliding_window": 4}
ALTERNATING = {
    "model_type": "gemma3_text",
    "sliding_window": 3,
    "head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}, WINDOW, ALTERNATING])
def test_decoding_equals_that_with_the_cache_of_transformers(changes):
    """Left-padded rows, token by token beyond the window: the same logits as with a DynamicCache."""
    torch.manual_seed(0)
    policy = load_policy(Model(config=dict(TINY_LLAMA) | changes), texts=lambda: ["abcdefghijklmnop"]).eval()
    plain = Cache(policy.causal_lm.config, two=False)
    plain.policy = DynamicCache(config=policy.causal_lm.config)
    own = policy.new_cache()
    assert own.takes_rows and not plain.takes_rows
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    tokens = torch.randint(3, 18, (2, 6))
    for _ in range(10):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        with torch.no_grad():
            expected = policy.next_token_logits(plain, **inputs)
            with policy.decoding():
                found = policy.next_token_logits(own, **inputs)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        tokens = found.argmax(-1, keepdim=True)
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)


def test_under_autocast_nothing_is_held_in_float32():
    """Float32 weights under bfloat16 arithmetic: the same logits to the bit as with keys that are cast every time."""
    torch.manual_seed(0)
    policy = load_policy(Model(config=dict(TINY_LLAMA)), texts=lambda: ["abcdefghijklmnop"]).eval()
    policy.autocast_dtype = torch.bfloat16
    plain, own = Cache(policy.causal_lm.config, two=False), policy.new_cache()
    plain.policy = DynamicCache(config=policy.causal_lm.config)
    for tokens in ([[3, 4, 5]], [[6]], [[7]]):
        inputs = {"input_ids": torch.tensor(tokens)}
        with torch.no_grad():
            assert torch.equal(policy.next_token_logits(own, **inputs), policy.next_token_logits(plain, **inputs))
    assert own.policy.layers[0].keys.dtype == own.policy.layers[0].values.dtype == torch.bfloat16


def test_layers_with_a_state_keep_the_cache_of_transformers():
    from transformers import Lfm2Config

    config = Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"])
    assert isinstance(new_cache(config), DynamicCache)


def test_rows_cannot_join_layers_of_another_kind():
    """As those of a DynamicCache, whose rows begin and end together."""
    config = load_policy(Model(config=dict(TINY_LLAMA)), texts=lambda: ["ab"]).causal_lm.config
    plain = Cache(config, two=False)
    plain.policy = DynamicCache(config=config)
    plain.expect(4)  # nothing to allocate ahead
    with pytest.raises(TypeError, match="neither join nor leave a layer of the kind DynamicLayer"):
        plain.join(Cache(config, two=False), torch.tensor([0]))
