"""The largest update that a recipe allows, to be tried before the first step: what does not fit should fail at once."""

from __future__ import annotations

import torch

from lmrl import distributed
from lmrl.policy.policy import Policy
from lmrl.recipe import Recipe
from lmrl.recipe.task import EnvironmentTask
from lmrl.rollouts.task import Task
from lmrl.trajectories.batch import Batch, Sequence


def worst_case(recipe: Recipe, policy: Policy, task: Task, pairs: bool) -> Batch:
    """Two full microbatches (or as many sequences as a minibatch has) of the longest sequences, all of whose tokens are
    actions. pairs: the objective keeps sequences together by twos.

    Two, because only during the second is the gradient of the first held together with the activations.
    """
    longest = longest_sequence(recipe, policy, task)
    rows = 2 * max(policy.microbatch_tokens // longest, 2 if pairs else 1)
    rows = min(rows, sequences_of_a_minibatch(recipe, pairs))
    # One is shorter, so that there is padding, and attention gets its mask.
    lengths = [longest] * (rows - 1) + [max(longest - (rows > 1), 2)]
    return Batch([full_sequence(length, row // 2 if pairs else None) for row, length in enumerate(lengths)])


def full_sequence(length: int, chain: int | None = None) -> Sequence:
    """A sequence of `length` tokens, each but the first an action."""
    states, targets = torch.arange(length - 1), torch.zeros(length - 1, dtype=torch.long)
    # Of all fields, `floors` alone is asked for by passes: see ForwardRequest.floors.
    return Sequence(
        torch.zeros(length, dtype=torch.long), states, targets, {"floors": torch.zeros(length - 1)}, chain=chain
    )


def longest_sequence(recipe: Recipe, policy: Policy, task: Task) -> int:
    """Tokens of the longest sequence that can occur; if nothing limits them, as many as a microbatch has."""
    limits: list[int | None] = []
    if recipe.source.plays:
        prompt = None if recipe.source.name == "blend" else task.longest_prompt  # other parts have other prompts
        limits.append(None if prompt is None else prompt + recipe.rollouts.max_new_tokens)
    if recipe.source.has_log:
        limits.append(getattr(recipe.source, "max_tokens", None))
    known = [limit for limit in limits if limit is not None]
    longest = max(known) if len(known) == len(limits) else policy.microbatch_tokens
    return max(min(longest, policy.max_length or longest), 2)


def sequences_of_a_minibatch(recipe: Recipe, pairs: bool) -> int:
    """Maximum number of sequences in one process's part of a minibatch."""
    episodes = -(-recipe.arithmetic()["episodes_per_minibatch"] // distributed.size()) * (2 if pairs else 1)
    task = recipe.task
    if isinstance(task, EnvironmentTask) and task.history != "all":  # each turn is a sequence
        return episodes * task.max_turns
    return episodes
