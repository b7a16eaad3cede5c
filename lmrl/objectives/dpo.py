"""Direct preference optimisation and its variants, on pairs of episodes.

Rafailov et al., "Direct preference optimization" (arXiv 2305.18290). An episode's log-probability is the sum over all
of its action tokens, over all its turns; environment tokens do not count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as List
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from lmrl import distributed
from lmrl.errors import DataError, RunError, counted
from lmrl.objectives.base import Loss, Objective
from lmrl.objectives.groups import EPISODE, episode_sums, flat, grouped_batch, groups_of
from lmrl.objectives.policy_gradient import ROUNDING
from lmrl.policy.passes import Outputs
from lmrl.policy.policy import Policy
from lmrl.policy.reference_cache import ReferenceCache, model_key
from lmrl.recipe import DPOObjective
from lmrl.trajectories.batch import Batch, Microbatch
from lmrl.trajectories.chain import rewards_and_turns
from lmrl.trajectories.trajectory import Trajectory

DISCOPOP_TEMPERATURE = 0.05


@dataclass
class Pairs:
    """Inputs of the losses for each pair, (P, 2): chosen first. Log-probabilities are sums over action tokens."""

    logprobs_P2: torch.Tensor
    reference_P2: torch.Tensor
    lengths_P2: torch.Tensor

    @property
    def ratios_P2(self) -> torch.Tensor:
        """log(policy / reference) of each episode."""
        return self.logprobs_P2 - self.reference_P2

    @property
    def means_P2(self) -> torch.Tensor:
        """log(policy / reference) per token."""
        return self.ratios_P2 / self.lengths_P2


def preference_loss(pairs: Pairs, options: DPOObjective) -> torch.Tensor:
    """The loss of each pair, (P,). For simpo and orpo, the reference must be 0."""
    beta, epsilon = options.beta, options.label_smoothing
    chosen, rejected = pairs.ratios_P2.unbind(-1)
    logit = beta * (chosen - rejected)
    up, down = F.logsigmoid(logit), F.logsigmoid(-logit)
    mean_gap = pairs.means_P2[:, 0] - pairs.means_P2[:, 1]
    match options.loss:
        case "sigmoid":  # with smoothing: cDPO (Mitchell, 2023)
            return -(1 - epsilon) * up - epsilon * down
        case "robust":  # Chowdhury et al., arXiv 2403.00409
            return (-(1 - epsilon) * up + epsilon * down) / (1 - 2 * epsilon)
        case "hinge":  # SLiC, Zhao et al., arXiv 2305.10425
            return torch.relu(1 - logit)
        case "ipo":  # Azar et al., arXiv 2310.12036, eq. 17, per token
            return (mean_gap - 1 / (2 * beta)) ** 2
        case "sigmoid_norm":  # length-normalised DPO, Tülu 3, arXiv 2411.15124
            return -F.logsigmoid(beta * mean_gap)
        case "simpo":  # Meng et al., arXiv 2405.14734
            return -F.logsigmoid(beta * mean_gap - options.target_margin)
        case "orpo":  # Hong et al., arXiv 2403.07691, eqs. 4 and 7
            log_odds = mean_gap - (log1mexp(pairs.means_P2[:, 0]) - log1mexp(pairs.means_P2[:, 1]))
            return -beta * F.logsigmoid(log_odds)
        case "exo_pair":  # Ji et al., arXiv 2402.00856, eq. 16
            known = torch.tensor(epsilon, device=logit.device)
            return up.exp() * (up - torch.log1p(-known)) + down.exp() * (down - known.log())
        case "nca_pair":  # Chen et al., arXiv 2402.05369
            return -F.logsigmoid(beta * chosen) - 0.5 * sum(F.logsigmoid(-beta * one) for one in (chosen, rejected))
        case "bco_pair":  # Jung et al., arXiv 2404.04656
            return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)
        case "sppo_hard":  # Wu et al., arXiv 2405.00675
            return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
        case "apo_zero":  # D'Oosterlinck et al., arXiv 2408.06266, eq. 7
            return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
        case "apo_down":  # ibid., eq. 8
            return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(logit)
        case "discopop":  # Lu et al., arXiv 2406.08414, eq. 5
            weight = torch.sigmoid(logit / DISCOPOP_TEMPERATURE)
            return -up * (1 - weight) + torch.exp(-logit) * weight
    raise ValueError(f"unknown loss '{options.loss}'")


def log1mexp(values: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation (Mächler, 2012); 0 is treated as the largest number below it."""
    values = values.clamp(max=-torch.finfo(values.dtype).eps)
    near = values > -0.6931
    small = torch.log(-torch.expm1(torch.where(near, values, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, values)))
    return torch.where(near, small, large)


def best_and_worst(trajectories: List[Trajectory]) -> list[list[Trajectory]]:
    """The episodes with the highest and the lowest reward of each group; groups whose rewards are all equal are left
    out. Rewards that were earned in another order are equal, although their sums are rounded otherwise."""
    pairs = []
    for group in groups_of(trajectories):
        ranked = sorted((trajectories[position] for position in group), key=lambda one: -(one.reward or 0.0))
        best, worst = ranked[0], ranked[-1]
        summed = max(float(rewards_and_turns(one)[0].abs().sum()) for one in (best, worst))
        if (best.reward or 0.0) - (worst.reward or 0.0) > ROUNDING * summed:
            pairs.append([best, worst])
    return pairs


class DPO(Objective):
    label = "DPO"
    compares = True
    index_fields = (EPISODE,)
    heldout_limits: ClassVar = {"accuracy": (0.0, 1.0), "margin": (-math.inf, math.inf)}

    def __init__(self, options: DPOObjective):
        self.options, self.minibatches = options, options.minibatches
        self.uses_reference = not (options.reference_free or options.cache_reference)
        self.cache: ReferenceCache | None = None
        self.cache_key: str | None = None
        self.label = "DPO" if options.loss == "sigmoid" else options.loss
        self.loss_of_data = "loss" if options.loss == "sigmoid" else None
        self.sft_coef = options.sft_coef if options.sft_coef is not None else float(options.loss == "orpo")

    def start(self, policy: Policy) -> None:
        if self.options.cache_reference:
            self.cache_key = model_key(policy)

    def ready(self, policy: Policy, dataset: Iterable[list[Trajectory]], fresh: bool) -> None:
        """Compute what is missing in the reference's cache, while the policy still equals the reference."""
        if not self.options.cache_reference:
            return
        self.cache = cache = ReferenceCache(self.cache_key or model_key(policy))
        for part in dataset:
            lacking = cache.missing(part)
            if lacking and not fresh:
                raise RunError(
                    f"{self.cache.path}: the reference's cache lacks {counted(len(lacking), 'episode')} of this run, and the "
                    "policy has changed since: start the run again, or set objective.cache_reference=false"
                )
            if lacking and distributed.size() > 1:
                raise RunError(
                    f"{self.cache.path}: the reference's cache lacks {counted(len(lacking), 'episode')}, and only a single process fills it: "
                    "start the run in one process and continue it with --resume --processes N, or set objective.cache_reference=false"
                )
            self.cache.add(policy, lacking)

    def state(self) -> dict[str, Any]:
        return {} if self.cache_key is None else {"reference": self.cache_key}

    def load_state(self, state: dict[str, Any]) -> None:
        self.cache_key = state.get("reference")

    def prepare(self, policy: Policy, trajectories: list[Trajectory]) -> Batch:
        for trajectory in trajectories:
            if trajectory.reward is None:
                raise DataError(
                    f"source.path: logged episode {trajectory.episode} has no reward, and pairs are ranked by their rewards"
                )
        pairs = best_and_worst(trajectories)
        batch = grouped_batch(pairs, policy, self.options.share_prompts, whole=True)
        if self.uses_reference:
            reference = policy.score(batch, reference=True)["logprobs"]
            for sequence, logprobs in zip(batch.sequences, reference, strict=True):
                sequence.fields["reference_logprobs"] = logprobs
        elif self.cache is not None:
            episodes = [one for pair in pairs for one in pair]
            a_token = torch.tensor([self.cache[one] / one.num_actions for one in episodes])
            for sequence in batch.sequences:
                sequence.fields["reference_logprobs"] = a_token[sequence.fields[EPISODE]]
        count, groups = distributed.all_sum([len(pairs), len(groups_of(trajectories))])
        batch.stats = {"pairs": count, "ties": (groups - count) / groups}
        return batch

    def loss(self, outputs: Outputs, batch: Microbatch) -> Loss:
        pairs = pairs_of(outputs.logprobs, batch.fields)
        losses_P = preference_loss(pairs, self.options)
        if self.sft_coef > 0:
            losses_P = losses_P - self.sft_coef * pairs.logprobs_P2[:, 0] / pairs.lengths_P2[:, 0]
        with torch.no_grad():
            stats = {name: value.sum() for name, value in self.measures(pairs).items()}
        return Loss(losses_P.sum(), stats)

    def count(self, batch: Batch) -> float:
        """Pairs."""
        return len(batch.fields[EPISODE].unique()) / 2

    def measures(self, pairs: Pairs) -> dict[str, torch.Tensor]:
        """Reported measures of each pair, (P,): implicit rewards, their margin, and whether it has the right sign."""
        scores_P2 = self.options.beta * (pairs.means_P2 if self.options.reference_free else pairs.ratios_P2)
        margin = scores_P2[:, 0] - scores_P2[:, 1]
        return {
            "accuracy": (margin > 0).float() + 0.5 * (margin == 0),
            "margin": margin,
            "chosen_reward": scores_P2[:, 0],
            "rejected_reward": scores_P2[:, 1],
            "chosen_logprob": pairs.logprobs_P2[:, 0],
            "rejected_logprob": pairs.logprobs_P2[:, 1],
        }

    def heldout(self, policy: Policy, trajectories: list[Trajectory]) -> dict[str, list[float]]:
        batch = self.prepare(policy, trajectories)
        logprobs_N = flat(policy.score(batch)["logprobs"])
        if not batch.sequences:
            return {}
        found = self.measures(pairs_of(logprobs_N, batch.fields))
        return {name: found[name].tolist() for name in ("accuracy", "margin")}


def pairs_of(logprobs_N: torch.Tensor, fields: dict[str, torch.Tensor]) -> Pairs:
    """Action tokens of whole pairs, whose episodes are numbered 2p (chosen) and 2p + 1, summed up."""
    episodes_N = fields[EPISODE]
    reference_N = fields.get("reference_logprobs", torch.zeros_like(logprobs_N))
    columns = (logprobs_N, reference_N, torch.ones_like(logprobs_N))
    return Pairs(*(episode_sums(column, episodes_N).view(-1, 2) for column in columns))
