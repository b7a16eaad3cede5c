"""Passes over groups of samples: padded, end to end, and with each prompt computed once."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from gpu_checks.building import drawn_lengths, policy_of, recipe_of, trajectories_of
from gpu_checks.timing import peak_gib, reset_peak, seconds


def attention(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from lmrl.objectives.groups import grouped_batch
    from lmrl.trajectories.batch import to_batch

    groups, samples = (2, 2) if options.tiny else (8, 8)
    recipe, _ = recipe_of(options, "0.5b", {"name": "grpo"}, precision="bfloat16", microbatch_tokens=16384)
    policy = policy_of(options, recipe)
    lengths = drawn_lengths(options, groups, samples)
    trajectories = trajectories_of(lengths, groups, samples, recipe.model.config["vocab_size"])
    tokens = sum(map(sum, lengths))
    for way in ("padded", "end to end", "shared prompts"):
        policy.attention = "sdpa" if way == "padded" else "varlen" if options.device.type == "cpu" else "auto"
        policy.__dict__.pop("packs", None)
        policy.__dict__.pop("shares_prompts", None)
        split = [trajectories[start : start + samples] for start in range(0, len(trajectories), samples)]
        batch = (
            grouped_batch(split, policy, share=True, whole=False) if way == "shared prompts" else to_batch(trajectories)
        )
        policy.begin_update(False)
        micros = batch.microbatches(policy.microbatch_tokens, policy.pad_id, policy.packs)
        for micro in micros:
            micro.to(options.device)

        def passes(micros: list[Any] = micros) -> None:
            policy.zero_grad(set_to_none=True)
            for micro in micros:
                policy(micro).logprobs.sum().backward()

        reset_peak(options)
        taken = seconds(options, passes, 3)
        yield {
            "way": way,
            "packs": policy.packs,
            "seconds": taken,
            "tokens_per_s": tokens / taken,
            "computed_tokens": sum(micro.tokens_BT.numel() for micro in micros),
            "tokens": tokens,
            "microbatches": len(micros),
            "peak_gib": peak_gib(options),
        }
