"""Proximal policy optimisation with a value head, over the action tokens of whole episodes.

Schulman et al., "Proximal policy optimization algorithms" (arXiv 1707.06347) and "High-dimensional continuous control
using generalized advantage estimation" (arXiv 1506.02438); the divergence penalty follows Ziegler et al.,
"Fine-tuning language models from human preferences" (arXiv 1909.08593).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lmrl import world
from lmrl.objectives.base import Loss, Objective
from lmrl.objectives.correction import OLD, WEIGHTS, mismatch, sampled_logprobs
from lmrl.objectives.groups import flat
from lmrl.policy.heads import BINS, HeadsSpec, category_loss
from lmrl.policy.passes import Outputs, Want
from lmrl.policy.policy import Policy
from lmrl.recipe import PPOObjective
from lmrl.trajectories.batch import Batch, Microbatch, Sequence
from lmrl.trajectories.chain import discounts, returns_to_go, rewards_and_turns, to_sequences
from lmrl.trajectories.trajectory import Trajectory


# ------------------------------------------------------------------------------------------------------------ mathematics
def advantages(
    rewards_A: torch.Tensor, values_A: torch.Tensor, last_value: float, discounts_A: torch.Tensor, lam: float
) -> torch.Tensor:
    """Generalised advantage estimation over the action tokens of one episode.

    rewards_A: what was earned at each action; values_A: value of the state each action was taken in; last_value: value
    of the state after the last action (0 where the episode terminated); discounts_A: discount from each action to the
    next. Shape (A,). A_t = delta_t + discount_t lam A_{t+1}, delta_t = r_t + discount_t V_{t+1} - V_t.
    """
    following_A = torch.cat([values_A[1:], values_A.new_tensor([last_value])])
    deltas_A = rewards_A + discounts_A * following_A - values_A
    return returns_to_go(deltas_A, discounts_A * lam)


def whiten(values: torch.Tensor) -> torch.Tensor:
    """Zero mean, unit variance, over what all processes hold."""
    mean, variance = world.moments(values)
    return (values - mean) / (math.sqrt(variance) + 1e-8)


def policy_loss(
    logprobs_N: torch.Tensor, old_N: torch.Tensor, advantages_N: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped surrogate, to be minimised, per action; and whether clipping decided it."""
    ratio = (logprobs_N - old_N).exp()
    free, clipped = -advantages_N * ratio, -advantages_N * ratio.clamp(1 - low, 1 + high)
    return torch.maximum(free, clipped), clipped > free


def value_loss(
    values_N: torch.Tensor, old_N: torch.Tensor, returns_N: torch.Tensor, clip: float | None
) -> torch.Tensor:
    """Half squared error per action; with `clip`, the worse of the value and the value held near its old estimate."""
    error = (values_N - returns_N) ** 2
    if clip is not None:
        held = old_N + (values_N - old_N).clamp(-clip, clip)
        error = torch.maximum(error, (held - returns_N) ** 2)
    return 0.5 * error


def k3(logprobs_N: torch.Tensor, reference_N: torch.Tensor) -> torch.Tensor:
    """Low-variance, non-negative estimate of KL(policy || reference) per action: r - 1 - log r, r = reference / policy.

    Schulman, "Approximating KL divergence" (2020).
    """
    log_ratio = reference_N - logprobs_N
    return log_ratio.exp() - 1 - log_ratio


def adapt_kl_coef(coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """Proportional controller of Ziegler et al., section 2.2: the error is clipped to 20 %."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * min(episodes / horizon, 1.0))


# -------------------------------------------------------------------------------------------------------------- objective
class PPO(Objective):
    label = "PPO"

    def __init__(self, options: PPOObjective):
        self.options = options
        self.heads = HeadsSpec(bins=BINS if options.value_loss == "hl_gauss" else 0)
        self.epochs, self.minibatches = options.epochs, options.minibatches
        self.uses_reference = options.kl_coef > 0
        self.kl_coef = options.kl_coef
        self.warming_up = False

    def calibrate(self, policy: Policy, trajectories: list[Trajectory]) -> None:
        if self.options.value_range is not None:
            low, high = self.options.value_range
            policy.values.calibrate(start=0.0, mean=min(max(0.0, low), high), scale=1.0, low=low, high=high)

    def begin(self, step: int) -> None:
        self.warming_up = step <= self.options.value_warmup_steps

    @property
    def want(self) -> Want:
        return Want(
            logprobs=not self.warming_up, values=True, detach_values=self.warming_up or self.options.detach_value
        )

    def prepare(self, policy: Policy, trajectories: list[Trajectory]) -> Batch:
        spans = [to_sequences(trajectory) for trajectory in trajectories]
        scored = Batch([sequence for span in spans for sequence in span])
        old = policy.score(scored, Want(values=True))
        if policy.has_reference:
            reference = policy.score(scored, reference=True)["logprobs"]
        else:
            reference = old["logprobs"]

        kls: list[float] = []
        start = 0
        for trajectory, span in zip(trajectories, spans, strict=True):
            end = start + len(span)
            kls.append(self._fill(trajectory, span, old, reference, slice(start, end)))
            start = end
        sequences = [sequence for span in spans for sequence in span if len(sequence.targets)]
        stats = self._whiten_and_measure(sequences)
        sampled = [sampled_logprobs(trajectory) for trajectory in trajectories]
        stats |= mismatch(flat([sequence.fields[OLD] for sequence in sequences]), flat(sampled))
        if self.correction is not None:
            episodes_N = flat([torch.full(own.shape, number) for number, own in enumerate(sampled)], torch.long)
            stats |= self.correction.weigh(sequences, flat(sampled), episodes_N)
        if policy.has_reference:
            stats["kl"] = world.mean(kls)
        stats["kl_coef"] = self.kl_coef
        if self.options.kl_target is not None and not self.warming_up:
            options, episodes = self.options, round(world.totals([len(kls)])[0])
            self.kl_coef = adapt_kl_coef(self.kl_coef, stats["kl"], options.kl_target, episodes, options.kl_horizon)
        return Batch(sequences, stats)

    def _fill(
        self, trajectory: Trajectory, span: list[Sequence], old: dict, reference: list[torch.Tensor], where: slice
    ) -> float:
        """Write old log-probabilities, values, advantages and returns into one episode's sequences; return its KL."""
        values, logprobs = torch.cat(old["values"][where]), torch.cat(old["logprobs"][where])
        reference_logprobs = torch.cat(reference[where])
        last_value = 0.0
        if not trajectory.terminated:  # drop the pseudo-action
            last_value, values = float(values[-1]), values[:-1]
            logprobs, reference_logprobs = logprobs[:-1], reference_logprobs[:-1]
            span[-1].states, span[-1].targets = span[-1].states[:-1], span[-1].targets[:-1]
        rewards, turns = self._rewards_and_turns(trajectory)
        log_ratio = logprobs - reference_logprobs
        if self.options.kl_in == "reward":
            rewards = rewards - self.kl_coef * log_ratio
        discounts_A = discounts(turns, self.options.gamma, self.options.gamma_token)
        gae = advantages(rewards, values, last_value, discounts_A, self.options.lam)
        fields = {
            OLD: logprobs,
            "old_values": values,
            "reference_logprobs": reference_logprobs,
            "advantages": gae,
            "returns": gae + values,
        }
        sizes = [len(sequence.targets) for sequence in span]
        for name, values_A in fields.items():
            for sequence, part in zip(span, values_A.split(sizes), strict=True):
                sequence.fields[name] = part
        return float(log_ratio.sum())

    def _rewards_and_turns(self, trajectory: Trajectory) -> tuple[torch.Tensor, torch.Tensor]:
        rewards, turns = rewards_and_turns(trajectory)
        for cut in trajectory.cut_turns:
            rewards[(turns == cut).nonzero()[-1]] -= self.options.missing_eos_penalty
        return rewards, turns

    def _whiten_and_measure(self, sequences: list[Sequence]) -> dict[str, float]:
        names = ("advantages", "returns", "old_values")
        gae, returns, values = (flat([sequence.fields[name] for sequence in sequences]) for name in names)
        residual = world.moments(returns - values)[1] / max(world.moments(returns)[1], 1e-8)
        if self.options.whiten_advantages:
            sizes = [len(sequence.targets) for sequence in sequences]
            for sequence, part in zip(sequences, whiten(gae).split(sizes), strict=True):
                sequence.fields["advantages"] = part
        stats = {"value_mean": world.mean(values), "explained_variance": 1 - residual}
        return stats

    def loss(self, outputs: Outputs, batch: Microbatch) -> Loss:
        options, fields = self.options, batch.fields
        if outputs.value_logits is None:
            critic = value_loss(outputs.values, fields["old_values"], fields["returns"], options.value_clip).sum()
        else:
            critic = category_loss(outputs.value_logits, fields["returns"], *options.value_range).sum()
        stats = {"value_loss": critic.detach()}
        if self.warming_up:
            return Loss(options.value_coef * critic, stats)
        high = options.clip if options.clip_high is None else options.clip_high
        old = fields[OLD]
        surrogate, clipped = policy_loss(outputs.logprobs, old, fields["advantages"], options.clip, high)
        if WEIGHTS in fields:
            surrogate = surrogate * fields[WEIGHTS]
        total = surrogate.sum() + options.value_coef * critic - options.entropy_coef * outputs.entropy.sum()
        if options.kl_in == "loss" and self.kl_coef > 0:
            penalty = k3(outputs.logprobs, fields["reference_logprobs"]).sum()
            total = total + self.kl_coef * penalty
            stats["kl_loss"] = penalty.detach()
        with torch.no_grad():
            stats["policy_loss"] = surrogate.sum()
            stats["clip_fraction"] = clipped.float().sum()
            stats["entropy"] = outputs.entropy.sum()
            stats["approx_kl"] = k3(old, outputs.logprobs).sum()  # KL(old || new): samples came from the old policy
        return Loss(total, stats)

    def finished(self, stats: dict[str, float]) -> bool:
        return self.options.target_kl is not None and stats.get("approx_kl", 0.0) > self.options.target_kl

    def state(self) -> dict[str, Any]:
        return {"kl_coef": self.kl_coef}

    def load_state(self, state: dict[str, Any]) -> None:
        self.kl_coef = state["kl_coef"]
