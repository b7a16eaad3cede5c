"""Tokens a second of the `hf` engine, against transformers' `generate`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from gpu_checks.building import policy_of, recipe_of
from gpu_checks.timing import peak_gib, reset_peak, seconds


def decode(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from lmrl.engines.base import Sampling
    from lmrl.engines.hf import HFEngine

    recipe, _ = recipe_of(options, "0.5b", {"name": "grpo"}, precision="bfloat16")
    policy = policy_of(options, recipe)
    policy.causal_lm.generation_config.eos_token_id = None
    prompt, new = (8, 8) if options.tiny else (128, 64)
    for rows in (4,) if options.tiny else (64, 256):
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(5, 200, (prompt,), generator=generator).tolist() for _ in range(rows)]
        engine = HFEngine(policy, slots=rows)
        keys = [("gpu", index) for index in range(rows)]
        reset_peak(options)
        sample = partial(engine.complete, prompts, Sampling(new), keys)
        taken = seconds(options, sample, 2, 1)
        drawn = sum(len(one.tokens) for one in sample())
        yield {
            "way": "hf engine",
            "rows": rows,
            "tokens_per_s": drawn / taken,
            "seconds": taken,
            "peak_gib": peak_gib(options),
        }
        batch = torch.tensor(prompts, device=options.device)

        def generate(batch: torch.Tensor = batch) -> None:
            with torch.no_grad(), torch.autocast(options.device.type, dtype=torch.bfloat16):
                policy.causal_lm.generate(
                    batch,
                    attention_mask=torch.ones_like(batch),
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=True,
                    top_k=0,
                )

        reset_peak(options)
        taken = seconds(options, generate, 2, 1)
        yield {
            "way": "generate",
            "rows": rows,
            "tokens_per_s": rows * new / taken,
            "seconds": taken,
            "peak_gib": peak_gib(options),
        }
