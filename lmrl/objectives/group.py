"""Policy gradients without a critic: what they share.

The advantage of a turn is what the episode earned from that turn on, less a baseline: the other episodes of its group at the
same turn. Where rewards fall at the end of episodes alone, an episode has one advantage, which all its turns share, as in the
papers. Which baseline, which scale and which weights tokens have is what the methods differ in; each has a file of its own.

Advantages are divided by one number a group or batch and never by one a turn: who is still playing at a late turn depends on what
was done before, so that a scale of its own for each turn would weigh the same loss by when it happens.
"""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass

import torch

from lmrl import world
from lmrl.objectives.base import Loss
from lmrl.objectives.correction import OLD, sampled_logprobs
from lmrl.objectives.groups import EPISODE, episode_sums, flat, grouped_batch, groups_of
from lmrl.objectives.policy_gradient import ROUNDING, PolicyGradient, k3
from lmrl.policy.passes import Outputs
from lmrl.policy.policy import Policy
from lmrl.recipe import GroupObjective
from lmrl.trajectories.batch import Batch, Microbatch
from lmrl.trajectories.chain import rewards_and_turns
from lmrl.trajectories.trajectory import Trajectory

TURN = "turn"
"""Field that numbers the turns of a batch."""


# ------------------------------------------------------------------------------------------------------------ mathematics
@dataclass
class Turns:
    """The turns of a batch's episodes, one after the other, K in all. Groups are numbered within this process."""

    to_go_K: torch.Tensor
    """What the episode earned from this turn on, double; of the whole episode where rewards fall at its end alone."""
    index_K: torch.Tensor
    """Which turn of its episode it is; 0 for all where rewards fall at the end of episodes alone."""
    group_K: torch.Tensor

    @property
    def cell_K(self) -> torch.Tensor:
        """Number of the group and turn: what a turn is compared within."""
        return self.group_K * (int(self.index_K.max()) + 1 if len(self.index_K) else 1) + self.index_K


def sums_to_go(values_A: torch.Tensor) -> torch.Tensor:
    """Of each entry, itself and all that follow, (A,)."""
    return values_A.flip(0).cumsum(0).flip(0)


def cell_means(values_K: torch.Tensor, cell_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each entry the mean of its cell, and how many entries that has, both (K,)."""
    cells, place_K = cell_K.unique(return_inverse=True)
    count_C = values_K.new_zeros(len(cells)).index_add(0, place_K, torch.ones_like(values_K))
    mean_C = values_K.new_zeros(len(cells)).index_add(0, place_K, values_K) / count_C
    return mean_C[place_K], count_C[place_K]


def centred(values_K: torch.Tensor, cell_K: torch.Tensor) -> torch.Tensor:
    """Less the mean of the cell, (K,); where all of a cell are equal exactly 0, in spite of the mean's rounding."""
    mean_K, _ = cell_means(values_K, cell_K)
    centred_K = values_K - mean_K
    size_K, _ = cell_means(values_K.abs(), cell_K)
    return centred_K.masked_fill(centred_K.abs() <= ROUNDING * size_K, 0.0)


def less_group_mean(turns: Turns, leave_one_out: bool = False) -> torch.Tensor:
    """What each turn earned less the mean of its group at the same turn, (K,). leave_one_out: the mean of the others alone.

    A turn that but one episode of the group has reached is compared with the other groups at that turn (of all processes);
    where there is none, its advantage is 0.
    """
    cell_K = turns.cell_K
    _, count_K = cell_means(turns.to_go_K, cell_K)
    compared_K = centred(turns.to_go_K, cell_K)
    if leave_one_out:
        compared_K = compared_K * count_K / (count_K - 1).clamp(min=1)
    return torch.where(count_K > 1, compared_K, _over_groups(turns))


def _over_groups(turns: Turns) -> torch.Tensor:
    """Less the mean of the other episodes at the same turn in all groups of all processes, (K,); 0 where there are none.

    Each is counted from the mean return of its own group, so that easy and hard prompts can be compared.
    """
    deepest = max(world.gather([int(turns.index_K.max()) + 1 if len(turns.index_K) else 0]))
    first_K = turns.index_K == 0
    groups, place_K = turns.group_K.unique(return_inverse=True)
    episodes_G, returns_G = (
        torch.zeros(len(groups), dtype=torch.float64).index_add(0, place_K[first_K], own)
        for own in (torch.ones_like(turns.to_go_K[first_K]), turns.to_go_K[first_K])
    )
    counted_K = turns.to_go_K - (returns_G / episodes_G)[place_K]
    count_T, total_T = (
        torch.zeros(deepest, dtype=torch.float64).index_add(0, turns.index_K, own)
        for own in (torch.ones_like(counted_K), counted_K)
    )
    sums = torch.tensor(world.totals([*count_T.tolist(), *total_T.tolist()]), dtype=torch.float64)
    count_K, total_K = (part[turns.index_K] for part in sums.split(deepest))
    gap_K = counted_K - (total_K - counted_K) / (count_K - 1).clamp(min=1)
    equal_K = gap_K.abs() <= ROUNDING * turns.to_go_K.abs()
    return gap_K.masked_fill((count_K < 2) | equal_K, 0.0)


def group_scales(turns: Turns) -> torch.Tensor:
    """The deviation of each turn's group, (K,): of what was earned around the mean at the same turn, pooled over the turns.

    With one turn it is the sample's standard deviation. 0 where nothing was compared.
    """
    cell_K, group_K = turns.cell_K, turns.group_K
    squares_K = centred(turns.to_go_K, cell_K) ** 2
    _, count_K = cell_means(squares_K, cell_K)
    mean_K, size_K = cell_means(squares_K, group_K)
    # Cells of the group, each of which costs a degree of freedom.
    cells_K = cell_means(1 / count_K, group_K)[0] * size_K
    return (mean_K * size_K / (size_K - cells_K).round().clamp(min=1)).sqrt()


def over_batch_scale(advantages_K: torch.Tensor) -> torch.Tensor:
    """Divided by the root mean square of those that are not 0, over all processes, (K,)."""
    earned_K = advantages_K[advantages_K != 0]
    square = world.mean(earned_K.square())
    return advantages_K / square**0.5 if square > 0 else advantages_K


def rewards_fall_at_turns(earned: List[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """True if an episode of any process earned something before its last turn. earned: rewards and turns of each one's tokens."""
    early = any(bool(rewards_A[turns_A < turns_A[-1]].any()) for rewards_A, turns_A in earned)
    return bool(world.largest(int(early)))


def turns_of(
    earned: List[tuple[torch.Tensor, torch.Tensor]], groups: List[int], by_turn: bool
) -> tuple[Turns, torch.Tensor]:
    """The turns of these episodes, and the number of the turn that each action token belongs to, (N,).

    earned: rewards and turns of each episode's tokens; groups: the group of each. by_turn: compare what was earned from each
    turn on; else an episode counts as a single turn.
    """
    to_go, index, group, numbers, first = [], [], [], [], 0
    for (rewards_A, turns_A), own in zip(earned, groups, strict=True):
        place_A = turns_A.unique(return_inverse=True)[1] if by_turn else torch.zeros_like(turns_A)
        count = int(place_A.max()) + 1
        sums = rewards_A.new_zeros(count).index_add(0, place_A, rewards_A)
        to_go.append(sums_to_go(sums))
        index.append(torch.arange(count))
        group.append(torch.full((count,), own))
        numbers.append(first + place_A)
        first += count
    turns = Turns(flat(to_go, torch.float64), flat(index, torch.long), flat(group, torch.long))
    return turns, flat(numbers, torch.long)


# -------------------------------------------------------------------------------------------------------------- objective
class GroupPolicyGradient(PolicyGradient):
    """Base of GRPO, Dr. GRPO, RLOO and REINFORCE++: a subclass says what it does with turns, and how tokens weigh."""

    options: GroupObjective
    penalises_reward = False
    """True if the divergence from the reference is taken from the reward; else it is a term of the loss."""

    pays_by_token = False
    """True if each token pays for its own divergence and all after it, and not the turn for all of its tokens'."""

    # ---------------------------------------------------------------------------------------- what the methods differ in
    def baseline(self, turns: Turns) -> torch.Tensor:
        """What each turn earned less what it is compared with, (K,), double."""
        return less_group_mean(turns)

    def token_advantages(self, advantages_N: torch.Tensor) -> torch.Tensor:
        """Advantage of each token given its turn's, (N,)."""
        return advantages_N

    def weights(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each token its weight in the loss, and its weight in what is reported, (N,); see `count`.

        fields: `share` is 1 by the number of the episode's tokens.
        """
        raise NotImplementedError

    def token_losses(
        self, logprobs_N: torch.Tensor, old_N: torch.Tensor, fields: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The bounded loss of each token, (N,), and whether a bound decided it."""
        return self.surrogate(logprobs_N, old_N, fields)

    # ------------------------------------------------------------------------------------------------------------ shared
    @property
    def kl_in_reward(self) -> bool:
        return self.uses_reference and self.penalises_reward

    @property
    def needs_old(self) -> bool:
        """True if log-probabilities are compared with those before the first update."""
        return self.epochs * self.minibatches > 1 or self.kl_in_reward or self.correction is not None

    def prepare(self, policy: Policy, trajectories: list[Trajectory]) -> Batch:
        options = self.options
        groups = [[trajectories[position] for position in group] for group in groups_of(trajectories)]
        episodes = [trajectory for group in groups for trajectory in group]
        batch = grouped_batch(groups, policy, options.share_prompts, whole=False)
        if self.uses_reference:
            batch.set("reference_logprobs", flat(policy.score(batch, reference=True)["logprobs"]))
        if self.needs_old:
            batch.set(OLD, flat(policy.score(batch)["logprobs"]))
        sizes = [episode.num_actions for episode in episodes]
        earned = [rewards_and_turns(episode, options.missing_eos_penalty) for episode in episodes]
        by_turn = rewards_fall_at_turns(earned)
        ratio_N = batch.get(OLD) - batch.get("reference_logprobs") if self.kl_in_reward else None
        if ratio_N is not None and not self.pays_by_token:
            costs = (options.kl_coef * ratio_N.double()).split(sizes)
            earned = [(rewards_A - cost_A, own) for (rewards_A, own), cost_A in zip(earned, costs, strict=True)]
        numbers = [number for number, group in enumerate(groups) for _ in group]
        turns, turn_N = turns_of(earned, numbers, by_turn)
        advantages_N = self._scaled(self.baseline(turns), turns)[turn_N]
        if ratio_N is not None and self.pays_by_token:
            advantages_N = advantages_N - options.kl_coef * flat(
                [sums_to_go(own) for own in ratio_N.double().split(sizes)]
            )
        advantages_N = self.token_advantages(advantages_N)
        if options.mask_cut:
            kept = [0.0 if episode.cut_turns else 1.0 for episode in episodes]
            kept_N = torch.tensor(kept, dtype=policy.precision).repeat_interleave(torch.tensor(sizes, dtype=torch.long))
            batch.set("kept", kept_N)
            advantages_N = advantages_N * kept_N
        batch.set("advantages", advantages_N.to(policy.precision))
        batch.set(TURN, turn_N)
        lengths_E = torch.tensor(sizes, dtype=policy.precision)
        batch.set("share", (1 / lengths_E).repeat_interleave(torch.tensor(sizes, dtype=torch.long)))
        batch.stats = self._measure(groups)
        episodes_N = flat([sequence.fields[EPISODE] for sequence in batch.sequences], torch.long)
        if ratio_N is not None:
            batch.stats["kl"] = world.mean(episode_sums(ratio_N, episodes_N))
        sampled_N = flat([sampled_logprobs(episode) for episode in episodes])
        if not world.largest(int(sampled_N.isnan().any())):  # actions stand in the order of the episodes, packed or not
            batch.set("sampled_logprobs", sampled_N)
        if self.correction is not None:
            batch.stats |= self.correction.weigh(batch, sampled_N, episodes_N)
        if options.entropy_coef == 0 and (not self.uses_reference or self.kl_in_reward):
            for sequence in batch.sequences:
                sequence.weightless = not sequence.fields["advantages"].any()
        return batch

    def _scaled(self, advantages_K: torch.Tensor, turns: Turns) -> torch.Tensor:
        match self.options.scale_rewards:
            case "group":
                scale_K = group_scales(turns)
                return torch.where(scale_K > 0, advantages_K / torch.where(scale_K > 0, scale_K, 1.0), 0.0)
            case "batch":
                return over_batch_scale(advantages_K)
        return advantages_K

    @staticmethod
    def _measure(groups: list[list[Trajectory]]) -> dict[str, float]:
        """How many groups there are, and the share whose episodes all earned the same, turn by turn."""
        alike = []
        for group in groups:
            earned = [tuple(turn.reward for turn in one.turns) or (one.reward,) for one in group]
            alike.append(float(len({(one.reward, own) for one, own in zip(group, earned, strict=True)}) == 1))
        (count,) = world.totals([len(groups)])
        return {"groups": count, "zero_spread": world.mean(alike)}

    def loss(self, outputs: Outputs, batch: Microbatch) -> Loss:
        options, fields, logprobs_N = self.options, batch.fields, outputs.logprobs
        old_N = fields.get(OLD, logprobs_N.detach())  # one update a step: the policy is still the old one
        losses_N, clipped_N = self.token_losses(logprobs_N, old_N, fields)
        if self.uses_reference and not self.kl_in_reward:
            divergence_N = k3(logprobs_N, fields["reference_logprobs"])
            losses_N = losses_N + options.kl_coef * divergence_N
        losses_N = losses_N - options.entropy_coef * outputs.entropy
        loss_N, stat_N = self.weights(fields)
        if "kept" in fields:
            loss_N, stat_N = loss_N * fields["kept"], stat_N * fields["kept"]
        with torch.no_grad():
            stats = {
                "policy_loss": losses_N.detach(),
                "clip_fraction": clipped_N.float(),
                "entropy": outputs.entropy,
                "approx_kl": k3(old_N, logprobs_N),
            }
            if self.uses_reference and not self.kl_in_reward:
                stats["kl"] = (logprobs_N - fields["reference_logprobs"]) / fields["share"]  # nats an episode
            if "sampled_logprobs" in fields:
                stats["sampler_kl"] = fields["sampled_logprobs"] - old_N
            sums = {name: (stat_N * value).sum() for name, value in stats.items()}
        return Loss((loss_N * losses_N).sum(), sums)

    def count(self, batch: Microbatch) -> float:
        """What weighs 1 in what is reported: as much of each episode, or each token, as is in the microbatch."""
        _, stat_N = self.weights(batch.fields)
        return float((stat_N * batch.fields["kept"] if "kept" in batch.fields else stat_N).sum())
