"""Importance weights that correct for the difference between the sampler and the learner.

An engine with its own arithmetic samples from mu, while the learner computes pi_old with the same weights. Then the
expectation over samples of (pi_old / mu) f is the learner's expectation of f; the ratio is bounded to bound its
variance.

- truncation, w = min(pi_old / mu, cap): Yao et al., "Your efficient RL framework secretly brings you off-policy RL
  training" (2025); Ionides, "Truncated importance sampling" (2008).
- masking, w = pi_old / mu where it is at most the cap, else 0: Liu et al., "When speed kills stability: demystifying RL
  collapse from the training-inference mismatch" (2025).

The ratio is per token, or the product over all action tokens of an episode, which then applies to each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmrl import distributed
from lmrl.recipe.rollouts import CorrectionMode, Rollouts
from lmrl.trajectories.batch import Batch
from lmrl.trajectories.trajectory import Trajectory

OLD, WEIGHTS = "old_logprobs", "correction"
"""Fields of a sequence: the learner's log-probabilities of the sampled tokens, before any update; and the weights."""


def importance_weights(
    old_N: torch.Tensor, sampled_N: torch.Tensor, episodes_N: torch.Tensor | None, mode: CorrectionMode, cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight of each action token, and whether the cap applied, both (N,).

    old_N, sampled_N: log-probabilities under learner and sampler (NaN: unknown, counted as equal). episodes_N: index of
    the episode a token belongs to, which the modes by token do not need. Equal to trl 1.16's
    `vllm_importance_sampling_mode` for episodes of one turn.
    """
    difference_N = torch.nan_to_num(old_N - sampled_N, nan=0.0)
    if mode.startswith("sequence"):
        assert episodes_N is not None
        numbers_E, places_N = episodes_N.unique(return_inverse=True)
        difference_N = difference_N.new_zeros(len(numbers_E)).index_add(0, places_N, difference_N)[places_N]
    ratio_N = difference_N.exp()
    beyond_N = ratio_N > cap
    return (ratio_N.clamp(max=cap) if mode.endswith("truncate") else ratio_N.masked_fill(beyond_N, 0.0)), beyond_N


@dataclass(frozen=True)
class Correction:
    """The correction that a recipe asks for."""

    mode: CorrectionMode
    cap: float

    @classmethod
    def of(cls, rollouts: Rollouts) -> Correction | None:
        return None if rollouts.corrects is None else cls(rollouts.corrects, rollouts.correction_cap)

    @property
    def is_by_token(self) -> bool:
        return self.mode.startswith("token")

    def weigh(self, batch: Batch, sampled_N: torch.Tensor, episodes_N: torch.Tensor) -> dict[str, float]:
        """Set WEIGHTS in a batch that has OLD; returns the mean weight and the share of weights that were capped."""
        weights_N, stats = self.weights(batch.get(OLD), sampled_N, episodes_N)
        batch.set(WEIGHTS, weights_N)
        return {name: distributed.mean(value_N) for name, value_N in stats.items()}

    def weights(
        self, old_N: torch.Tensor, sampled_N: torch.Tensor, episodes_N: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weight of each action token, and what is reported of it; see `importance_weights`."""
        weights_N, beyond_N = importance_weights(old_N, sampled_N, episodes_N, self.mode, self.cap)
        return weights_N, {"correction_mean": weights_N, "correction_capped": beyond_N.float()}


def sampled_logprobs(trajectory: Trajectory) -> torch.Tensor:
    """Log-probabilities that the sampler reported for the action tokens, in order, (A,); NaN for unknown ones."""
    found = [segment.logprobs[position] for segment in trajectory.segments for position in segment.actions]
    return torch.tensor([float("nan") if one is None else one for one in found])


def mismatch(old_N: torch.Tensor, sampled_N: torch.Tensor) -> dict[str, float]:
    """KL(sampler || learner) per token, estimated from the sampled tokens, and the largest difference; {} if
    unknown."""
    gap_N = (sampled_N - old_N)[~sampled_N.isnan()]
    gaps = distributed.all_gather([float(gap_N.abs().max())] if len(gap_N) else [])
    return {"sampler_kl": distributed.mean(gap_N), "sampler_gap": max(gaps)} if gaps else {}
