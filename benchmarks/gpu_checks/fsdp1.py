"""FSDP2 with a single rank: the same losses as without."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

from gpu_checks.building import policy_of, recipe_of, trajectories_of
from gpu_checks.timing import peak_gib, reset_peak, seconds


def fsdp1(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import torch.distributed as dist

    from lmrl.training.parallel.sharded import FSDPStrategy
    from lmrl.training.parallel.strategy import Strategy

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("nccl" if options.device.type == "cuda" else "gloo")
    try:
        for name, build in (("one process", Strategy), ("FSDP2, one rank", lambda: FSDPStrategy(options.device))):
            reset_peak(options)
            yield {"way": name} | sharded_updates(options, build())
    finally:
        dist.destroy_process_group()


def sharded_updates(options: argparse.Namespace, strategy: Any) -> dict[str, Any]:
    """Three updates of a 0.5B model by a strategy, and the time of another."""
    from lmrl.objectives import load_objective
    from lmrl.objectives.correction import Correction
    from lmrl.recipe.rates import with_rates
    from lmrl.training.updater import Updater

    recipe, _ = recipe_of(options, "0.5b", {"name": "grpo"}, precision="bfloat16", microbatch_tokens=8192)
    policy = policy_of(options, recipe)
    objective = load_objective(recipe.resolved_objective)
    objective.correction = Correction.of(recipe.rollouts)
    length = 32 if options.tiny else 1024
    trajectories = trajectories_of([(length // 4, length)] * 16, 4, 4, recipe.model.config["vocab_size"])
    updater = Updater(policy, with_rates(recipe, *policy.size), 10, strategy)
    batch = objective.prepare(policy, trajectories)

    def one_update() -> dict[str, float]:
        updater.begin(1)
        return updater.step(policy, objective, batch)

    stats = [one_update() for _ in range(3)]
    return {
        "losses": [one["loss"] for one in stats],
        "grad_norms": [one["grad_norm"] for one in stats],
        "seconds": seconds(options, one_update, 3, 1),
        "peak_gib": peak_gib(options),
    }
