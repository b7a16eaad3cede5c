"""Holding the learning rate to what the policy can bear: a controller of its measured change per step.

A rate that is right at the start of a run may be far too high near its end, where the policy is sure of itself. So after each
step's updates the policy is compared with the one that played, on a few of the step's tokens: as in the rules of RSL-RL and
rl_games (and Schulman et al., arXiv 1707.06347, section 4), but against a band with one edge, because a policy that hardly moves
is no fault of the rate's alone. A step's divergence grows with the square of the rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as List

import torch

from lmrl import world
from lmrl.objectives.correction import OLD
from lmrl.objectives.groups import flat
from lmrl.objectives.policy_gradient import k3
from lmrl.policy.policy import Policy
from lmrl.trajectories.batch import Batch, Sequence

TOKENS, SHARE = 512, 1 / 8
"""Tokens that are compared at most, in all and as a share of the step's; at least one sequence of each process."""
LOWEST_CUT, RAISE = 0.25, 1.1
"""What a step's factor is multiplied by at least, and by what it is raised again."""


def controlled(factor: float, moved: float, band: float) -> float:
    """The factor on the learning rate after a step that moved the policy by `moved` nats a token."""
    if moved > band:
        return factor * max(math.sqrt(band / moved), LOWEST_CUT)
    return min(factor * RAISE, 1.0) if moved < band / 2 else factor


def policy_change(policy: Policy, batch: Batch) -> float | None:
    """KL(policy that played || policy) in nats a token, estimated on some tokens of all processes' batches; None if no process
    knows the log-probabilities before the updates."""
    known = OLD if OLD in names(batch) else "sampled_logprobs"
    some = Batch(some_of([one for one in batch.sequences if known in one.fields]))
    if not world.largest(len(some.sequences)):
        return None
    return world.mean(k3(some.get(known), flat(policy.score(some)["logprobs"])))


def names(batch: Batch) -> set[str]:
    return set(batch.sequences[0].fields) if batch.sequences else set()


def some_of(sequences: List[Sequence]) -> list[Sequence]:
    """Sequences spread over the batch, as many as the limit on tokens allows."""
    total = sum(len(one.tokens) for one in sequences)
    limit = min(TOKENS / world.size(), SHARE * total)
    count = max(int(len(sequences) * limit / total), 1) if total else 0
    places = torch.linspace(0, len(sequences) - 1, count).round().long().tolist() if count else []
    return [sequences[place] for place in places]
