"""The base of policy gradients with or without a critic: the surrogate and its bounds."""

from __future__ import annotations

import math

import torch

from lmrl import distributed
from lmrl.objectives.base import Objective
from lmrl.objectives.correction import OLD, WEIGHTS
from lmrl.objectives.groups import flat
from lmrl.policy.policy import Policy
from lmrl.recipe.objectives import PolicyGradientObjective
from lmrl.trajectories.batch import Batch

ROUNDING = 1e-8
"""Relative difference below which two double-precision numbers count as equal."""

OPEN_ENTROPY = 0.5
"""Entropy in nats per token below which the limit on the policy's change shrinks in proportion."""

HOLD_ENTROPY = {"muon": 0.5, "namo": 0.5}
"""Default of `hold_entropy`, by optimizer: steps that stay long make a policy deterministic before it knows why."""


# ------------------------------------------------------------------------------------------------------------ mathematics
def policy_loss(
    logprobs_N: torch.Tensor,
    old_N: torch.Tensor,
    advantages_N: torch.Tensor,
    low: float,
    high: float,
    dual: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped surrogate per action, to be minimised; and whether clipping applied.

    dual: the loss of an action with a negative advantage is at most this many times the advantage, whereas the plain
    surrogate grows with the ratio without bound (Ye et al., arXiv 1912.09729, eq. 5).
    """
    ratio_N = (logprobs_N - old_N).exp()
    free_N, clipped_N = -advantages_N * ratio_N, -advantages_N * ratio_N.clamp(1 - low, 1 + high)
    loss_N, decided_N = torch.maximum(free_N, clipped_N), clipped_N > free_N
    if dual is None:
        return loss_N, decided_N
    beyond_N = (advantages_N < 0) & (ratio_N > dual)
    return torch.where(beyond_N, -dual * advantages_N, loss_N), decided_N | beyond_N


def k3(logprobs_N: torch.Tensor, reference_N: torch.Tensor) -> torch.Tensor:
    """Low-variance, non-negative estimate of KL(policy || reference) per action: r - 1 - log r, r = reference / policy.

    Schulman, "Approximating KL divergence" (2020).
    """
    log_ratio_N = reference_N - logprobs_N
    return log_ratio_N.exp() - 1 - log_ratio_N


def whiten(values_N: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
    """Zero mean and unit variance over the values of all processes, in double; equal numbers become 0.

    floor: divide by at least this, so that a nearly vanished spread is not magnified.
    """
    mean, variance = distributed.moments(values_N)
    deviation = math.sqrt(variance)
    if deviation <= ROUNDING * abs(mean) or deviation == 0:
        return torch.zeros_like(values_N, dtype=torch.float64)
    return (values_N.double() - mean) / max(deviation, floor)


def bearable(limit: float, entropy: float) -> float:
    """The limit on the policy's change for a policy of this entropy, both in nats per token: less for one that is
    nearly deterministic.

    A change that is small for a policy with high entropy is large for a nearly deterministic one.
    """
    return limit * min(max(entropy, 0.0) / OPEN_ENTROPY, 1.0)  # rounding may leave it below 0


# -------------------------------------------------------------------------------------------------------------- objective
class PolicyGradient(Objective):
    """Base of PPO and of the objectives whose baseline is a group."""

    options: PolicyGradientObjective
    kl_controlled = True

    def __init__(self, options: PolicyGradientObjective):
        self.options = options
        self.epochs, self.minibatches = options.epochs, options.minibatches
        self.uses_reference = options.kl_coef > 0
        self.entropy_coef = options.entropy_coef
        """Weight of the entropy bonus in the coming step."""

    @property
    def hold_entropy(self) -> float | None:
        """The share of a stage in which entropy is held."""
        stated = self.options.hold_entropy
        return HOLD_ENTROPY.get(self.optimizer) if stated == "auto" else stated

    def surrogate(
        self, logprobs_N: torch.Tensor, old_N: torch.Tensor, fields: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The bounded loss of each action, corrected for the sampler; and whether a bound applied."""
        options = self.options
        high = options.clip if options.clip_high is None else options.clip_high
        losses_N, clipped_N = policy_loss(
            logprobs_N, old_N, fields["advantages"], options.clip, high, options.dual_clip
        )
        return (losses_N * fields[WEIGHTS] if WEIGHTS in fields else losses_N), clipped_N

    def rejects(self, stats: dict[str, float]) -> bool:
        target = self.options.target_kl
        return target is not None and stats.get("approx_kl", 0.0) > bearable(target, stats.get("entropy", OPEN_ENTROPY))

    def divergence(self, policy: Policy, minibatch: Batch) -> dict[str, float]:
        if self.options.target_kl is None or self.epochs * self.minibatches == 1:
            return {}
        scored = policy.score(minibatch)
        moved_N = k3(minibatch.get(OLD), flat(scored["logprobs"]))
        return {"approx_kl": distributed.mean(moved_N), "entropy": distributed.mean(flat(scored["entropy"]))}
