"""Diagnostics of a policy with values, on a probe batch that stays the same throughout a stage.

They show what goes wrong in value-based learning before returns do: overestimation, values of actions that the data
never took, drift from the behaviour, and features that lose rank or units (Kumar et al., "Implicit
under-parameterization", arXiv 2010.14498; Kumar et al., "DR3", arXiv 2112.04716).
"""

from __future__ import annotations

from typing import Any

import torch

from lmrl.policy.heads import guide
from lmrl.policy.passes import ForwardRequest, States
from lmrl.policy.policy import Policy
from lmrl.recipe import Recipe
from lmrl.trajectories.batch import Batch, Sequence, to_batch
from lmrl.trajectories.chain import discounts, first_state, returns_to_go, rewards_and_turns
from lmrl.trajectories.trajectory import Trajectory

PROBE_STATES, FEWEST_STATES = 1024, 64
"""Maximum and minimum action tokens of the probe batch; in between, as many as fit."""
DENSE = 2**23
"""Maximum elements of a tensor over probe states and the whole vocabulary."""
SUPPORT = 0.01
"""Actions less likely than this under the policy without Q count as outside the behaviour, unless the policy sets its
own support."""


# ------------------------------------------------------------------------------------------------------------ mathematics
def effective_rank(features_ND: torch.Tensor) -> int:
    """Smallest number of singular values that make up 99 % of their sum (Kumar et al., arXiv 2010.14498, section 3)."""
    values = torch.linalg.svdvals(features_ND.double())
    share = values.cumsum(0) / values.sum().clamp(min=1e-12)
    return int((share < 0.99).sum()) + 1


def dead_units(features_ND: torch.Tensor) -> float:
    """Share of the features that hardly vary over states: by less than a thousandth as much as the one that varies
    most."""
    spread_D = features_ND.float().std(0, correction=0)
    return float((spread_D <= 1e-3 * spread_D.max()).float().mean())


def neighbour_products(features_ND: torch.Tensor, same_N: torch.Tensor) -> float:
    """Mean |phi(s) . phi(s')| over successive states of an episode (DR3), of features scaled to mean square 1.

    same_N: whether state n + 1 follows state n, (N - 1,).
    """
    features = features_ND.float()
    features = features / features.pow(2).mean().sqrt().clamp(min=1e-12)
    products = (features[:-1] * features[1:]).mean(1).abs()
    return float(products[same_N].mean()) if same_N.any() else 0.0


# ------------------------------------------------------------------------------------------------------------------ probe
def probe_states(vocabulary: int) -> int:
    """Action tokens of a probe batch for a vocabulary of this size."""
    return min(max(DENSE // vocabulary, FEWEST_STATES), PROBE_STATES)


class Probe:
    """A probe batch, and a policy's measurements on it."""

    def __init__(self, trajectories: list[Trajectory], states: int, gamma: float, gamma_token: float):
        """Take the first episodes, up to `states` action tokens in all; at least a part of one."""
        self.sequences: list[Sequence] = []
        self.episodes: list[int] = []
        self.gamma, self.gamma_token = gamma, gamma_token
        count = 0
        for number, trajectory in enumerate(trajectories):
            for sequence in to_batch([trajectory]).sequences:
                if count >= states:
                    break
                kept = min(len(sequence.targets), states - count)
                sequence.states, sequence.targets = sequence.states[:kept], sequence.targets[:kept]
                count += kept
                self.sequences.append(sequence)
                self.episodes += [number] * kept
        self.starts = trajectories

    def __call__(self, policy: Policy) -> dict[str, float]:
        was_training = policy.training
        policy.eval()
        states, targets_N = self._states(policy)
        episodes_N = torch.tensor(self.episodes)
        same_N = episodes_N[1:] == episodes_N[:-1]
        result = {
            "effective_rank": float(effective_rank(states.features_ND)),
            "dead_units": dead_units(states.features_ND),
            "neighbour_products": neighbour_products(states.features_ND, same_N),
        }
        if states.q_NV is not None:
            result |= guided_diagnostics(policy, states, targets_N)
        result |= start_values(policy, self.starts, self.gamma, self.gamma_token)
        policy.train(was_training)
        return result

    def _states(self, policy: Policy) -> tuple[States, torch.Tensor]:
        """States of the whole probe, in order, on the CPU; and the actions that the data took there."""
        parts = []
        for index in range(len(self.sequences)):  # one by one: a probe is small, and its order must be kept
            micro = Batch(self.sequences).collate([index], policy.pad_id).to(policy.device)
            parts.append((policy.states(micro), micro.targets_N))

        def join(name: str) -> Any:
            column = [getattr(states, name) for states, _ in parts]
            return None if column[0] is None else torch.cat(column).float().cpu()

        names = ("features_ND", "logits_NV", "q_NV")
        return States(**{name: join(name) for name in names}), torch.cat([targets for _, targets in parts]).cpu()


def discounts_of(recipe: Recipe) -> tuple[float, float]:
    """A recipe's discounts by turn and by token; 1 if its objective has none."""
    return getattr(recipe.objective, "gamma", 1.0), getattr(recipe.objective, "gamma_token", 1.0)


def guided_diagnostics(policy: Policy, states: States, targets_N: torch.Tensor) -> dict[str, float]:
    """Q inside and outside the behaviour support, and how far guidance moves from the behaviour."""
    guidance, q_NV = policy.guidance, states.q_NV
    assert guidance is not None and q_NV is not None, "the policy has Q heads"
    pi_NV = states.logits_NV.log_softmax(-1)
    guided_NV = guide(states.logits_NV, q_NV, guidance.beta, guidance.support).log_softmax(-1)
    outside_NV = pi_NV.exp() < (guidance.support or SUPPORT)
    mass_NV = guided_NV.exp()
    kl_N = (mass_NV * (guided_NV - pi_NV).nan_to_num(neginf=0.0)).sum(-1)
    result = {
        "q_data": float(in_returns(policy, q_NV.gather(1, targets_N[:, None]).mean())),
        "kl_behaviour": float(kl_N.mean()),
        "outside_mass": float((mass_NV * outside_NV).sum(-1).mean()),
        "guided_entropy": float(-(mass_NV * guided_NV.nan_to_num(neginf=0.0)).sum(-1).mean()),
    }
    some = outside_NV.any(-1)
    if some.any():
        result["q_outside"] = float(in_returns(policy, q_NV.masked_fill(~outside_NV, -torch.inf).amax(-1)[some].mean()))
    return result


def in_returns(policy: Policy, q: torch.Tensor) -> torch.Tensor:
    """Q in the unit of the reward; Q-SFT's probabilities have no unit."""
    return q if policy.values.spec.q == "probability" else policy.values.to_returns(q)


@torch.no_grad()
def start_values(policy: Policy, trajectories: list[Trajectory], gamma: float, gamma_token: float) -> dict[str, float]:
    """Mean value of the first state, and the mean discounted return that was realised from there."""
    judged = [one for one in trajectories if one.reward is not None and one.segments and one.segments[0].actions]
    if policy.values is None or policy.values.v is None or not judged:
        return {}
    batch = Batch([first_state(trajectory.segments[0]) for trajectory in judged])
    realised = []
    for trajectory in judged:
        rewards_A, turns_A = rewards_and_turns(trajectory)
        realised.append(float(returns_to_go(rewards_A, discounts(turns_A, gamma, gamma_token))[0]))
    values = policy.values.to_returns(
        torch.cat(policy.score(batch, ForwardRequest(logprobs=False, values=True))["values"])
    )
    return {"value_start": float(values.mean()), "realised_start": sum(realised) / len(realised)}
