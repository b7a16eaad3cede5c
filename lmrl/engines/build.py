"""The engine that a recipe names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from lmrl import distributed
from lmrl.engines.base import Engine
from lmrl.errors import RunError
from lmrl.policy.policy import Policy
from lmrl.recipe import Rollouts


def build_engine(
    options: Rollouts, policy: Policy, check: Callable[[], None] = lambda: None, folder: Path | None = None
) -> Engine:
    """The engine that a recipe's `rollouts` section names. folder: the run's, for logs (None: a temporary one)."""
    if options.engine == "vllm" and distributed.size() > 1:
        raise RunError(
            f"rollouts.engine=vllm lives in one process, but this is a launch of {distributed.size()}: set "
            "rollouts.engine=vllm-server, whose servers all of them share"
        )
    if options.engine == "vllm":
        from lmrl.engines.vllm import VLLMEngine

        return VLLMEngine(policy, options, check)
    if options.engine == "vllm-server":
        from lmrl.engines.vllm_server.engine import VLLMServerEngine

        if not options.server.urls and distributed.size() > int(os.environ.get("LOCAL_WORLD_SIZE", distributed.size())):
            raise RunError(
                "rollouts.engine=vllm-server: servers that a run starts are reached from their own machine alone, and this "
                "launch has several: start them by hand, and name them in rollouts.server.urls (docs/rollouts_server.md)"
            )
        if distributed.is_main():
            engine = VLLMServerEngine(policy, options.server, folder, check)
            distributed.broadcast(engine.shared)
            return engine
        return VLLMServerEngine(policy, options.server, folder, check, shared=distributed.broadcast(None))
    from lmrl.engines.hf import HFEngine

    return HFEngine(policy, options.slots, options.cache_tokens, check)
