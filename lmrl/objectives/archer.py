"""ArCHer: a turn-level critic trains a token-level policy.

Zhou et al., "ArCHer: training language model agents via hierarchical multi-turn RL" (arXiv 2402.19446). The critic
estimates V(s) for the state in which a turn begins, and Q(s, u) for the utterance u once it has ended; both bootstrap
from turn to turn, with a target network. All tokens of a turn share its advantage, Q(s, u) - V(s).

Differences from the paper: one network gives both values, as the value of the text up to that point; its targets look
further ahead by `lam` (the paper: 0) and are computed once per step; the episodes are fresh (no replay); the policy's
surrogate is PPO's.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lmrl import distributed
from lmrl.objectives.base import Loss, less_entropy
from lmrl.objectives.correction import OLD, mismatch, sampled_logprobs
from lmrl.objectives.groups import flat
from lmrl.objectives.policy_gradient import ROUNDING, PolicyGradient, k3, whiten
from lmrl.objectives.ppo import ADVANTAGE_FLOOR, Warmup, followed, spread
from lmrl.policy.heads import HeadsSpec
from lmrl.policy.passes import ForwardRequest, Outputs
from lmrl.policy.policy import Policy
from lmrl.recipe import ArCHerObjective
from lmrl.trajectories.allowed import AllowedTokens
from lmrl.trajectories.batch import Batch, Microbatch, Sequence
from lmrl.trajectories.chain import continues, returns_to_go, rewards_and_turns
from lmrl.trajectories.trajectory import Segment, Trajectory

INSIDE, BEGIN, END, AFTER = range(4)
"""Kinds of a sequence's entries: an action inside a turn, a turn's first action, a turn's end, a truncated episode's
end."""
KIND = "kind"


# ------------------------------------------------------------------------------------------------------------ mathematics
def turn_targets(
    rewards_K: torch.Tensor, values_K: torch.Tensor, q_K: torch.Tensor, last_value: float, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The regression targets of V and Q for each turn of an episode, both (K,).

    rewards_K: earned by each turn; values_K, q_K: V before and Q after it, by the target network; last_value: of the
    state after the last turn (0 if the episode ended there). With lam 0, Q_k <- r_k + gamma V_{k+1} and V_k <- Q_k;
    otherwise lam is the weight of the next state's own target in place of its value, so that lam 1 gives the returns.
    """
    v_targets, q_targets, following = [], [], last_value
    for reward, value, q in zip(*(one.flip(0).tolist() for one in (rewards_K, values_K, q_K)), strict=True):
        q_targets.append(reward + gamma * following)
        v_targets.append((1 - lam) * q + lam * q_targets[-1])
        following = (1 - lam) * value + lam * v_targets[-1]
    return rewards_K.new_tensor(v_targets[::-1]), rewards_K.new_tensor(q_targets[::-1])


def to_turns(trajectory: Trajectory) -> list[Sequence]:
    """One sequence per segment: its actions, an entry for each turn's end after the turn's last action, and one for the
    end of a truncated episode. The field `kind` holds the kind of each entry."""
    last = trajectory.segments[-1]
    found = []
    for segment in trajectory.segments:
        truncated_here = segment is last and not trajectory.terminated
        if segment.actions or truncated_here:
            found.append(_with_ends(segment, truncated_here))
    return found


def _with_ends(segment: Segment, truncated: bool) -> Sequence:
    entries: list[tuple[int, int, int]] = []  # state, target, kind
    allowed: dict[int, AllowedTokens] = {}
    actions, turns = segment.actions, segment.turns
    for index, position in enumerate(actions):
        if position in segment.allowed:
            allowed[len(entries)] = segment.allowed[position]
        begins = index == 0 or turns[actions[index - 1]] != turns[position]
        entries.append((position - 1, segment.tokens[position], BEGIN if begins else INSIDE))
        if index == len(actions) - 1 or turns[actions[index + 1]] != turns[position]:
            entries.append((position, 0, END))
    if truncated:
        entries.append((len(segment.tokens) - 1, 0, AFTER))
    states, targets, kinds = (torch.tensor(column, dtype=torch.long) for column in zip(*entries, strict=True))
    tokens = torch.tensor(segment.tokens, dtype=torch.long)
    return Sequence(tokens, states, targets, {KIND: kinds}, allowed=allowed, kind=segment.kind)


@dataclass
class _Episode:
    """An episode's entries, (E,), and its turns, (K,)."""

    kinds_E: torch.Tensor
    turns_A: torch.Tensor
    rewards_K: torch.Tensor
    values_K: torch.Tensor
    q_K: torch.Tensor
    v_targets_K: torch.Tensor
    q_targets_K: torch.Tensor

    def spread_out(self, begin_K: torch.Tensor, end_K: torch.Tensor) -> torch.Tensor:
        """Values per turn, placed at the entries where turns begin and end; 0 elsewhere, (E,)."""
        placed_E = torch.zeros(len(self.kinds_E), dtype=torch.float64)
        placed_E[self.kinds_E == BEGIN] = begin_K
        placed_E[self.kinds_E == END] = end_K
        return placed_E

    def at_actions(self, values_K: torch.Tensor) -> torch.Tensor:
        """Values per turn, placed at each of the turn's actions; 0 elsewhere, (E,)."""
        placed_E = torch.zeros(len(self.kinds_E), dtype=torch.float64)
        placed_E[self.kinds_E < END] = values_K[self.turns_A]
        return placed_E


# -------------------------------------------------------------------------------------------------------------- objective
class ArCHer(PolicyGradient):
    options: ArCHerObjective
    label = "ArCHer"
    index_fields = ()

    def __init__(self, options: ArCHerObjective):
        super().__init__(options)
        self.heads = HeadsSpec(trunk="separate", value_target=True)
        self.polyak = options.polyak
        self.warmup = Warmup()

    @property
    def warming_up(self) -> bool:
        return not self.warmup.over

    def begin(self, step: int) -> None:
        self.warmup.begin(step, self.options.value_warmup_steps)

    @property
    def forward_request(self) -> ForwardRequest:
        return ForwardRequest(logprobs=not self.warming_up, values=True)

    def prepare(self, policy: Policy, trajectories: list[Trajectory]) -> Batch:
        options, units = self.options, policy.values
        spans = [to_turns(trajectory) for trajectory in trajectories]
        batch = Batch([sequence for span in spans for sequence in span])
        sizes = [sum(len(sequence.targets) for sequence in span) for span in spans]
        kinds = [torch.cat([sequence.fields[KIND] for sequence in span]) for span in spans]
        earned = [rewards_and_turns(one, options.missing_eos_penalty)[0] for one in trajectories]
        if not units.is_normalised:
            first = [
                returns_to_go(_by_turn(rewards_A, kinds_E), torch.full((int((kinds_E == BEGIN).sum()),), options.gamma))
                for rewards_A, kinds_E in zip(earned, kinds, strict=True)
            ]
            if (known := spread(flat(first))) is not None:
                units.renormalise(*known, preserve=not policy.heads_are_new)
        scored = policy.score(batch, ForwardRequest(values=True, target_values=True))
        old_N = flat(scored["logprobs"])
        reference_N = flat(policy.score(batch, reference=True)["logprobs"]) if policy.has_reference else old_N
        values_N, targets_N = (units.to_returns(flat(scored[name])) for name in ("values", "target_values"))
        columns = zip(*(one.split(sizes) for one in (old_N - reference_N, values_N, targets_N)), strict=True)
        episodes, kls = [], []
        for trajectory, kinds_E, rewards_A, (gap_E, values_E, targets_E) in zip(
            trajectories, kinds, earned, columns, strict=True
        ):
            gap_A = gap_E[kinds_E < END].double()
            kls.append(float(gap_A.sum()))
            rewards_K = _by_turn(rewards_A - options.kl_coef * gap_A, kinds_E)
            after = float(targets_E[kinds_E == AFTER]) if continues(trajectory, options.gamma) else 0.0
            regressed = turn_targets(
                rewards_K, targets_E[kinds_E == BEGIN], targets_E[kinds_E == END], after, options.gamma, options.lam
            )
            turns_A = (kinds_E[kinds_E < END] == BEGIN).cumsum(0) - 1
            episodes.append(
                _Episode(kinds_E, turns_A, rewards_K, values_E[kinds_E == BEGIN], values_E[kinds_E == END], *regressed)
            )
        return self._batch(policy, batch, episodes, old_N, reference_N, trajectories, kls)

    def _batch(
        self,
        policy: Policy,
        batch: Batch,
        episodes: list[_Episode],
        old_N: torch.Tensor,
        reference_N: torch.Tensor,
        trajectories: list[Trajectory],
        kls: list[float],
    ) -> Batch:
        units, kinds_N = policy.values, batch.get(KIND)
        stats = self._measure(policy, episodes)
        if policy.has_reference:
            stats["kl"] = distributed.mean(kls)
        real_N = kinds_N < END
        advantages_N = flat([one.at_actions(one.q_K - one.values_K) for one in episodes], torch.float64)
        whitened_N = torch.zeros_like(advantages_N)
        floor = ADVANTAGE_FLOOR * float(units.std) if units.is_normalised else 0.0
        whitened_N[real_N] = whiten(advantages_N[real_N], floor)
        regressed_N = flat([one.spread_out(one.v_targets_K, one.q_targets_K) for one in episodes])
        # The critic's mean is over states, however long the turns are: the updater divides by actions.
        of_turns_N = (kinds_N == BEGIN) | (kinds_N == END)
        actions, states = distributed.all_sum([int(real_N.sum()), int(of_turns_N.sum())])
        sampled = [sampled_logprobs(trajectory) for trajectory in trajectories]
        stats |= mismatch(old_N[real_N], flat(sampled))
        batch.set(OLD, old_N)
        batch.set("advantages", whitened_N.to(policy.precision))
        batch.set("returns", units.to_values(regressed_N).to(policy.precision))
        batch.set("real", real_N.to(policy.precision))
        batch.set("critic", of_turns_N.to(policy.precision) * (actions / max(states, 1)))
        if self.correction is not None:
            sampled_N = torch.full_like(old_N, torch.nan)
            sampled_N[real_N] = flat(sampled).to(sampled_N.dtype)
            episodes_N = flat([torch.full(one.kinds_E.shape, n) for n, one in enumerate(episodes)], torch.long)
            stats |= self.correction.weigh(batch, sampled_N, episodes_N)
        return Batch(
            [_without_after(sequence) for sequence in batch.sequences if (sequence.fields[KIND] < AFTER).any()], stats
        )

    def _measure(self, policy: Policy, episodes: list[_Episode]) -> dict[str, float]:
        """How well Q predicted its targets; also updates the units and the warm-up."""
        units, options = policy.values, self.options
        values_K, q_K = flat([one.values_K for one in episodes]), flat([one.q_K for one in episodes])
        v_targets_K, q_targets_K = (
            flat([getattr(one, name) for one in episodes]) for name in ("v_targets_K", "q_targets_K")
        )
        mean, variance = distributed.moments(q_targets_K)
        error = distributed.moments(q_targets_K - q_K)[1]
        explained = 1 - error / variance if variance > (ROUNDING * mean) ** 2 else 0.0
        self.warmup.add(explained)  # Q's: what a random policy earns may be predictable after a turn, but not before it
        mean, variance = distributed.moments(v_targets_K)
        if units.is_normalised and math.isfinite(variance):
            units.renormalise(*followed(float(units.mean), float(units.std), float(units.peak), mean, variance))
        return {
            "value_mean": distributed.mean(values_K),
            "return_std": math.sqrt(variance),
            "explained_variance": explained,
            "turn_advantage_std": math.sqrt(distributed.moments(q_K - values_K)[1]),
            "kl_coef": options.kl_coef,
        }

    def loss(self, outputs: Outputs, batch: Microbatch) -> Loss:
        options, fields = self.options, batch.fields
        critic = (0.5 * fields["critic"] * (outputs.values - fields["returns"]) ** 2).sum()
        stats = {"value_loss": critic.detach()}
        if self.warming_up:
            return Loss(options.value_coef * critic, stats)
        real_N = fields["real"]
        surrogate_N, clipped_N = self.surrogate(outputs.logprobs, fields[OLD], fields)
        entropy = (outputs.entropy * real_N).sum()
        policy = (surrogate_N * real_N).sum()
        with torch.no_grad():
            stats["policy_loss"], stats["entropy"] = policy.detach(), entropy.detach()
            stats["clip_fraction"] = (clipped_N * real_N).sum()
            stats["approx_kl"] = (k3(fields[OLD], outputs.logprobs) * real_N).sum()
        return Loss(less_entropy(policy + options.value_coef * critic, entropy, self.entropy_coef), stats)

    def count(self, batch: Batch) -> float:
        """Action tokens, without the ends of turns."""
        return float(batch.fields["real"].sum())

    def divergence(self, policy: Policy, minibatch: Batch) -> dict[str, float]:
        if self.options.target_kl is None or self.epochs * self.minibatches == 1:
            return {}
        scored, real_N = policy.score(minibatch), minibatch.get("real") > 0
        moved_N = k3(minibatch.get(OLD), flat(scored["logprobs"]))[real_N]
        return {"approx_kl": distributed.mean(moved_N), "entropy": distributed.mean(flat(scored["entropy"])[real_N])}

    def state(self) -> dict[str, Any]:
        return {"warmup": asdict(self.warmup)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.warmup = Warmup(**state["warmup"])


def _by_turn(rewards_A: torch.Tensor, kinds_E: torch.Tensor) -> torch.Tensor:
    """The reward of each turn, (K,), in double, from those of its actions."""
    turns_A = (kinds_E[kinds_E < END] == BEGIN).cumsum(0) - 1
    return torch.zeros(int((kinds_E == BEGIN).sum()), dtype=torch.float64).index_add(0, turns_A, rewards_A.double())


def _without_after(sequence: Sequence) -> Sequence:
    kept = sequence.fields.pop(KIND) < AFTER
    sequence.states, sequence.targets = sequence.states[kept], sequence.targets[kept]
    sequence.fields = {name: values[kept] for name, values in sequence.fields.items()}
    return sequence
