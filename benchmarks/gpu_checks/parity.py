"""Log-probabilities, gradients and one update, by each way of computing, against float32 on the CPU."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from typing import Any

import torch

from gpu_checks.building import policy_of, recipe_of, trajectories_of


def parity(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from lmrl.objectives.groups import grouped_batch
    from lmrl.trajectories.batch import to_batch

    recipe, _ = recipe_of(options, "0.5b", {"name": "grpo"}, precision="float32")
    samples, groups = 4, 2
    lengths = [(12, 5 + n) if options.tiny else (48, 40 + 30 * n) for n in range(samples * groups)]
    cpu = torch.device("cpu")
    base = policy_of(argparse.Namespace(**vars(options) | {"device": cpu}), recipe, spread=0.03)
    start = flat([one.detach() for one in base.parameters()], options.device)

    def measured(way: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of the actions, the gradient of PPO's surrogate, and the weights' change by one step of AdamW."""
        policy = copy.deepcopy(base).to(device)
        policy.autocast_dtype = torch.bfloat16 if "bfloat16" in way else None
        torch.set_float32_matmul_precision("highest" if way == "float32" else "high")
        packed = "end to end" in way or "shared" in way
        policy.attention = "sdpa" if not packed else "auto" if device.type == "cuda" else "varlen"
        assert policy.packs == packed
        if "compiled" in way:
            from lmrl.policy.language_model import decoder_layers

            for layer in decoder_layers(policy.causal_lm):
                layer.forward = torch.compile(layer.forward, dynamic=True)
        trajectories = trajectories_of(lengths, groups, samples, recipe.model.config["vocab_size"])
        split = [trajectories[:samples], trajectories[samples:]]
        batch = grouped_batch(split, policy, share=True, whole=False) if "shared" in way else to_batch(trajectories)
        count = batch.num_actions
        batch.set("advantages", torch.randn(count, generator=torch.Generator().manual_seed(2)))
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, fused=device.type == "cuda" or None)
        policy.begin_update(False)
        logprobs = [torch.zeros(0)] * len(batch.lengths)
        for micro in batch.microbatches(policy.microbatch_tokens, policy.pad_id, policy.packs):
            micro.to(device)
            logprobs_N = policy(micro).logprobs
            (-(logprobs_N - logprobs_N.detach()).exp() * micro.fields["advantages"]).sum().div(count).backward()
            for index, part in zip(micro.indices, logprobs_N.detach().float().split(micro.lengths), strict=True):
                logprobs[index] = part
        gradient = flat([one.grad for one in policy.parameters()], options.device)
        optimizer.step()
        moved = flat([one.detach() for one in policy.parameters()], options.device) - start
        return torch.cat(logprobs).to(options.device), gradient, moved

    reference = measured("float32", cpu)
    ways = ["float32", "float32 with TF32", "bfloat16 padded", "bfloat16 end to end", "bfloat16 shared prompts"]
    ways.append("bfloat16 end to end, compiled")
    for way in ways if options.device.type == "cuda" else ["float32 shared prompts", "bfloat16 padded"]:
        logprobs, gradient, moved = measured(way, options.device)
        yield {
            "way": way,
            "logprob_mean_abs": float((logprobs - reference[0]).abs().mean()),
            "logprob_max_abs": float((logprobs - reference[0]).abs().max()),
            "logprob_std": float(reference[0].std()),
            "gradient_relative": float((gradient - reference[1]).norm() / reference[1].norm()),
            "gradient_cosine": cosine(gradient, reference[1]),
            "update_cosine": cosine(moved, reference[2]),
        }
        torch._dynamo.reset()


def flat(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.cat([one.to(device).flatten() for one in tensors])


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of long vectors, with sums in double."""

    def dot(a: torch.Tensor, b: torch.Tensor) -> float:
        parts = zip(a.split(2**24), b.split(2**24), strict=True)
        return sum(float(x.double() @ y.double()) for x, y in parts)

    return dot(one, other) / (dot(one, one) * dot(other, other)) ** 0.5
