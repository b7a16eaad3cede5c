"""Log-likelihoods of given continuations of a context, the context computed once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lmrl.errors import ModelError
from lmrl.policy.passes import ForwardRequest
from lmrl.policy.policy import Policy
from lmrl.trajectories import batch as batches
from lmrl.trajectories.shared import pack


@dataclass(frozen=True)
class Continued:
    """A context, and continuations of it, none empty; all as tokens."""

    context: list[int]
    continuations: list[list[int]]


@dataclass(frozen=True)
class Likelihood:
    """logprobs: of each token of a continuation, in nats. is_greedy: True if each is the most likely token."""

    logprobs: list[float]
    is_greedy: bool

    @property
    def total(self) -> float:
        return sum(self.logprobs)


def likelihoods(policy: Policy, wanted: Sequence[Continued]) -> list[list[Likelihood]]:
    """The likelihood of every continuation of each context, at temperature 1 and without Q.

    Raises ModelError if one needs more positions than the model has.
    """
    limit = policy.max_length
    longest = max((len(one.context) + max(map(len, one.continuations)) - 1 for one in wanted), default=0)
    if limit is not None and longest > limit:
        raise ModelError(
            f"a prompt with its continuation needs {longest} positions, but the model has {limit}: use fewer examples "
            "(shots=N), or leave long prompts out, task.prompts.max_tokens=N"
        )
    packed = [sequences(one, policy.shares_prompts) for one in wanted]
    with policy.at_temperature(1.0):
        found = policy.score(batches.Batch([one for group in packed for one in group]), ForwardRequest(greedy=True))
    pairs = iter(zip(found["logprobs"], found["greedy"], strict=True))
    result = []
    for one, group in zip(wanted, packed, strict=True):
        logprobs, greedy = (torch.cat(parts) for parts in zip(*(next(pairs) for _ in group), strict=True))
        sizes = [len(tokens) for tokens in one.continuations]
        each = zip(logprobs.double().split(sizes), greedy.split(sizes), strict=True)
        result.append([Likelihood(values.tolist(), bool(best.all())) for values, best in each])
    return result


def sequences(one: Continued, shares: bool) -> list[batches.Sequence]:
    """The sequences to compute: one for all continuations if the model can compute their context once, else one for
    each.

    The last token of a continuation is only predicted, so it is not an input.
    """
    plain = []
    for tokens in one.continuations:
        start = len(one.context) - 1
        states = torch.arange(start, start + len(tokens))
        inputs = torch.tensor(one.context + tokens[:-1], dtype=torch.long)
        plain.append(batches.Sequence(inputs, states, torch.tensor(tokens, dtype=torch.long)))
    if len(plain) == 1:
        return plain
    if all(len(tokens) == 1 for tokens in one.continuations):  # the context is the only input
        targets = torch.cat([each.targets for each in plain])
        return [batches.Sequence(plain[0].tokens, plain[0].states.repeat(len(plain)), targets)]
    together = pack(plain) if shares else None
    return plain if together is None else [together]
