"""lmrl's extension of a vLLM server's workers: they load weights from a file, and report which weights they hold.

A server takes it by `--worker-extension-cls lmrl.engines.vllm_worker.PolicyWorker`; its methods are then called over
HTTP, by `/collective_rpc`. They answer `{"error": ...}` instead of raising, so that the cause reaches the caller.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open


def _answering(method: Callable[..., dict[str, Any] | None]) -> Callable[..., dict[str, Any]]:
    """Return errors as an answer instead of raising them."""

    @functools.wraps(method)
    def call(self: Any, *args: Any) -> dict[str, Any]:
        try:
            return method(self, *args) or {}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}

    return call


class PolicyWorker:
    """Mixed into vLLM's own worker class, which has the attributes that are only declared here."""

    model_runner: Any
    vllm_config: Any
    device: Any
    reload_weights: Callable[..., None]

    lmrl_version: str | None = None
    """Name of the weights; None for those that the server started with."""
    lmrl_group: str | None = None
    """Name of the process group in which weights are broadcast to it."""

    @_answering
    def lmrl_describe(self) -> dict[str, Any]:
        """Facts about this worker for the run."""
        model, device = self.vllm_config.model_config, torch.device(self.device)
        transfer = self.vllm_config.weight_transfer_config
        return {
            "version": self.lmrl_version,
            "group": self.lmrl_group,
            "device": device.type,
            "gpu": str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None,
            "transfer": transfer.backend if transfer else None,
            "logprobs": str(model.logprobs_mode),
            "max_model_len": model.max_model_len,
            "model_type": model.hf_text_config.model_type,
            "vocabulary": model.hf_text_config.vocab_size,
        }

    @_answering
    def lmrl_load(self, path: str) -> None:
        """Load the weights of a safetensors file, with the tensor names of the model's ordinary checkpoint."""
        self.lmrl_version = None  # neither the old weights nor the new ones until they are named
        with safe_open(path, framework="pt") as file:
            self.reload_weights(weights_iterator=((name, file.get_tensor(name)) for name in file.keys()))
        if torch.device(self.device).type == "cpu":
            pack_head(self.model_runner.get_model())

    @_answering
    def lmrl_name(self, version: str, group: str | None = None) -> None:
        """Name the loaded weights, and their group if they came by vLLM's own transfer."""
        self.lmrl_version, self.lmrl_group = version, group


def pack_head(model: torch.nn.Module) -> None:
    """On a CPU, pack the vocabulary projection again after its weights have changed.

    vLLM's kernel multiplies by a packed copy of the matrix. A reload makes a new copy for the layers it loads, but a
    head that is tied to the embeddings is not loaded as such, and would keep using the old one.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
