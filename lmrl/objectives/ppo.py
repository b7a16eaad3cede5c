"""Proximal policy optimisation with a value head, over the action tokens of whole episodes.

Schulman et al., "Proximal policy optimization algorithms" (arXiv 1707.06347) and "High-dimensional continuous control
using generalized advantage estimation" (arXiv 1506.02438); the divergence penalty follows Ziegler et al.,
"Fine-tuning language models from human preferences" (arXiv 1909.08593).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from lmrl import distributed
from lmrl.errors import RecipeError
from lmrl.objectives.base import Loss, less_entropy
from lmrl.objectives.correction import OLD, mismatch, sampled_logprobs
from lmrl.objectives.groups import flat
from lmrl.objectives.policy_gradient import ROUNDING, PolicyGradient, k3, whiten
from lmrl.policy.heads import BINS, HeadsSpec, category_loss
from lmrl.policy.passes import ForwardRequest, Outputs
from lmrl.policy.policy import Policy
from lmrl.recipe import PPOObjective
from lmrl.trajectories.batch import Batch, Microbatch
from lmrl.trajectories.chain import continues, discounts, returns_to_go, rewards_and_turns, to_sequences
from lmrl.trajectories.trajectory import Trajectory

UNIT_RATE = 0.1
"""Weight of a step's returns in the running mean and deviation of returns."""
UNIT_FLOOR = 0.05
"""Minimum standard deviation of returns, relative to the largest so far."""
ADVANTAGE_FLOOR = 0.05
"""Minimum standard deviation that advantages are divided by, relative to that of returns."""
VALUE_PULL = {"adamw": 1.0, "adamw_8bit": 1.0, "muon": 0.1, "namo": 0.1}
"""Default of `value_pull`, by optimizer: orthogonal steps make more of the smaller of two gradients."""
PLATEAU_STEPS, PLATEAU_GAIN = 2, 0.02
"""The critic's warm-up ends when its explained variance has gained less than PLATEAU_GAIN in PLATEAU_STEPS steps."""


# ------------------------------------------------------------------------------------------------------------ mathematics
def advantages(
    rewards_A: torch.Tensor, values_A: torch.Tensor, last_value: float, discounts_A: torch.Tensor, lam: float
) -> torch.Tensor:
    """Generalised advantage estimation over the action tokens of one episode.

    rewards_A: what was earned at each action; values_A: value of the state each action was taken in; last_value: value
    of the state after the last action (0 if the episode ended there); discounts_A: discount from each action to the
    next. Shape (A,). A_t = delta_t + discount_t lam A_{t+1}, delta_t = r_t + discount_t V_{t+1} - V_t.
    """
    following_A = torch.cat([values_A[1:], values_A.new_tensor([last_value])])
    deltas_A = rewards_A + discounts_A * following_A - values_A
    return returns_to_go(deltas_A, discounts_A * lam)


def value_loss(
    values_N: torch.Tensor, old_N: torch.Tensor, returns_N: torch.Tensor, clip: float | None
) -> torch.Tensor:
    """Half squared error per action; with `clip`, the larger error of the value and of the value clipped to within
    `clip` of its old estimate."""
    error = (values_N - returns_N) ** 2
    if clip is not None:
        held = old_N + (values_N - old_N).clamp(-clip, clip)
        error = torch.maximum(error, (held - returns_N) ** 2)
    return 0.5 * error


def adapt_kl_coef(coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """Proportional controller of Ziegler et al., section 2.2: the error is clipped to 20 %."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * min(episodes / horizon, 1.0))


def spread(returns_N: torch.Tensor) -> tuple[float, float] | None:
    """Initial mean and standard deviation of returns, over all processes; None if all returns are 0, which have no
    scale."""
    mean, variance = distributed.moments(returns_N)
    deviation = math.sqrt(variance)
    if deviation <= ROUNDING * abs(mean):  # all equal
        deviation = abs(mean)
    return (mean, deviation) if deviation > 0 else None


def followed(mean: float, std: float, peak: float, new_mean: float, new_variance: float) -> tuple[float, float]:
    """Mean and standard deviation of the mixture of the running estimate and a step's returns, the latter with weight
    UNIT_RATE; the deviation stays above UNIT_FLOOR times its largest so far, because a policy near its optimum has
    returns that hardly vary."""
    gap = new_mean - mean
    variance = (1 - UNIT_RATE) * (std**2 + UNIT_RATE * gap**2) + UNIT_RATE * new_variance
    return mean + UNIT_RATE * gap, max(math.sqrt(variance), UNIT_FLOOR * peak)


@dataclass
class Warmup:
    """The first steps, in which only the critic is trained: until its error on fresh returns stops falling, or `cap`
    steps."""

    explained: list[float] = field(default_factory=list)
    """Explained variance of fresh returns at each step so far, before its updates."""
    plateaued: bool = False
    step: int = 1
    cap: int = 0

    @property
    def over(self) -> bool:
        return self.plateaued or self.step > self.cap

    def begin(self, step: int, cap: int) -> None:
        self.step, self.cap = step, cap

    def add(self, explained: float) -> None:
        """Record how much of a step's returns the values explain."""
        if self.over:
            return
        self.explained.append(explained)
        if len(self.explained) > PLATEAU_STEPS:
            self.plateaued = explained - self.explained[-1 - PLATEAU_STEPS] < PLATEAU_GAIN


# -------------------------------------------------------------------------------------------------------------- objective
class PPO(PolicyGradient):
    options: PPOObjective
    label = "PPO"
    index_fields = ()

    def __init__(self, options: PPOObjective):
        super().__init__(options)
        self.heads = HeadsSpec(bins=BINS if options.value_loss == "hl_gauss" else 0)
        self.kl_coef = options.kl_coef
        self.warmup = Warmup()

    @property
    def warming_up(self) -> bool:
        return not self.warmup.over

    def calibrate(self, policy: Policy, trajectories: list[Trajectory]) -> None:
        if self.options.value_loss == "hl_gauss":
            low, high = self.options.value_range
            policy.values.calibrate(start=0.0, mean=min(max(0.0, low), high), scale=1.0, low=low, high=high)

    def start(self, policy: Policy) -> None:
        """Raise RecipeError if the categories of an earlier stage's values are over another range."""
        known = torch.stack([policy.values.low, policy.values.high]).cpu()
        if self.options.value_loss == "hl_gauss" and not torch.allclose(
            known, known.new_tensor(self.options.value_range)
        ):
            raise RecipeError(
                "objective.value_range: the values that the stage begins with are categories over another range: set "
                f"objective.value_range=[{known[0]:g},{known[1]:g}]"
            )

    def begin(self, step: int) -> None:
        self.warmup.begin(step, self.options.value_warmup_steps)

    @property
    def value_pull(self) -> float | None:
        """The bound on the values' gradient into the trunk."""
        stated = self.options.value_pull
        return VALUE_PULL[self.optimizer] if stated == "auto" else stated

    @property
    def forward_request(self) -> ForwardRequest:
        only_head = self.warming_up or self.options.detach_value
        return ForwardRequest(
            logprobs=not self.warming_up,
            values=True,
            detach_values=only_head,
            value_pull=None if only_head else self.value_pull,
        )

    def prepare(self, policy: Policy, trajectories: list[Trajectory]) -> Batch:
        options, units = self.options, policy.values
        spans = [to_sequences(trajectory) for trajectory in trajectories]
        batch = Batch([sequence for span in spans for sequence in span])
        earned = [rewards_and_turns(one, options.missing_eos_penalty) for one in trajectories]
        weights = [discounts(turns_A, options.gamma, options.gamma_token) for _, turns_A in earned]
        if options.value_normalization == "returns" and not units.is_normalised:
            first = [returns_to_go(rewards_A, own) for (rewards_A, _), own in zip(earned, weights, strict=True)]
            if (known := spread(flat(first))) is not None:
                units.renormalise(*known, preserve=not policy.heads_are_new)
        scored = policy.score(batch, ForwardRequest(values=True))
        old_N = flat(scored["logprobs"])
        reference_N = flat(policy.score(batch, reference=True)["logprobs"]) if policy.has_reference else old_N
        sizes = [sum(len(sequence.targets) for sequence in span) for span in spans]
        columns = zip(
            *(one.split(sizes) for one in (old_N, reference_N, units.to_returns(flat(scored["values"])))), strict=True
        )
        found: list[tuple[torch.Tensor, ...]] = []
        for trajectory, span, (rewards_A, _), discounts_A, (old_A, reference_A, values_A) in zip(
            trajectories, spans, earned, weights, columns, strict=True
        ):
            last_value = float(values_A[-1]) if continues(trajectory, float(discounts_A.min())) else 0.0
            if not trajectory.terminated:  # drop the pseudo-action
                old_A, reference_A, values_A = old_A[:-1], reference_A[:-1], values_A[:-1]
                span[-1].drop_last_action()
            if options.kl_in == "reward":
                rewards_A = rewards_A - self.kl_coef * (old_A - reference_A).double()
            gae_A = advantages(rewards_A, values_A, last_value, discounts_A, options.lam)
            found.append((old_A, reference_A, values_A, gae_A))
        old_N, reference_N, values_N, gae_N = (
            (flat(column) for column in zip(*found, strict=True)) if found else [flat([])] * 4
        )
        batch = Batch([sequence for sequence in batch.sequences if len(sequence.targets)])
        batch.stats = self._measure(policy, values_N, gae_N + values_N)
        batch.set(OLD, old_N)
        batch.set("reference_logprobs", reference_N)
        batch.set("old_values", units.to_values(values_N).to(policy.precision))
        batch.set("returns", units.to_values(gae_N + values_N).to(policy.precision))
        if options.value_loss == "hl_gauss":  # categories mean the same however the units have changed
            batch.set("categories", (batch.get("returns") - units.shift.cpu()) / units.gain.cpu())
        if options.whiten_advantages:
            gae_N = whiten(gae_N, ADVANTAGE_FLOOR * float(units.std) if units.is_normalised else 0.0)
        elif units.is_normalised:
            gae_N = gae_N / float(units.std)
        batch.set("advantages", gae_N.to(policy.precision))
        sampled = [sampled_logprobs(trajectory) for trajectory in trajectories]
        batch.stats |= mismatch(old_N, flat(sampled))
        if self.correction is not None:
            episodes_N = flat([torch.full(own.shape, number) for number, own in enumerate(sampled)], torch.long)
            batch.stats |= self.correction.weigh(batch, flat(sampled), episodes_N)
        batch.stats |= self._adapt(policy, [float((own[0] - own[1]).sum()) for own in found])
        return batch

    def _measure(self, policy: Policy, values_N: torch.Tensor, returns_N: torch.Tensor) -> dict[str, float]:
        """How well the values predicted the returns; updates the units and the warm-up."""
        units, (mean, variance) = policy.values, distributed.moments(returns_N)
        error = distributed.moments(returns_N - values_N)[1]
        # Returns that are equal but for rounding have no variance to explain.
        explained = 1 - error / variance if variance > (ROUNDING * mean) ** 2 else 0.0
        self.warmup.add(explained)
        follows = self.options.value_normalization == "returns" and self.options.value_loss != "hl_gauss"
        if follows and units.is_normalised and math.isfinite(variance):  # categories keep their initial units
            units.renormalise(*followed(float(units.mean), float(units.std), float(units.peak), mean, variance))
        return {
            "value_mean": distributed.mean(values_N),
            "return_std": math.sqrt(variance),
            "explained_variance": explained,
        }

    def _adapt(self, policy: Policy, kls: list[float]) -> dict[str, float]:
        """The divergence from the reference, and its weight, which follows it."""
        options, stats = self.options, {"kl_coef": self.kl_coef}
        if policy.has_reference:
            stats["kl"] = distributed.mean(kls)
        if options.kl_target is not None and not self.warming_up:
            (episodes,) = distributed.all_sum([len(kls)])
            self.kl_coef = adapt_kl_coef(
                self.kl_coef, stats["kl"], options.kl_target, round(episodes), options.kl_horizon
            )
        return stats

    def loss(self, outputs: Outputs, batch: Microbatch) -> Loss:
        options, fields = self.options, batch.fields
        if outputs.value_logits is None:
            critic = value_loss(outputs.values, fields["old_values"], fields["returns"], options.value_clip).sum()
        else:
            critic = category_loss(outputs.value_logits, fields["categories"], *options.value_range).sum()
        stats = {"value_loss": critic.detach()}
        if self.warming_up:
            return Loss(options.value_coef * critic, stats)
        surrogate_N, clipped_N = self.surrogate(outputs.logprobs, fields[OLD], fields)
        total = surrogate_N.sum() + options.value_coef * critic
        total = less_entropy(total, outputs.entropy.sum(), self.entropy_coef)
        if options.kl_in == "loss" and self.kl_coef > 0:
            penalty = k3(outputs.logprobs, fields["reference_logprobs"]).sum()
            total = total + self.kl_coef * penalty
            stats["kl_loss"] = penalty.detach()
        with torch.no_grad():
            stats["policy_loss"] = surrogate_N.sum()
            stats["clip_fraction"] = clipped_N.float().sum()
            stats["entropy"] = outputs.entropy.sum()
            # KL(old || new): samples came from the old policy.
            stats["approx_kl"] = k3(fields[OLD], outputs.logprobs).sum()
        return Loss(total, stats)

    def state(self) -> dict[str, Any]:
        return {"kl_coef": self.kl_coef, "warmup": asdict(self.warmup)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.kl_coef = state["kl_coef"]
        self.warmup = Warmup(**state["warmup"]) if "warmup" in state else self.warmup
