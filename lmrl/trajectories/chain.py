"""Chains: an episode as the linked action tokens that value-based objectives compute on.

The state after an action token is the one in which the next action token was taken, wherever that is; environment
tokens in between are skipped. A truncated episode continues: a pseudo-action at its end asks for the value of its last
state.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lmrl.trajectories.batch import VECTORS, Sequence, to_sequence
from lmrl.trajectories.trajectory import CONTEXT, Segment, Trajectory

NEGLIGIBLE = 0.01
"""A return counts as known if it lacks at most this share of the value of a truncated episode's last state."""


def to_sequences(trajectory: Trajectory) -> list[Sequence]:
    """One sequence per segment with actions, in order, and a pseudo-action at the end if the episode was truncated."""
    held = [segment for segment in trajectory.segments if segment.actions]
    if trajectory.terminated:
        return [to_sequence(segment) for segment in held]
    last = trajectory.segments[-1]
    if last.actions:  # the observation after the last action is in the same context
        return [*map(to_sequence, held[:-1]), to_sequence(last, bootstrap=True)]
    sequences = [*map(to_sequence, held), to_sequence(last, bootstrap=True)]
    sequences[-1].kind = sequences[0].kind
    if VECTORS in sequences[0].fields:  # a pseudo-action needs a vector as well
        sequences[-1].fields[VECTORS] = torch.zeros_like(sequences[0].fields[VECTORS][:1])
    return sequences


def continues(trajectory: Trajectory, gamma: float) -> bool:
    """Whether the value of an episode's last state counts: it was truncated, and what follows is discounted.

    With gamma 1 a limit is part of the task and ends the episode, as it does when returns are reported: rewards that are
    neither discounted nor end have no finite sum, and if all episodes are truncated, values that are learned from the
    value of the last state are fixed by nothing and drift.
    """
    return not trajectory.terminated and gamma < 1


def rewards_and_turns(trajectory: Trajectory, cut_penalty: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Reward of each action token, in double, and its turn, both (A,).

    cut_penalty: subtracted from the reward of the last token of each turn that ran into the token limit.
    """
    pairs = [
        (reward, turn)
        for segment in trajectory.segments
        for reward, turn in zip(segment.rewards, segment.turns, strict=True)
        if turn != CONTEXT
    ]
    rewards, turns = zip(*pairs, strict=True)
    rewards_A, turns_A = torch.tensor(rewards, dtype=torch.float64), torch.tensor(turns)
    for cut in trajectory.cut_turns if cut_penalty else ():
        rewards_A[(turns_A == cut).nonzero()[-1]] -= cut_penalty
    return rewards_A, turns_A


def discounts(turns_A: torch.Tensor, gamma: float, gamma_token: float) -> torch.Tensor:
    """Discount from each action token to the next, (A,): `gamma_token` inside a turn, `gamma` at its end."""
    following = torch.cat([turns_A[1:], turns_A[-1:] + 1])
    return torch.where(following == turns_A, torch.tensor(gamma_token, dtype=torch.float64), gamma)


def returns_to_go(rewards_A: torch.Tensor, discounts_A: torch.Tensor) -> torch.Tensor:
    """Discounted return of each action token: G_t = r_t + discount_t G_{t+1}, (A,)."""
    result, carried = [], 0.0
    # In Python numbers: a tensor operation per token is tens of times slower.
    for reward, discount in zip(reversed(rewards_A.tolist()), reversed(discounts_A.tolist()), strict=True):
        carried = reward + discount * carried
        result.append(carried)
    return rewards_A.new_tensor(result[::-1])


def token_returns(trajectory: Trajectory, gamma: float, gamma_token: float) -> torch.Tensor:
    """Discounted return-to-go of every action token, to the end of the log, (A,)."""
    rewards_A, turns_A = rewards_and_turns(trajectory)
    return returns_to_go(rewards_A, discounts(turns_A, gamma, gamma_token))


def hidden_shares(trajectory: Trajectory, discounts_A: torch.Tensor) -> torch.Tensor:
    """The share of the value of an episode's last state that each action token's return lacks, (A,): 0 if it
    terminated."""
    if trajectory.terminated:
        return torch.zeros_like(discounts_A)
    return discounts_A.flip(0).cumprod(0).flip(0)


def has_known_return(trajectory: Trajectory, gamma: float, gamma_token: float) -> bool:
    """True if the log holds the return of any action token (see `floors` in to_chains)."""
    _, turns_A = rewards_and_turns(trajectory)
    return bool((hidden_shares(trajectory, discounts(turns_A, gamma, gamma_token)) <= NEGLIGIBLE).any())


def anchors(trajectory: Trajectory, gamma: float, gamma_token: float) -> bool:
    """True if the value of an episode's first action is not that of its last state plus what was earned: it terminated, or
    something is discounted."""
    _, turns_A = rewards_and_turns(trajectory)
    return bool(hidden_shares(trajectory, discounts(turns_A, gamma, gamma_token))[0] < 1)


def to_chains(
    trajectory: Trajectory, gamma: float, gamma_token: float, max_tokens: int, first: int = 0
) -> list[list[Sequence]]:
    """An episode as chains of at most `max_tokens` tokens (unless one segment alone has more), numbered from `first`.

    Sequences carry, per action token: `rewards`, `discounts` (0 at the end of a terminated episode), `returns`
    (realised, to the end of the log), `floors` (the same, but -inf where a truncation hides what followed, unless
    discounting makes that negligible) and `real` (False for a pseudo-action). In a batch that keeps chains whole, the
    next state of action n is that of action n + 1. A chain that was cut continues with a pseudo-action in the segment
    after the cut.
    """
    sequences = to_sequences(trajectory)
    rewards_A, turns_A = rewards_and_turns(trajectory)
    discounts_A = discounts(turns_A, gamma, gamma_token)
    returns_A = returns_to_go(rewards_A, discounts_A)
    floors_A = returns_A.masked_fill(hidden_shares(trajectory, discounts_A) > NEGLIGIBLE, -torch.inf)
    if trajectory.terminated:
        discounts_A[-1] = 0.0
    else:
        rewards_A, discounts_A, returns_A, floors_A = (
            torch.cat([one, one.new_zeros(1)]) for one in (rewards_A, discounts_A, returns_A, floors_A)
        )
    real_A = torch.ones_like(rewards_A)
    if not trajectory.terminated:
        real_A[-1] = 0.0
    sizes = [len(sequence.targets) for sequence in sequences]
    fields = {"rewards": rewards_A, "discounts": discounts_A, "returns": returns_A, "floors": floors_A, "real": real_A}
    for name, flat in fields.items():
        for sequence, part in zip(sequences, flat.split(sizes), strict=True):
            sequence.fields[name] = part
    chains = _cut(sequences, max_tokens)
    for number, chain in enumerate(chains, start=first):
        for sequence in chain:
            sequence.chain = number
    return chains


def _cut(sequences: list[Sequence], max_tokens: int) -> list[list[Sequence]]:
    chains: list[list[Sequence]] = [[]]
    widest = 0
    for sequence in sequences:
        widest = max(widest, len(sequence.tokens))
        if (
            chains[-1] and widest * (len(chains[-1]) + 2) > max_tokens
        ):  # with padding, and the sequence of a pseudo-action
            chains[-1].append(_state_before(sequence))
            chains.append([])
            widest = len(sequence.tokens)
        chains[-1].append(sequence)
    return chains


def _state_before(sequence: Sequence) -> Sequence:
    """The context of a sequence's first action, with a pseudo-action that asks for its value."""
    end = int(sequence.states[0]) + 1
    fields = {name: torch.zeros_like(values[:1]) for name, values in sequence.fields.items()}
    target = torch.zeros(1, dtype=torch.long)
    return Sequence(sequence.tokens[:end], sequence.states[:1], target, fields, kind=sequence.kind)


def piece(trajectory: Trajectory, first: int, count: int) -> Trajectory:
    """Turns `first` to `first + count` of an episode whose turns have a segment each; truncated where it was cut."""
    segments = trajectory.segments
    acting = [index for index, segment in enumerate(segments) if segment.actions]
    end = first + count
    if end >= len(acting):
        return replace(trajectory, segments=segments[acting[first] :])
    following = segments[acting[end]]
    kept = [segments[index] for index in acting[first:end]]
    return replace(trajectory, segments=[*kept, _context(following)], terminated=False)


def _context(segment: Segment) -> Segment:
    """The context of a segment, before its first action."""
    end = segment.actions[0]
    return Segment(segment.tokens[:end], segment.turns[:end], segment.logprobs[:end], segment.rewards[:end])


def first_state(segment: Segment) -> Sequence:
    """The state an episode begins in, as a sequence with a pseudo-action."""
    return to_sequence(_context(segment), bootstrap=True)
