"""Fields of a batch that a policy evaluates without gradient, put back into the order of the batch's sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lmrl.policy.logprobs import at_least_float32
from lmrl.policy.memory import Passes
from lmrl.policy.passes import ForwardRequest

if TYPE_CHECKING:
    from lmrl.policy.policy import Policy

FIELDS = ("logprobs", "entropy", "values", "target_values", "greedy")


def score_passes(
    policy: Policy, passes: Passes, count: int, request: ForwardRequest, reference: bool
) -> dict[str, list[torch.Tensor]]:
    """By field that was asked for, a tensor on the CPU for each of `count` sequences, one entry an action.

    reference: by the reference instead of the policy.
    """
    fields: dict[str, dict[int, torch.Tensor]] = {}
    for micro, dummy, _ in passes:
        micro = micro.to(policy.device)
        outputs = policy(micro, request, reference)
        if dummy:  # joins the collectives, and adds nothing
            continue
        for name in FIELDS:
            flat: torch.Tensor | None = getattr(outputs, name)
            if flat is not None:
                parts = flat.to("cpu", at_least_float32(flat.dtype)).split(micro.lengths)
                fields.setdefault(name, {}).update(zip(micro.indices, parts, strict=True))
    if not count:
        return {name: [] for name in FIELDS}
    return {name: [parts[index] for index in range(count)] for name, parts in fields.items()}
