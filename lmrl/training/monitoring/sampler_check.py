"""The sampler check: an engine's log-probabilities are compared with the learner's before a step trains on its samples.

An engine with its own copy of the weights may sample from an old or incomplete copy, or at too low a precision. The
text alone would not show it.
"""

from __future__ import annotations

from itertools import chain, zip_longest
from typing import Any

import torch

from lmrl import distributed
from lmrl.engines.base import Engine, Sampling, guidance_of
from lmrl.errors import SamplerError
from lmrl.objectives.groups import flat
from lmrl.policy.policy import Policy
from lmrl.recipe import Rollouts
from lmrl.trajectories.batch import Batch, to_sequence
from lmrl.trajectories.trajectory import Segment, Trajectory

EPISODES, TOKENS = 16, 2048
"""Maximum number of fresh episodes to compare, and of their tokens together (at least one segment is always
compared)."""


class SamplerCheck:
    """Compares after the first weight sync of a process, then after every `rollouts.check_every` syncs."""

    def __init__(self, policy: Policy, engine: Engine, rollouts: Rollouts):
        self.policy, self.engine, self.rollouts = policy, engine, rollouts
        self.why_not_comparable = why_not_comparable(policy, Sampling.of(rollouts))
        self.compared_at: int | None = None

    @property
    def notes(self) -> list[str]:
        if self.why_not_comparable is None:
            return []
        return [f"{self.why_not_comparable}, so the log-probabilities of engine and learner are not compared"]

    @property
    def due(self) -> bool:
        every, before = self.rollouts.check_every, self.compared_at
        return self.why_not_comparable is None and (
            before is None or (every > 0 and self.engine.syncs - before >= every)
        )

    def __call__(self, played: list[Trajectory]) -> dict[str, Any] | None:
        """Mean and largest absolute difference (nats), KL(sampler || learner) per token, and the number of tokens; None
        if no check is due. Episodes sampled with older weights than the learner's are not compared.
        """
        if not self.due:
            return None
        current = [one for one in played if self.engine.staleness(one.version) == 0]
        own_N = logprob_differences(self.policy, pick_segments(current), self.rollouts.temperature)
        gap_N = torch.tensor(distributed.all_gather(own_N.tolist()))
        if not len(gap_N):
            return None
        self.compared_at = self.engine.syncs
        return {
            "gap_mean": float(gap_N.abs().mean()),
            "gap_max": float(gap_N.abs().max()),
            "sampler_kl": float(gap_N.mean()),
            "tokens": len(gap_N),
            "sync": self.engine.syncs,
        }

    def raise_on_mismatch(self, compared: dict[str, Any], where: str) -> None:
        """Raise SamplerError if the mean difference exceeds `rollouts.tolerance`."""
        options = self.rollouts
        if compared["gap_mean"] <= options.tolerance:
            return
        key = {"vllm": "rollouts.vllm.dtype", "vllm-server": "rollouts.server.dtype"}.get(options.engine)
        raise SamplerError(
            f"{where}: engine '{options.engine}' sampled with other log-probabilities than the learner computes for the same "
            f"tokens: they differ by {compared['gap_mean']:.3f} nats on average, at most {compared['gap_max']:.2f}, over "
            f"{compared['tokens']} tokens (rollouts.tolerance={options.tolerance:g}). Either its precision is too low"
            f"{f' (try {key}=float32)' if key else ''}, or its weights are not the learner's (rollouts.engine=hf samples from the "
            "learner itself)"
        )


def why_not_comparable(policy: Policy, sampling: Sampling) -> str | None:
    """Why samples do not come from the learner's own distribution, whatever the engine; None if they do."""
    if sampling.temperature == 0:
        return "rollouts.temperature=0 takes the most likely token"
    if sampling.top_p < 1 or sampling.top_k > 0:
        return "rollouts.top_p or rollouts.top_k truncates the distribution"
    if guidance_of(policy, sampling) is not None:
        return "Q values guide the sampling"
    return None


def pick_segments(played: list[Trajectory], count: int = EPISODES, tokens: int = TOKENS) -> list[Segment]:
    """Segments of up to `count` evenly spaced episodes, first segments first, with up to `tokens` tokens together."""
    episodes = played[:: -(-len(played) // max(count, 1))] if played else []
    known = [
        [one for one in episode.segments if one.actions and None not in (one.logprobs[at] for at in one.actions)]
        for episode in episodes
    ]
    chosen: list[Segment] = []
    left = tokens
    for segment in chain.from_iterable(zip_longest(*known)):
        if segment is None:
            continue
        left -= len(segment.tokens)
        if chosen and left < 0:
            break
        chosen.append(segment)
    return chosen


def logprob_differences(policy: Policy, segments: list[Segment], temperature: float) -> torch.Tensor:
    """Sampler's minus learner's log-probability of each action token, (N,); the learner's is taken at `temperature`."""
    with policy.at_temperature(temperature):
        learner = policy.score(Batch([to_sequence(segment) for segment in segments]))["logprobs"]
    sampled = [segment.logprobs[position] for segment in segments for position in segment.actions]
    return torch.tensor(sampled) - flat(learner)
