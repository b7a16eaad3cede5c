"""Policy gradients without a critic: the baseline is the group of episodes of the same prompt, or the batch.

GRPO (Shao et al., arXiv 2402.03300), Dr. GRPO (Liu et al., arXiv 2503.20783), RLOO (Ahmadian et al., arXiv 2402.14740)
and REINFORCE++ (Hu et al., arXiv 2501.03262). An episode has one advantage, which all of its action tokens share, in
however many turns; only in REINFORCE++ the divergence makes them differ.
"""

from __future__ import annotations

from collections.abc import Sequence as List

import torch

from lmrl import world
from lmrl.objectives.base import Loss, Objective
from lmrl.objectives.correction import OLD, WEIGHTS, sampled_logprobs
from lmrl.objectives.groups import EPISODE, episode_sums, flat, grouped_batch, groups_of
from lmrl.objectives.ppo import k3, policy_loss, whiten
from lmrl.policy.passes import Outputs
from lmrl.policy.policy import Policy
from lmrl.recipe import GroupObjective
from lmrl.trajectories.batch import Batch, Microbatch
from lmrl.trajectories.trajectory import Trajectory

EPSILON = 1e-4
"""Added to a group's standard deviation, as trl does."""


# ------------------------------------------------------------------------------------------------------------ mathematics
def standardised(rewards_G: torch.Tensor) -> torch.Tensor:
    """GRPO: (r - mean) / (std + epsilon) in a group, with the sample's standard deviation, (G,)."""
    deviation = rewards_G.std() if len(rewards_G) > 1 else rewards_G.new_zeros(())
    return centred(rewards_G) / (deviation + EPSILON)


def centred(rewards_G: torch.Tensor) -> torch.Tensor:
    """Dr. GRPO: r - mean, (G,); of equal rewards exactly 0, in spite of the mean's rounding."""
    return rewards_G - rewards_G.mean() if rewards_G.min() < rewards_G.max() else torch.zeros_like(rewards_G)


def leave_one_out(rewards_G: torch.Tensor) -> torch.Tensor:
    """RLOO: r less the mean of the other episodes of the group, (G,). A lone episode has no baseline."""
    count = len(rewards_G)
    return rewards_G if count == 1 else centred(rewards_G) * count / (count - 1)


def as_they_are(rewards_G: torch.Tensor) -> torch.Tensor:
    """REINFORCE++: the batch is the baseline, later on."""
    return rewards_G


BASELINES = {"grpo": standardised, "dr_grpo": centred, "rloo": leave_one_out, "reinforce_pp": as_they_are}
KL_IN_REWARD = ("rloo", "reinforce_pp")


def sums_to_go(values_A: torch.Tensor) -> torch.Tensor:
    """Of each entry, itself and all that follow, (A,)."""
    return values_A.flip(0).cumsum(0).flip(0)


# -------------------------------------------------------------------------------------------------------------- objective
class GroupPolicyGradient(Objective):
    def __init__(self, options: GroupObjective):
        self.options = options
        self.label = {"grpo": "GRPO", "dr_grpo": "Dr. GRPO", "rloo": "RLOO", "reinforce_pp": "REINFORCE++"}[
            options.name
        ]
        self.epochs, self.minibatches = options.epochs, options.minibatches
        self.uses_reference = options.kl_coef > 0
        self.kl_in_reward = options.kl_coef > 0 and options.name in KL_IN_REWARD

    def prepare(self, policy: Policy, trajectories: list[Trajectory]) -> Batch:
        options = self.options
        groups = [[trajectories[position] for position in group] for group in groups_of(trajectories)]
        batch = grouped_batch(groups, policy, options.share_prompts, whole=False)
        episodes = [trajectory for group in groups for trajectory in group]
        lengths_E = torch.tensor([episode.num_actions for episode in episodes], dtype=torch.float32)
        rewards = torch.tensor([episode.reward for episode in episodes], dtype=torch.float32)
        rewards_E, kl_E = rewards, None
        if self.uses_reference:
            reference = policy.score(batch, reference=True)["logprobs"]
            self._set(batch, "reference_logprobs", reference)
        if self.epochs * self.minibatches > 1 or self.kl_in_reward or self.correction is not None:
            self._set(batch, OLD, policy.score(batch)["logprobs"])
        episodes_N = flat([sequence.fields[EPISODE] for sequence in batch.sequences], torch.long)
        if self.kl_in_reward:
            ratio_N = self._flat(batch, OLD) - self._flat(batch, "reference_logprobs")
            kl_E = episode_sums(ratio_N, episodes_N)
            if options.name == "rloo":
                rewards_E = rewards - options.kl_coef * kl_E
        sizes = [len(group) for group in groups]
        advantages_E = flat([BASELINES[options.name](part) for part in rewards_E.split(sizes)])
        advantages_N = advantages_E[episodes_N]
        if options.name == "reinforce_pp":
            if self.kl_in_reward:
                spent = [sums_to_go(own) for own in ratio_N.split([episode.num_actions for episode in episodes])]
                advantages_N = advantages_N - options.kl_coef * flat(spent)
            advantages_N = whiten(advantages_N)
        parts = [len(sequence.targets) for sequence in batch.sequences]
        self._set(batch, "advantages", advantages_N.split(parts))
        self._set(batch, "share", (1 / lengths_E)[episodes_N].split(parts))
        sampled_N = flat([sampled_logprobs(episode) for episode in episodes])
        if not world.largest(int(sampled_N.isnan().any())):  # actions stand in the order of the episodes, packed or not
            self._set(batch, "sampled_logprobs", sampled_N.split(parts))
        spreads = [float(part.max() - part.min()) for part in rewards.split(sizes)]
        (count,) = world.totals([len(groups)])
        batch.stats = {"groups": count, "zero_spread": world.mean([float(spread == 0) for spread in spreads])}
        if kl_E is not None:
            batch.stats["kl"] = world.mean(kl_E)
        if self.correction is not None:
            batch.stats |= self.correction.weigh(batch.sequences, sampled_N, episodes_N)
        if options.entropy_coef == 0 and (options.kl_coef == 0 or self.kl_in_reward):
            for sequence in batch.sequences:
                sequence.weightless = not sequence.fields["advantages"].any()
        return batch

    @staticmethod
    def _set(batch: Batch, name: str, parts: List[torch.Tensor]) -> None:
        for sequence, part in zip(batch.sequences, parts, strict=True):
            sequence.fields[name] = part

    @staticmethod
    def _flat(batch: Batch, name: str) -> torch.Tensor:
        return flat([sequence.fields[name] for sequence in batch.sequences])

    def loss(self, outputs: Outputs, batch: Microbatch) -> Loss:
        options, fields, logprobs_N = self.options, batch.fields, outputs.logprobs
        high = options.clip if options.clip_high is None else options.clip_high
        old_N = fields.get(OLD, logprobs_N.detach())  # one update a step: the policy is still the old one
        losses_N, clipped_N = policy_loss(logprobs_N, old_N, fields["advantages"], options.clip, high)
        if WEIGHTS in fields:
            losses_N = losses_N * fields[WEIGHTS]
        if options.kl_coef > 0 and not self.kl_in_reward:
            divergence_N = k3(logprobs_N, fields["reference_logprobs"])
            losses_N = losses_N + options.kl_coef * divergence_N
        losses_N = losses_N - options.entropy_coef * outputs.entropy
        # Of each token: its weight in the loss, and its weight in what is reported; see `count`.
        share_N, one_N = fields["share"], torch.ones_like(losses_N)
        loss_N, stat_N = {
            "grpo": (share_N, share_N),
            "dr_grpo": (one_N / getattr(options, "constant_length", 1), share_N),
            "rloo": (one_N, share_N),
            "reinforce_pp": (one_N, one_N),
        }[options.name]
        with torch.no_grad():
            stats = {
                "policy_loss": losses_N.detach(),
                "clip_fraction": clipped_N.float(),
                "entropy": outputs.entropy,
                "approx_kl": k3(old_N, logprobs_N),
            }
            if "reference_logprobs" in fields and not self.kl_in_reward:
                stats["kl"] = (logprobs_N - fields["reference_logprobs"]) / share_N  # nats an episode
            if "sampled_logprobs" in fields:
                stats["sampler_kl"] = fields["sampled_logprobs"] - old_N
            sums = {name: (stat_N * value).sum() for name, value in stats.items()}
        return Loss((loss_N * losses_N).sum(), sums)

    def count(self, batch: Microbatch) -> float:
        """Episodes, as far as they are in it; with reinforce_pp action tokens."""
        return super().count(batch) if self.options.name == "reinforce_pp" else float(batch.fields["share"].sum())
