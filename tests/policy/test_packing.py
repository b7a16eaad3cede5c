"""Sequences packed end to end: as each is computed alone, in values and gradients."""

import pytest
import torch

from lmrl.policy.load import load_policy
from lmrl.policy.passes import ForwardRequest
from lmrl.policy.policy import Policy
from lmrl.recipe import Model
from lmrl.trajectories.batch import Batch, Sequence
from lmrl.trajectories.shared import pack

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SIZES | {"num_key_value_heads": 2}
MODELS = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8},
    "mistral": GROUPED | {"sliding_window": 4},
    "gemma3_text": GROUPED
    | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
}


def policy_of(kind: str, attention: str = "varlen") -> Policy:
    torch.manual_seed(0)
    options = Model(config={"model_type": kind, **MODELS.get(kind, {})}, attention=attention)
    policy = load_policy(options, texts=lambda: ["abcdefghijklm"])
    policy.attention = attention
    return policy.eval()


def batch_of() -> Batch:
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for length in (9, 3, 7, 5, 9):
        tokens = torch.randint(0, 12, (length,), generator=generator)
        states = torch.arange(length // 2, length - 1)
        weights = torch.randn(len(states), generator=generator, dtype=torch.float64)
        sequences.append(Sequence(tokens, states, tokens[states + 1], {"weight": weights}))
    return Batch(sequences)


def gradients(policy: Policy, packed: bool, tokens: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sum of log-probabilities, and its gradients."""
    policy.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for micro in batch_of().microbatches(tokens, policy.pad_id, packed):
        logprobs_N = policy(micro, ForwardRequest()).logprobs
        loss = (logprobs_N * micro.fields["weight"]).sum()
        loss.backward()
        total += loss.detach()
    return total, {name: one.grad.clone() for name, one in policy.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_equal_those_of_padded_rows(kind):
    policy = policy_of(kind).double()
    assert policy.packs
    expected, padded = gradients(policy, False, 10_000)
    for tokens in (10_000, 14):
        total, packed = gradients(policy, True, tokens)
        torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
        assert packed.keys() == padded.keys()
        for name, gradient in packed.items():
            # Some norms are computed in float32, whatever the model's precision.
            torch.testing.assert_close(gradient, padded[name], rtol=1e-5, atol=1e-6, msg=name)


def test_padded_rows_equal_single_ones():
    """Without a mask, since a causal model sees no padding on its right."""
    policy = policy_of("llama", "auto").double()
    batch = batch_of()
    together = policy.score(batch)["logprobs"]
    for index, sequence in enumerate(batch.sequences):
        torch.testing.assert_close(together[index], policy.score(Batch([sequence]))["logprobs"][0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", MODELS)
def test_shared_beginnings_in_a_packed_row_equal_plain_sequences(kind):
    policy = policy_of(kind).double()
    assert policy.packs and policy.shares_prompts
    plain = [
        Sequence(torch.tensor(tokens), torch.arange(2, len(tokens) - 1), torch.tensor(tokens[3:]))
        for tokens in ([3, 4, 5, 6, 7], [3, 4, 5, 8], [9, 10, 1, 2, 3])
    ]
    expected = torch.cat([policy.score(Batch([one]))["logprobs"][0] for one in plain])
    [micro] = Batch([pack(plain[:2]), plain[2]]).microbatches(100, policy.pad_id, packed=True)
    assert micro.positions_BT.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 3]]
    assert micro.packing.query_ends.tolist() == [0, 5, 8, 10, 11]  # the last three: a beginning and its continuations
    assert micro.packing.key_ends.tolist() == [0, 5, 8, 13, 17]
    assert micro.packing.key_tokens.tolist() == [*range(5), 5, 6, 7, 5, 6, 7, 8, 9, 5, 6, 7, 10]
    found = policy(micro).logprobs
    assert micro.indices == [1, 0]
    torch.testing.assert_close(found, torch.cat([expected[3:], expected[:3]]), rtol=0, atol=1e-6)
    found.sum().backward()
    gradients = {name: one.grad.clone() for name, one in policy.named_parameters() if one.grad is not None}
    policy.zero_grad()
    for one in plain:
        policy(Batch([one]).collate([0], policy.pad_id)).logprobs.sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, policy.get_parameter(name).grad, rtol=1e-5, atol=1e-6, msg=name)


def test_a_packed_row_is_laid_out_by_hand():
    one = Sequence(torch.tensor([5, 6, 7]), torch.tensor([1]), torch.tensor([7]))
    other = Sequence(torch.tensor([8, 9]), torch.tensor([0]), torch.tensor([9]))
    [micro] = Batch([one, other]).microbatches(5, pad_id=0, packed=True)  # shortest first
    assert micro.tokens_BT.tolist() == [[8, 9, 5, 6, 7]] and micro.shape == (2, 3)
    assert micro.packing.query_ends.tolist() == [0, 2, 5] and micro.packing.key_tokens is None
    assert micro.positions_BT.tolist() == [[0, 1, 0, 1, 2]]
    assert micro.rows_N.tolist() == [0, 0] and micro.cols_N.tolist() == [0, 3] and micro.targets_N.tolist() == [9, 7]
    assert len(Batch([one, other]).microbatches(4, pad_id=0, packed=True)) == 2


def test_unsupported_models_are_found():
    assert not policy_of("mamba").packs  # a state that runs from one sequence into the next
    assert not policy_of("llama", "eager").packs
    assert not policy_of("llama", "auto").packs  # on a CPU, where it is not faster
