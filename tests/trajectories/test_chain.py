"""Chains: credit per token across turns, segments and cuts, against hand-computed values."""

import pytest
import torch

from lmrl.trajectories.batch import VECTORS, Batch, to_sequence
from lmrl.trajectories.chain import (
    continues,
    discounts,
    first_state,
    has_known_return,
    piece,
    returns_to_go,
    rewards_and_turns,
    to_chains,
)
from lmrl.trajectories.trajectory import Segment, Trajectory


def episode(terminated: bool = True, one_segment: bool = False) -> Trajectory:
    """Two turns of two and one tokens, rewards -1 and 5, with an observation token in between."""
    first, second, last = Segment(), Segment(), Segment()
    second = first if one_segment else second
    last = first if one_segment else last
    first.observe([10, 11])
    first.act([1, 2], None, 0)
    second.observe([12])
    second.act([3], None, 1)
    segments = [first] if one_segment else [first, second]
    if not terminated:
        last.observe([13, 14])
        segments = segments if one_segment else [*segments, last]
    trajectory = Trajectory(segments, "", "", terminated=terminated, reward=4.0)
    trajectory.place_reward(-1.0, 0)
    trajectory.place_reward(5.0, 1)
    return trajectory


def test_discounts_and_returns_by_hand():
    rewards, turns = rewards_and_turns(episode())
    assert rewards.tolist() == [0, -1, 5] and turns.tolist() == [0, 0, 1]
    steps = discounts(turns, gamma=0.5, gamma_token=0.8)
    assert steps.tolist() == [0.8, 0.5, 0.5]
    # G_2 = 5, G_1 = -1 + .5 * 5 = 1.5, G_0 = .8 * 1.5 = 1.2
    assert returns_to_go(rewards, steps).tolist() == pytest.approx([1.2, 1.5, 5.0])


def flat(chains, name):
    return torch.cat([sequence.fields[name] for chain in chains for sequence in chain]).float()


def test_a_terminated_episode_has_no_state_after_it():
    for one_segment in (False, True):
        (chain,) = to_chains(episode(one_segment=one_segment), 0.5, 0.8, 1000, first=7)
        assert {sequence.chain for sequence in chain} == {7} and len(chain) == 2 - one_segment
        assert torch.allclose(flat([chain], "discounts"), torch.tensor([0.8, 0.5, 0.0]))
        assert flat([chain], "real").tolist() == [1, 1, 1]


def test_a_truncated_episode_asks_for_the_value_of_its_last_state():
    for one_segment in (False, True):
        (chain,) = to_chains(episode(terminated=False, one_segment=one_segment), 0.5, 0.8, 1000)
        assert torch.allclose(flat([chain], "discounts"), torch.tensor([0.8, 0.5, 0.5, 0.0]))
        assert flat([chain], "real").tolist() == [1, 1, 1, 0]
        assert torch.allclose(flat([chain], "returns"), torch.tensor([1.2, 1.5, 5.0, 0.0]))
        last = chain[-1]
        assert int(last.states[-1]) == len(last.tokens) - 1 and int(last.tokens[-1]) == 14


def test_only_a_truncated_episode_with_a_discount_continues():
    cut = episode(terminated=False)
    assert continues(cut, 0.99) and not continues(cut, 1.0)
    assert not continues(episode(), 0.99)


def test_a_truncated_return_is_known_where_discounting_hides_little():
    """Shares of the last state's value at gamma 0.05 and gamma_token 0.5: .5 * .05 * .05, .05 * .05, .05."""
    inf = float("inf")
    for one_segment in (False, True):
        cut = episode(terminated=False, one_segment=one_segment)
        # G_2 = 5, G_1 = -1 + .05 * 5 = -.75, G_0 = .5 * -.75 = -.375
        chains = to_chains(cut, 0.05, 0.5, 1000)
        assert flat(chains, "floors").tolist() == pytest.approx([-0.375, -0.75, -inf, 0])
        assert flat(chains, "returns").tolist() == pytest.approx([-0.375, -0.75, 5, 0])
        assert flat(to_chains(cut, 0.5, 0.8, 1000), "floors").tolist() == [-inf] * 3 + [0]
        assert has_known_return(cut, 0.05, 0.5) and not has_known_return(cut, 0.5, 0.8)
    assert flat(to_chains(episode(), 1, 1, 1000), "floors").tolist() == [4, 4, 5] and has_known_return(episode(), 1, 1)
    # Cut into two chains, each with a pseudo-action: what the end hides, it hides from the first one too.
    chains = to_chains(episode(terminated=False), 0.5, 0.8, max_tokens=7)
    real = flat(chains, "real") > 0
    assert len(chains) > 1 and flat(chains, "floors")[real].tolist() == [-inf] * 3
    chains = to_chains(episode(terminated=False), 0.05, 0.5, max_tokens=7)
    assert flat(chains, "floors")[real].tolist() == pytest.approx([-0.375, -0.75, -inf])


def test_a_long_episode_is_cut_and_goes_on_in_a_pseudo_action():
    """Cut after the first turn: what follows it is the state that the second turn was taken in."""
    chains = to_chains(episode(), 0.5, 0.8, max_tokens=7)
    assert [len(chain) for chain in chains] == [2, 1] and [chain[0].chain for chain in chains] == [0, 1]
    context = chains[0][1]
    assert context.tokens.tolist() == [12] and context.fields["real"].tolist() == [0]
    assert torch.allclose(flat(chains[:1], "discounts"), torch.tensor([0.8, 0.5, 0.0]))
    assert torch.allclose(flat(chains, "returns"), torch.tensor([1.2, 1.5, 0.0, 5.0]))  # realised to the very end


def test_a_cut_chain_of_vectors_goes_on_in_a_vector():
    whole = episode()
    for segment in whole.segments:
        segment.kind, segment.vectors = "gaussian", {place: (0.5, place) for place in segment.actions}
    micro = Batch(to_chains(whole, 0.5, 0.8, max_tokens=7)[0]).collate([0, 1], pad_id=0)
    assert micro.kind == "gaussian" and micro.fields[VECTORS].tolist() == [[0.5, 2], [0.5, 3], [0, 0]]


def test_chains_stay_whole_and_in_order_in_any_batch():
    sequences = []
    for number in range(6):
        sequences += [one for chain in to_chains(episode(), 1, 1, 1000, first=number) for one in chain]
    batch = Batch(sequences)
    import numpy as np

    for part in batch.minibatches(np.random.default_rng(0), 3):
        assert [one.chain for one in part.sequences[::2]] == [one.chain for one in part.sequences[1::2]]
        for micro in part.microbatches(9, pad_id=0):
            order = [part.sequences[index].chain for index in micro.indices]
            assert order[::2] == order[1::2]
            assert micro.targets_N.tolist() == [1, 2, 3] * (len(order) // 2)


def test_the_state_an_episode_begins_in():
    start = first_state(episode().segments[0])
    assert start.tokens.tolist() == [10, 11] and start.states.tolist() == [1]


def test_a_piece_goes_on_where_it_was_cut():
    whole = episode()
    first = piece(whole, 0, 1)
    assert not first.terminated and [segment.tokens for segment in first.segments] == [[10, 11, 1, 2], [12]]
    (chain,) = to_chains(first, 0.5, 0.8, 1000)
    assert torch.allclose(flat([chain], "discounts"), torch.tensor([0.8, 0.5, 0.0]))
    assert flat([chain], "real").tolist() == [1, 1, 0] and flat([chain], "rewards").tolist() == [0, -1, 0]
    last = piece(whole, 1, 5)
    assert last.terminated and [segment.tokens for segment in last.segments] == [[12, 3]]
    tail = piece(episode(terminated=False), 1, 1)
    assert not tail.terminated and tail.segments[-1].tokens == [13, 14]


def test_an_action_without_context_has_no_state():
    bare = Segment()
    bare.act([1, 2], None, 0)
    with pytest.raises(ValueError, match="begins with an action token"):
        to_sequence(bare)
