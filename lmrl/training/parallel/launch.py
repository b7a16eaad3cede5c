"""The strategy of a launch by accelerate, and launches that are refused."""

from __future__ import annotations

import os
from typing import Any

from lmrl import distributed
from lmrl.accelerators import default_precision
from lmrl.errors import RecipeError, RunError
from lmrl.recipe import Recipe
from lmrl.recipe.files import stages_of
from lmrl.training.parallel.sharded import DeepSpeedStrategy, FSDPStrategy
from lmrl.training.parallel.strategy import Strategy


def check_launch(accelerator: Any, recipe: Recipe) -> None:
    """Raise RunError for a launch that accelerate did not set up as asked, or that contradicts the recipe."""
    kind = accelerator.distributed_type.value
    if accelerate_uses("DEEPSPEED") and kind != "DEEPSPEED":
        raise RunError(
            f"this launch asks accelerate for DeepSpeed and got {kind}: launch it in processes, by `accelerate launch` or "
            "`lmrl train --processes N --accelerate FILE`"
        )
    for feature in ("DEEPSPEED", "FSDP"):
        for stage in stages_of(recipe).values() if accelerate_uses(feature) else ():
            if stage.model.quantization is not None:
                raise RecipeError(
                    f"model.quantization={stage.model.quantization}: 4-bit weights cannot be sharded by {feature}: launch "
                    "without --accelerate, or set model.dtype=bfloat16 instead of the quantization"
                )
    if accelerate_uses("FSDP"):
        if distributed.size() == 1:
            raise RunError("this launch asks accelerate for FSDP in one process: launch more, or leave FSDP out")
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise RunError("this launch asks accelerate for FSDP version 1: set fsdp_version: 2 in its configuration")
        if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
            raise RunError(
                "fsdp_offload_params: lmrl does not offload weights; leave it out, or use DeepSpeed's ZeRO-3"
            )
    # DeepSpeed would take it as the precision of the weights.
    precision = recipe.training.precision or default_precision(accelerator.device)
    own = "no" if accelerate_uses("DEEPSPEED") else precision.replace("bfloat16", "bf16")
    if accelerator.mixed_precision not in ("no", own):
        raise RecipeError(
            f"accelerate was launched with mixed_precision={accelerator.mixed_precision}, but the recipe has "
            f"training.precision={precision}: the recipe decides, so set it there, and `no` for accelerate"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise RecipeError(
            "accelerate was launched with gradient_accumulation_steps="
            f"{accelerator.gradient_accumulation_steps}: batches are split by training.microbatch_tokens, set it to 1"
        )


def build_strategy(accelerator: Any) -> Strategy:
    """The strategy that this launch asked accelerate for."""
    if accelerate_uses("DEEPSPEED"):
        return DeepSpeedStrategy(accelerator)
    if accelerate_uses("FSDP"):
        return FSDPStrategy(accelerator.device, os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false")
    return Strategy()


def accelerate_uses(what: str) -> bool:
    """True if accelerate was launched with this feature, such as FSDP."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"
