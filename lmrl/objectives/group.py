"""The base of policy gradients without a critic.

The advantage of a turn is what the episode earned from that turn on, minus a baseline from the other episodes of its
group at the same turn. If rewards come only at the end of episodes, an episode has a single advantage that all its
turns share, as in the papers. The methods differ in baseline, scale and token weights; each has its own file. The
mathematics of turns is in turns.py.
"""

from __future__ import annotations

from typing import Any

import torch

from lmrl import distributed
from lmrl.objectives.base import Loss, less_entropy
from lmrl.objectives.correction import OLD, WEIGHTS, sampled_logprobs
from lmrl.objectives.groups import EPISODE, episode_sums, flat, grouped_batch, groups_of
from lmrl.objectives.policy_gradient import PolicyGradient, k3
from lmrl.objectives.turns import (
    Turns,
    group_scales,
    less_group_mean,
    less_state_mean,
    mean_square,
    over_root,
    repeated,
    rewards_fall_at_turns,
    sums_to_go,
    turn_numbers,
    turns_of,
    visits_of,
)
from lmrl.policy.passes import Outputs
from lmrl.policy.policy import Policy
from lmrl.recipe import GroupObjective
from lmrl.trajectories.batch import Batch, Microbatch
from lmrl.trajectories.chain import rewards_and_turns
from lmrl.trajectories.trajectory import Trajectory, prompt_key

SAMPLED = "sampled_logprobs"
"""Field of the sampler's log-probabilities, if it knows those of all tokens."""
TURN = "turn"
"""Field that numbers the turns of a batch, each of which lies in one sequence."""
SCALE_RATE = 0.1
"""Weight of a step in the running mean square of advantages."""


class GroupPolicyGradient(PolicyGradient):
    """Base of GRPO, Dr. GRPO, RLOO and REINFORCE++: a subclass defines the baseline and the weights of tokens."""

    options: GroupObjective
    index_fields = (EPISODE, TURN)
    penalises_reward = False
    """True if the divergence from the reference is subtracted from the reward; otherwise it is a term of the loss."""

    pays_by_token = False
    """True if each token is charged its own divergence and all that follows; False if the turn is charged that of all
    its tokens."""

    def __init__(self, options: GroupObjective):
        super().__init__(options)
        self.squares: dict[str, float] = {}
        """Running mean squares of advantages, by kind."""

    # ----------------------------------------------------------------------------------------- where the methods differ
    def baseline(self, turns: Turns) -> torch.Tensor:
        """Each turn's return minus its baseline, (K,), in double."""
        return less_group_mean(turns)

    def token_advantages(self, advantages_N: torch.Tensor) -> torch.Tensor:
        """Advantage of each token given its turn's, (N,)."""
        return advantages_N

    def weights(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight of each token in the loss, and in reported means, (N,); see `count`.

        fields: `share` is 1 / the number of the episode's tokens.
        """
        raise NotImplementedError

    def token_losses(
        self, logprobs_N: torch.Tensor, old_N: torch.Tensor, fields: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The bounded loss of each token, (N,), and whether a bound applied."""
        return self.surrogate(logprobs_N, old_N, fields)

    # ------------------------------------------------------------------------------------------------------------ shared
    @property
    def kl_in_reward(self) -> bool:
        return self.uses_reference and self.penalises_reward

    def needs_old(self, sampler_is_known: bool) -> bool:
        """True if log-probabilities from before the first update take a pass of their own. With one update per step the
        update's pass provides them, which suffices for ratios of single tokens."""
        by_pass = self.correction is None or (self.correction.is_by_token and sampler_is_known)
        return self.epochs * self.minibatches > 1 or self.kl_in_reward or not by_pass

    def prepare(self, policy: Policy, trajectories: list[Trajectory]) -> Batch:
        options = self.options
        groups = [[trajectories[position] for position in group] for group in groups_of(trajectories)]
        episodes = [trajectory for group in groups for trajectory in group]
        batch = grouped_batch(groups, policy, options.share_prompts, whole=False)
        if self.uses_reference:
            batch.set("reference_logprobs", flat(policy.score(batch, reference=True)["logprobs"]))
        sampled_N = flat([sampled_logprobs(episode) for episode in episodes])
        # Packed or not, actions are in the order of the episodes.
        if sampler_is_known := not distributed.all_max(int(sampled_N.isnan().any())):
            batch.set(SAMPLED, sampled_N)
        if self.needs_old(sampler_is_known):
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
        advantages_N = self._scaled(self.baseline(turns), turns, "turns")[turn_N]
        if options.state_weight:
            states = [[prompt_key(turn.observation) for turn in episode.turns] for episode in episodes]
            visits, visit_N = visits_of(earned, numbers, states, options.state_gamma)
            advantages_N = (
                advantages_N + options.state_weight * self._scaled(less_state_mean(visits), visits, "states")[visit_N]
            )
            batch.stats["states_repeated"] = distributed.mean(repeated(visits).double())
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
        batch.set(TURN, turn_numbers([turns_A for _, turns_A in earned]))
        lengths_E = torch.tensor(sizes, dtype=policy.precision)
        batch.set("share", (1 / lengths_E).repeat_interleave(torch.tensor(sizes, dtype=torch.long)))
        batch.stats |= self._measure(groups)
        episodes_N = flat([sequence.fields[EPISODE] for sequence in batch.sequences], torch.long)
        if ratio_N is not None:
            batch.stats["kl"] = distributed.mean(episode_sums(ratio_N, episodes_N))
        if self.correction is not None and self.needs_old(sampler_is_known):
            batch.stats |= self.correction.weigh(batch, sampled_N, episodes_N)
        if self.entropy_coef == 0 and (not self.uses_reference or self.kl_in_reward):
            for sequence in batch.sequences:
                sequence.zero_gradient = not sequence.fields["advantages"].any()
        return batch

    def _scaled(self, advantages_K: torch.Tensor, turns: Turns, kind: str) -> torch.Tensor:
        """Advantages divided as `scale_rewards` says. kind: of advantage, each of which has a running scale."""
        match self.options.scale_rewards:
            case "none":
                return advantages_K
            case "batch":
                return over_root(advantages_K, mean_square(advantages_K))
            case "running":
                return over_root(advantages_K, self._recent_square(mean_square(advantages_K), kind))
        scale_K = group_scales(turns)
        return torch.where(scale_K > 0, advantages_K / torch.where(scale_K > 0, scale_K, 1.0), 0.0)

    def _recent_square(self, square: float, kind: str) -> float:
        """The mean square of this batch or the running one of recent batches, whichever is larger, so that a batch in
        which nothing large was earned does not count as much as one in which it was."""
        if square > 0:
            known = self.squares.get(kind, square)
            self.squares[kind] = known + SCALE_RATE * (square - known)
        return max(square, self.squares.get(kind, 0.0))

    def state(self) -> dict[str, Any]:
        return {"squares": dict(self.squares)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.squares = dict(state.get("squares", {}))

    @staticmethod
    def _measure(groups: list[list[Trajectory]]) -> dict[str, float]:
        """The number of groups, and the share of those whose episodes all earned the same, turn by turn."""
        alike = []
        for group in groups:
            earned = [tuple(turn.reward for turn in one.turns) or (one.reward,) for one in group]
            alike.append(float(len({(one.reward, own) for one, own in zip(group, earned, strict=True)}) == 1))
        (count,) = distributed.all_sum([len(groups)])
        return {"groups": count, "zero_spread": distributed.mean(alike)}

    def loss(self, outputs: Outputs, batch: Microbatch) -> Loss:
        options, fields, logprobs_N = self.options, batch.fields, outputs.logprobs
        old_N = fields.get(OLD, logprobs_N.detach())  # with one update per step, the policy is still the old one
        corrected: dict[str, torch.Tensor] = {}
        if self.correction is not None and WEIGHTS not in fields:
            weights_N, corrected = self.correction.weights(old_N, fields[SAMPLED])
            fields = fields | {WEIGHTS: weights_N}
        losses_N, clipped_N = self.token_losses(logprobs_N, old_N, fields)
        if self.uses_reference and not self.kl_in_reward:
            divergence_N = k3(logprobs_N, fields["reference_logprobs"])
            losses_N = losses_N + options.kl_coef * divergence_N
        losses_N = less_entropy(losses_N, outputs.entropy, self.entropy_coef)
        loss_N, stat_N = self.weights(fields)
        if "kept" in fields:
            loss_N, stat_N = loss_N * fields["kept"], stat_N * fields["kept"]
        with torch.no_grad():
            stats = {
                "policy_loss": losses_N.detach(),
                "clip_fraction": clipped_N.float(),
                "entropy": outputs.entropy,
                "approx_kl": k3(old_N, logprobs_N),
                **corrected,
            }
            if self.uses_reference and not self.kl_in_reward:
                stats["kl"] = (logprobs_N - fields["reference_logprobs"]) / fields["share"]  # nats per episode
            if SAMPLED in fields:
                stats["sampler_kl"] = fields[SAMPLED] - old_N
            sums = {name: (stat_N * value).sum() for name, value in stats.items()}
        return Loss((loss_N * losses_N).sum(), sums)

    def count(self, batch: Batch) -> float:
        """Total weight in reported means: the share of each episode, or each token, that is in the batch."""
        fields = batch.fields
        _, stat_N = self.weights(fields)
        return float((stat_N * fields["kept"] if "kept" in fields else stat_N).sum())
