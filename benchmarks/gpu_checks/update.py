"""Speed, memory and share of the card's peak of GRPO's and DPO's update."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from gpu_checks.building import policy_of, recipe_of, trajectories_of
from gpu_checks.timing import PEAK, flops, peak_gib, reset_peak, seconds


def update(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    cases = [
        ("1.5b", "grpo", 16384, {"gradient_checkpointing": True}),
        ("1.5b", "grpo", 16384, {"gradient_checkpointing": True, "compile": True}),
        ("1.5b", "grpo", 8192, {}),
        ("1.5b", "grpo", 8192, {"compile": True}),
        ("1.5b", "dpo", 8192, {}),
        ("0.5b", "grpo", 16384, {}),
        ("7b", "grpo", 8192, {"gradient_checkpointing": True, "lora": {"r": 16, "lora_alpha": 32}}),
    ]
    if options.tiny:
        cases = [("tiny", "grpo", 512, {}), ("tiny", "dpo", 512, {"gradient_checkpointing": True})]
    for shape, name, micro, training in cases:
        reset_peak(options)
        yield update_of(options, shape, name, micro, training)


def update_of(
    options: argparse.Namespace, shape: str, name: str, micro: int, training: dict[str, Any]
) -> dict[str, Any]:
    """An update of 16 sequences of 2,048 tokens. training: options of that section, and `lora`."""
    from lmrl.objectives import load_objective
    from lmrl.objectives.correction import Correction
    from lmrl.recipe.rates import with_rates
    from lmrl.training.updater import Updater

    recipe, lora = recipe_of(options, shape, {"name": name}, precision="bfloat16", microbatch_tokens=micro, **training)
    policy = policy_of(options, recipe, lora, reference=name == "dpo")
    objective = load_objective(recipe.resolved_objective)
    objective.correction = Correction.of(recipe.rollouts)
    length = 64 if options.tiny else 2048
    lengths = [(length // 32, length - length // 32)] * 16
    trajectories = trajectories_of(lengths, 8, 2, recipe.model.config["vocab_size"])
    for one in trajectories:
        one.chosen = one.reward > 0 if name == "dpo" else None
    updater = Updater(policy, with_rates(recipe, *policy.size), 10)

    def one_update() -> dict[str, float]:
        updater.begin(1)  # a step's first update is never taken back
        return updater.step(policy, objective, batch)

    prepared = seconds(options, lambda: objective.prepare(policy, trajectories), 1)
    batch = objective.prepare(policy, trajectories)
    taken = seconds(options, one_update, 3)
    tokens, actions = length * len(lengths), sum(new for _, new in lengths)
    done = flops(policy, tokens, tokens * length, actions, trained=lora is None)
    return {
        "case": f"{shape} {name}" + (" LoRA" if lora else ""),
        "microbatch_tokens": policy.microbatch_tokens,
        "checkpointing": bool(training.get("gradient_checkpointing")),
        "layers": "compiled" if training.get("compile") else "plain",
        "packs": policy.packs,
        "prepare_s": prepared,
        "seconds": taken,
        "tokens_per_s": tokens / taken,
        "mfu": done / taken / PEAK,
        "peak_gib": peak_gib(options),
    }
