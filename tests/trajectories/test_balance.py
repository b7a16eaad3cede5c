"""Sequences over ranks and minibatches: nearly equal loads, chains whole, nothing lost."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from lmrl.policy.costs import PassCost, pass_cost
from lmrl.trajectories.balance import (
    _from_arrays,
    _to_arrays,
    assign,
    deal,
    joined,
    labelled,
    loads_of,
    split,
)
from lmrl.trajectories.batch import Batch, Sequence

COST = PassCost(token=2e9, action=5e8, pair=6e4)
"""About that of Qwen2.5-1.5B: attention is a fourth of the work at 8,000 tokens."""


def lengths(count, seed):
    """Prompts of some hundred tokens with completions of very different lengths, cut at 4,096."""
    rng = np.random.default_rng(seed)
    return 200 + np.minimum(rng.lognormal(6.0, 0.9, count), 4096).astype(int)


def costs_of(tokens):
    return [COST.token * n + COST.action * (n - 200) + COST.pair * float(n) ** 2 for n in tokens]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [64, 256])
def test_ranks_are_within_a_twentieth_of_the_best(ranks, count):
    for seed in range(5):
        costs = costs_of(lengths(count, seed))
        homes = [item * ranks // count for item in range(count)]
        bound = max(sum(costs) / ranks, max(costs))
        chosen = assign(costs, homes, ranks)
        assert max(loads_of(costs, chosen, ranks)) <= 1.05 * bound
        assert np.mean(np.equal(chosen, homes)) > 0.5  # most stay where they are


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_minibatches_are_as_even_as_ranks(ranks):
    """Each of 4 minibatches of 32 waits for its slowest rank, and at least for its longest sequence."""
    count, waited, best = 128, 0.0, 0.0
    for seed in range(5):
        costs = costs_of(lengths(count, seed))
        for part in split(costs, 4, np.random.default_rng(seed)):
            own = [costs[item] for item in part]
            chosen = assign(own, [item * ranks // count for item in part], ranks)
            waited += max(loads_of(own, chosen, ranks))
            best += max(sum(own) / ranks, max(own))
    assert waited <= 1.05 * best


def test_longest_first_by_hand():
    # 7 takes rank 0; 6 and 5 take rank 1 (mean 11): 6, then 5; 4 fits beside 7.
    assert assign([7, 6, 5, 4], [0, 1, 1, 0], 2, slack=0.0) == [0, 1, 1, 0]
    # All at home on rank 0: 7 stays, 6 goes, 5 goes to the least loaded (1), 4 fits beside 7 exactly.
    assert assign([7, 6, 5, 4], [0, 0, 0, 0], 2, slack=0.0) == [0, 1, 1, 0]
    # 3 and 3 fill rank 0 exactly.
    assert assign([3, 3, 2, 2, 2], [0] * 5, 2, slack=0.0) == [0, 0, 1, 1, 1]
    # 3 + 2 + 2 against 3 + 2, until a 3 and a 2 change places.
    assert assign([3, 3, 2, 2, 2], [0, 1, 0, 0, 0], 2, slack=0.0) == [1, 1, 0, 0, 0]
    assert assign([], [], 3) == [] and assign([0.0, 0.0], [1, 0], 2) == [1, 0]


def test_even_loads_do_not_move():
    costs = [1.0 + 0.01 * (item % 2) for item in range(8)]
    assert assign(costs, [0, 0, 0, 0, 1, 1, 1, 1], 2) == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("count", [1, 3, 7, 20])
def test_parts_hold_everything_once(count):
    costs = costs_of(lengths(17, 0))
    parts = split(costs, count, np.random.default_rng(1))
    assert sorted(item for part in parts for item in part) == list(range(17)) and len(parts) == count
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    again = split(costs, count, np.random.default_rng(1))
    other = split(costs, count, np.random.default_rng(2))
    assert parts == again != other  # a function of the generator


def test_similar_costs_go_to_different_parts():
    for seed in range(10):
        parts = split([8.0, 4.0, 2.0, 1.0, 1.0], 2, np.random.default_rng(seed))
        assert sorted(sum([8.0, 4.0, 2.0, 1.0, 1.0][item] for item in part) for part in parts) == [7.0, 9.0]


def sequence(tokens, actions, chain=None, zero=False):
    numbers = torch.arange(tokens)
    return Sequence(numbers, numbers[:actions], numbers[:actions], {}, chain, zero_gradient=zero)


def test_cost_of_a_sequence():
    cost = PassCost(token=10.0, action=3.0, pair=0.5)
    assert cost(sequence(8, 5)) == 10 * 8 + 3 * 5 + 0.5 * 64
    assert cost(sequence(8, 5, zero=True)) == 0


def test_costs_of_a_model(tiny_policy):
    """Two layers, 16 wide: 4 x 16 x 16 in attention, 3 x 16 x 32 in the feed-forward part, and norms."""
    cost, vocabulary = pass_cost(tiny_policy), tiny_policy.vocabulary.shape[0]
    assert cost == PassCost(2.0 * (2 * (4 * 256 + 3 * 512 + 32) + 16), 2.0 * vocabulary * 16, 2.0 * 2 * 16)


def test_minibatches_keep_chains_whole():
    batch = Batch([sequence(4 + n, 2, chain=n // 2) for n in range(12)])
    parts = deal(labelled(batch, ()), np.random.default_rng(0), 3, COST)
    assert [len(part.sequences) for part in parts] == [4, 4, 4]
    for part in parts:
        chains = [one.chain for one in part.sequences]
        assert chains[0] == chains[1] and chains[2] == chains[3]
        pairs = zip(part.sequences[::2], part.sequences[1::2], strict=True)
        assert all(len(one.tokens) + 1 == len(other.tokens) for one, other in pairs)
    assert sorted(len(one.tokens) for one in joined(parts).sequences) == [4 + n for n in range(12)]
    assert len(deal(labelled(batch, ()), np.random.default_rng(0), 100, COST)) == 6  # as many as there are chains
    assert deal(Batch([]), np.random.default_rng(0), 3, COST) == []


def test_sequences_travel_as_they_are():
    sent = replace(sequence(4, 2, chain=5, zero=True), branches=torch.tensor([0, 0, 1, 2]))
    numbers = torch.arange(10.0)
    sent.fields = {"a": numbers[4:6], "b": torch.tensor([True, False]), "c": numbers[:2].bfloat16()}
    data = pickle.dumps(_to_arrays(sent))
    found = _from_arrays(pickle.loads(data))
    assert (found.chain, found.zero_gradient) == (5, True) and found.fields.keys() == sent.fields.keys()
    for name in ("tokens", "states", "targets", "branches"):
        assert torch.equal(getattr(found, name), getattr(sent, name))
    for name, value in sent.fields.items():
        assert torch.equal(found.fields[name], value) and found.fields[name].dtype == value.dtype
    assert len(pickle.dumps(_to_arrays(replace(sent, fields={"a": torch.zeros(100_000)[:2]})))) < 2_000  # not the whole


def test_labels_tell_ranks_apart(monkeypatch):
    one = sequence(4, 2, chain=5)
    one.fields = {"episode": torch.tensor([7, 7]), "advantages": torch.tensor([1.0, 2.0])}
    monkeypatch.setattr("lmrl.distributed.rank", lambda: 3)
    (copy,) = labelled(Batch([one]), ("episode",)).sequences
    assert copy.chain == (3 << 48) + 5 and copy.fields["episode"].tolist() == [(3 << 48) + 7] * 2
    assert torch.equal(copy.fields["advantages"], one.fields["advantages"])
    assert one.chain == 5 and one.fields["episode"].tolist() == [7, 7]
