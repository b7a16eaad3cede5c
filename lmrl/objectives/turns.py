"""Advantages of turns: the return from the turn on, minus that of the group's other episodes, and how to scale it.

Advantages are divided by one number per group or batch, never by one per turn: which episodes reach a late turn depends
on earlier actions, so with a scale per turn the weight of a loss would depend on when it happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lmrl import distributed
from lmrl.objectives.groups import flat
from lmrl.objectives.policy_gradient import ROUNDING
from lmrl.trajectories.chain import returns_to_go


@dataclass
class Turns:
    """The turns of a batch's episodes, one after the other, K in all. Groups are numbered within this process."""

    to_go_K: torch.Tensor
    """Return from this turn on, in double; the whole episode's if rewards come only at its end."""
    index_K: torch.Tensor
    """Index of the turn in its episode; 0 for all if rewards come only at the end of episodes."""
    group_K: torch.Tensor

    @property
    def cell_K(self) -> torch.Tensor:
        """Index of the (group, turn) cell within which a turn is compared."""
        return self.group_K * (int(self.index_K.max()) + 1 if len(self.index_K) else 1) + self.index_K


def sums_to_go(values_A: torch.Tensor) -> torch.Tensor:
    """Sum of each entry and all that follow, (A,)."""
    return values_A.flip(0).cumsum(0).flip(0)


def cell_means(values_K: torch.Tensor, cell_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of each entry's cell, and the cell's size, both (K,)."""
    cells, place_K = cell_K.unique(return_inverse=True)
    count_C = values_K.new_zeros(len(cells)).index_add(0, place_K, torch.ones_like(values_K))
    mean_C = values_K.new_zeros(len(cells)).index_add(0, place_K, values_K) / count_C
    return mean_C[place_K], count_C[place_K]


def centred(values_K: torch.Tensor, cell_K: torch.Tensor) -> torch.Tensor:
    """Each entry minus the mean of its cell, (K,); exactly 0 if all of a cell are equal, whatever the rounding of the
    mean."""
    mean_K, _ = cell_means(values_K, cell_K)
    centred_K = values_K - mean_K
    size_K, _ = cell_means(values_K.abs(), cell_K)
    return centred_K.masked_fill(centred_K.abs() <= ROUNDING * size_K, 0.0)


def less_group_mean(turns: Turns, leave_one_out: bool = False) -> torch.Tensor:
    """Each turn's return minus the mean of its group at the same turn, (K,). leave_one_out: the mean of the others
    only.

    A turn that only one episode of the group has reached is compared with the other groups at that turn (of all
    processes); if there is none, its advantage is 0.
    """
    cell_K = turns.cell_K
    _, count_K = cell_means(turns.to_go_K, cell_K)
    compared_K = centred(turns.to_go_K, cell_K)
    if leave_one_out:
        compared_K = compared_K * count_K / (count_K - 1).clamp(min=1)
    return torch.where(count_K > 1, compared_K, _over_groups(turns))


def _over_groups(turns: Turns) -> torch.Tensor:
    """Each return minus the mean of the other episodes at the same turn in all groups of all processes, (K,); 0 if
    there are none.

    Returns are measured from the mean of their own group, so that easy and hard prompts can be compared. From that of a
    group of one episode only what came before the turn is left, so such groups are not compared.
    """
    deepest = max(distributed.all_gather([int(turns.index_K.max()) + 1 if len(turns.index_K) else 0]))
    first_K = turns.index_K == 0
    groups, place_K = turns.group_K.unique(return_inverse=True)
    episodes_G, returns_G = (
        torch.zeros(len(groups), dtype=torch.float64).index_add(0, place_K[first_K], own)
        for own in (torch.ones_like(turns.to_go_K[first_K]), turns.to_go_K[first_K])
    )
    several_K = (episodes_G > 1)[place_K].double()
    counted_K = (turns.to_go_K - (returns_G / episodes_G)[place_K]) * several_K
    count_T, total_T = (
        torch.zeros(deepest, dtype=torch.float64).index_add(0, turns.index_K, own) for own in (several_K, counted_K)
    )
    sums = torch.tensor(distributed.all_sum([*count_T.tolist(), *total_T.tolist()]), dtype=torch.float64)
    count_K, total_K = (part[turns.index_K] for part in (sums[:deepest], sums[deepest:]))
    gap_K = counted_K - (total_K - counted_K) / (count_K - 1).clamp(min=1)
    equal_K = gap_K.abs() <= ROUNDING * turns.to_go_K.abs()
    masked_K: torch.Tensor = gap_K.masked_fill((count_K < 2) | (several_K == 0) | equal_K, 0.0)
    return masked_K


def group_scales(turns: Turns) -> torch.Tensor:
    """The standard deviation of each turn's group, (K,): of returns around the mean at the same turn, pooled over the
    turns.

    With one turn it is the sample standard deviation. 0 if nothing was compared.
    """
    cell_K, group_K = turns.cell_K, turns.group_K
    squares_K = centred(turns.to_go_K, cell_K) ** 2
    _, count_K = cell_means(squares_K, cell_K)
    mean_K, size_K = cell_means(squares_K, group_K)
    # Each cell of the group costs a degree of freedom.
    cells_K = cell_means(1 / count_K, group_K)[0] * size_K
    return (mean_K * size_K / (size_K - cells_K).round().clamp(min=1)).sqrt()


def mean_square(advantages_K: torch.Tensor) -> float:
    """The mean square of the nonzero advantages of all processes; 0 if there are none."""
    return distributed.mean(advantages_K[advantages_K != 0].square())


def over_root(advantages_K: torch.Tensor, square: float) -> torch.Tensor:
    """Advantages divided by the root of a mean square, (K,); unchanged if it is 0."""
    return advantages_K / square**0.5 if square > 0 else advantages_K


def rewards_fall_at_turns(earned: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """True if an episode of any process earned something before its last turn. earned: rewards and turns of each one's
    tokens."""
    early = any(bool(rewards_A[turns_A < turns_A[-1]].any()) for rewards_A, turns_A in earned)
    return bool(distributed.all_max(int(early)))


def less_state_mean(visits: Turns) -> torch.Tensor:
    """Each visit's return minus the mean over all visits of its state in the group, (K,); 0 for a state visited
    once."""
    return centred(visits.to_go_K, visits.cell_K)


def repeated(visits: Turns) -> torch.Tensor:
    """True for visits of a state that the group has visited more than once, (K,)."""
    return cell_means(visits.to_go_K, visits.cell_K)[1] > 1


def visits_of(
    earned: Sequence[tuple[torch.Tensor, torch.Tensor]],
    groups: Sequence[int],
    states: Sequence[Sequence[str]],
    gamma: float,
) -> tuple[Turns, torch.Tensor]:
    """The turns of these episodes as visits of states, with the states' indices in `index_K`; and the turn of each
    action token, (N,).

    earned, groups: as for turns_of. states: for each episode, a key by turn number that is equal for equal states.
    gamma: discount per turn; returns count from the visit on.
    """
    turns, turn_N = turns_of(earned, groups, by_turn=True)
    numbers: dict[str, int] = {}
    index, to_go = [], []
    for (rewards_A, turns_A), own in zip(earned, states, strict=True):
        played, place_A = turns_A.unique(return_inverse=True)
        index += [numbers.setdefault(own[turn], len(numbers)) for turn in played.tolist()]
        sums = rewards_A.new_zeros(len(played)).index_add(0, place_A, rewards_A)
        to_go.append(returns_to_go(sums, torch.full_like(sums, gamma)))
    visits = Turns(flat(to_go, torch.float64), torch.tensor(index, dtype=torch.long), turns.group_K)
    return visits, turn_N


def turns_of(
    earned: Sequence[tuple[torch.Tensor, torch.Tensor]], groups: Sequence[int], by_turn: bool
) -> tuple[Turns, torch.Tensor]:
    """The turns of these episodes, and the index of the turn that each action token belongs to, (N,).

    earned: rewards and turns of each episode's tokens; groups: the group of each. by_turn: compare the return from each
    turn on; otherwise an episode counts as a single turn.
    """
    to_go, index, group = [], [], []
    counted = [turns_A if by_turn else torch.zeros_like(turns_A) for _, turns_A in earned]
    for (rewards_A, _), own_A, own in zip(earned, counted, groups, strict=True):
        played, place_A = own_A.unique(return_inverse=True)
        to_go.append(sums_to_go(rewards_A.new_zeros(len(played)).index_add(0, place_A, rewards_A)))
        index.append(torch.arange(len(played)))
        group.append(torch.full((len(played),), own))
    turns = Turns(flat(to_go, torch.float64), flat(index, torch.long), flat(group, torch.long))
    return turns, turn_numbers(counted)


def turn_numbers(turns: Sequence[torch.Tensor]) -> torch.Tensor:
    """The index, among all turns of these episodes, of the one that each action token belongs to, (N,). turns: the turn of
    each episode's tokens."""
    numbers, first = [], 0
    for turns_A in turns:
        played, place_A = turns_A.unique(return_inverse=True)
        numbers.append(first + place_A)
        first += len(played)
    return flat(numbers, torch.long)
