"""Base of objectives with Q heads: chains of action tokens, the push-down, and the likelihood term."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lmrl.errors import DataError, RecipeError
from lmrl.objectives.base import Loss, Objective
from lmrl.objectives.policy_gradient import ROUNDING
from lmrl.policy.heads import BINS, HeadsSpec, category_loss
from lmrl.policy.passes import ForwardRequest, Outputs
from lmrl.policy.policy import Policy
from lmrl.recipe import QObjective
from lmrl.trajectories.batch import Batch, Microbatch, Sequence
from lmrl.trajectories.chain import anchors, has_known_return, rewards_and_turns, to_chains, token_returns
from lmrl.trajectories.trajectory import Trajectory


def units(returns_N: torch.Tensor, rewards_N: torch.Tensor) -> tuple[float, float, float]:
    """Mean of returns-to-go, the unit of values, and the root mean square of the rewards that are not 0.

    The unit is the spread of returns, or the size of a reward if that is smaller: if every turn earns something, the
    returns of long episodes spread far wider than what a single action can change.
    """
    earned_N = rewards_N[rewards_N != 0]
    size = float(earned_N.square().mean().sqrt()) if len(earned_N) else 1.0
    mean, spread = float(returns_N.mean()), float(returns_N.std(correction=0))
    return mean, min(spread, size) if spread > ROUNDING * abs(mean) else size, size


def in_units(batch: Batch, mean: float, std: float) -> dict[str, torch.Tensor]:
    """Rewards and returns of a batch of chains in the values' units, (N,): with G = mean + std x value, the target
    r + discount G' of a return becomes [r + (discount - 1) mean] / std + discount x value'."""
    rewards_N, discounts_N = batch.get("rewards"), batch.get("discounts")
    return {
        "rewards": (rewards_N + (discounts_N - 1) * mean) / std,
        "returns": (batch.get("returns") - mean) / std,
        "floors": (batch.get("floors") - mean) / std,
        "discounts": discounts_N,
        "real": batch.get("real"),
    }


def drifting(name: str, episodes: int) -> DataError:
    """The error for a log in which no episode anchors the values (see `anchors`): a constant can be added to all of them."""
    return DataError(
        f"objective '{name}' bootstraps from the last states of truncated episodes, as all {episodes} logged ones are, and "
        "without a discount nothing fixes these values: set objective.gamma=0.99, or `terminated` to true in the log if "
        "the limit is part of the task"
    )


class QLearning(Objective):
    """Base of objectives with Q heads: subclasses define the regression target of Q.

    `calibrated` (Cal-QL): the floor of the push-down is the logged return. Where a truncation hides a part of it, there
    is no floor: one bootstrapped from V would not be a return of the data, and would rise with any overestimation.
    """

    index_fields = ()

    def __init__(self, options: QObjective, twins: int, value: bool):
        if options.trunk == "auto":  # resolved when the recipe was loaded
            options = options.model_copy(update={"trunk": "shared"})
        self.options, self.minibatches = options, options.minibatches
        self.needs_returns = options.calibrated
        self.range, self.unit, self.returns_unit = (0.0, 1.0), 1.0, (0.0, 1.0)
        self.has_value = value
        self.heads = HeadsSpec(
            value=value,
            q=options.q_head,
            twins=twins,
            trunk="shared" if options.trunk == "auto" else options.trunk,
            bins=BINS if options.value_loss == "hl_gauss" else 0,
            beta=options.beta,
            support=options.support,
        )

    def calibrate(self, policy: Policy, trajectories: list[Trajectory]) -> None:
        """Set the values' units from logged returns, and their initial value; see `units` and `start_value`."""
        options, values = self.options, policy.values
        if not trajectories:
            raise RecipeError(
                f"objective '{options.name}' takes the unit of its new Q values from logged returns: set "
                "source.name=mixture (or dataset), or start from a stage that has such values"
            )
        returns_N = torch.cat(
            [token_returns(trajectory, self.options.gamma, self.options.gamma_token) for trajectory in trajectories]
        )
        rewards_N = torch.cat([rewards_and_turns(trajectory)[0] for trajectory in trajectories])
        mean, std, size = units(returns_N, rewards_N)
        if options.value_normalization == "returns":
            values.renormalise(mean, std, preserve=False)
            size = 1.0
        extremes = torch.stack([returns_N.min(), returns_N.max(), returns_N.mean()])
        low, high, middle = values.to_values(extremes).tolist()
        stated = options.start_value
        start = stated if isinstance(stated, float | int) else {"lowest": low, "mean": middle}[stated]
        # Bootstrapped values may exceed realised ones, and a Gaussian at the edge needs bins on both sides.
        margin = 0.1 * (high - low) or size
        values.calibrate(
            start,
            middle if isinstance(options.start_value, str) else start,
            size,
            min(low, start) - margin,
            max(high, start) + margin,
        )

    def ready(self, policy: Policy, dataset: Iterable[list[Trajectory]], fresh: bool) -> None:
        """Raise DataError if truncation hides the returns of all logged episodes: those that are needed, or the last that
        bootstrapped values depend on."""
        options, count = self.options, 0
        suffices = has_known_return if self.needs_returns else anchors
        for part in dataset:
            if any(suffices(one, options.gamma, options.gamma_token) for one in part):
                return
            count += len(part)
        if count and not self.needs_returns:
            raise drifting(options.name, count)
        if count:
            needs, fix = f"objective '{options.name}'", "objective.name=ilql, which bootstraps"
            if options.name != "mc":
                needs, fix = "`objective.calibrated`", "objective.calibrated=false"
            raise DataError(
                f"{needs} needs the returns that followed, but all {count} logged episodes are truncated: cut off by a limit, as "
                "if the game would go on. If the limit is one of its rules, end episodes by it: an environment returns "
                f'terminated=True, a row says "terminated": true. Else set {fix}, or log episodes to their end'
            )

    @property
    def forward_request(self) -> ForwardRequest:
        options = self.options
        return ForwardRequest(
            logprobs=options.bc_coef > 0,
            values=self.has_value,
            detach_values=options.trunk == "detached",
            q=True,
            push=options.cql_temperature if options.cql_coef > 0 else None,
            floors=options.calibrated,
        )

    def prepare(self, policy: Policy, trajectories: list[Trajectory]) -> Batch:
        values = policy.values
        self.range = float(values.low), float(values.high)
        self.unit = float(values.scale) ** 2
        self.returns_unit = float(values.mean), float(values.std)
        sequences: list[Sequence] = []
        for number, trajectory in enumerate(trajectories):
            first = 0 if number == 0 else (sequences[-1].chain or 0) + 1
            chains = to_chains(
                trajectory, self.options.gamma, self.options.gamma_token, policy.microbatch_tokens, first
            )
            sequences += [sequence for chain in chains for sequence in chain]
        batch = Batch(sequences)
        for name, own_N in in_units(batch, *self.returns_unit).items():
            batch.set(name, own_N.to(policy.precision))
        return batch

    def q_loss(self, outputs: Outputs, targets_N: torch.Tensor) -> torch.Tensor:
        """Sum over the heads of the error of Q against its targets, (N,), in units of a squared reward.

        In these units, neither the likelihood term nor the learning rate depends on the scale of rewards.
        """
        if outputs.q_logits is None:
            return ((outputs.q - targets_N) ** 2).sum(0) / self.unit
        losses = [self.category_loss(logits, targets_N) for logits in outputs.q_logits]
        return torch.stack(losses).sum(0)

    def category_loss(self, logits_NK: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        return category_loss(logits_NK, targets_N, *self.range)

    def total(
        self,
        outputs: Outputs,
        batch: Microbatch,
        losses_N: torch.Tensor,
        weights_N: torch.Tensor | float = 1.0,
        pushed_N: torch.Tensor | float = 1.0,
    ) -> Loss:
        """Add push-down and likelihood to an objective's own losses, over real actions.

        weights_N: of the likelihood. pushed_N: of the push-down.
        """
        options, real_N = self.options, batch.fields["real"]
        mean, std = self.returns_unit
        stats = {"q": mean + std * outputs.q.mean(0), "q_spread": std * (outputs.q.amax(0) - outputs.q.amin(0))}
        if outputs.push is not None:
            losses_N = losses_N + options.cql_coef * pushed_N * outputs.push.sum(0) / self.unit
            stats["push_down"] = outputs.push.mean(0)
        if outputs.bound is not None:
            stats["bound"] = outputs.bound
        if outputs.logprobs is not None:
            losses_N = losses_N - options.bc_coef * weights_N * outputs.logprobs
            stats |= {"nll": -outputs.logprobs, "entropy": outputs.entropy}
        sums = {name: (value.detach() * real_N).sum() for name, value in stats.items()}
        return Loss((losses_N * real_N).sum(), sums)

    def count(self, batch: Batch) -> float:
        """Action tokens, without pseudo-actions."""
        return float(batch.fields["real"].sum())
