"""The `vllm` engine: a copy of the policy's weights in vLLM, in this process; tokens in, tokens out.

vLLM starts from the policy's configuration with empty weights, at the first sync, and is then given the weights as a
plain checkpoint holds them (adapters merged), tensor by tensor: nothing is written to disk but a configuration.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmrl import distributed
from lmrl.engines.base import Completion, Engine, Request, Sampling, guidance_of
from lmrl.engines.vllm_worker import pack_head
from lmrl.errors import ModelError, RunError
from lmrl.policy.merged import merged_weights
from lmrl.policy.policy import Policy
from lmrl.policy.quantized import plain_config
from lmrl.recipe import Rollouts
from lmrl.recipe.estimates import VLLM_CACHE_GIB
from lmrl.seeding import key

GIB = 2**30


class VLLMEngine(Engine):
    """Samples with vLLM. Raises ModelError if vLLM is missing, or for a policy that Q heads guide."""

    def __init__(self, policy: Policy, rollouts: Rollouts, check: Callable[[], None] = lambda: None):
        """check: called before every step of vLLM's; may raise to abandon the rollout."""
        super().__init__(policy, check)
        if importlib.util.find_spec("vllm") is None:
            raise ModelError(
                "rollouts.engine: vllm is not installed: pip install -e '.[vllm]' in the clone of lmrl (without a GPU: see "
                "README.md), or set rollouts.engine=hf"
            )
        refuse_guidance(policy, Sampling.of(rollouts))
        self.options, self.slots = rollouts.vllm, rollouts.slots
        self.llm: Any = None
        self.asleep = False
        self._running: dict[str, tuple[Request, Completion]] = {}
        """Requests that vLLM is serving, by vLLM's request ids, with what it has sampled so far."""
        self._begun = 0

    @classmethod
    def build(cls, policy: Policy, options: Rollouts, check: Callable[[], None], folder: Path | None) -> VLLMEngine:
        if distributed.size() > 1:
            raise RunError(
                f"rollouts.engine=vllm lives in one process, but this is a launch of {distributed.size()}: set "
                "rollouts.engine=vllm-server, whose servers all of them share"
            )
        return cls(policy, options, check)

    # -------------------------------------------------------------------------------------------------------- weights
    def refresh(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False
        super().refresh()

    def sync(self) -> None:
        if self.llm is None:
            with undisturbed(self.policy.device), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # vLLM's modules warn about torch's
                self.llm = self._start()
            check_heads(self.llm.model_config)
        weights: Any = merged_weights(self.policy)
        if self.options.tensor_parallel_size > 1:  # they are sent to other processes
            weights = [(name, tensor.cpu()) for name, tensor in weights]
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.apply_model(pack_head)
        self.llm.reset_prefix_cache()

    def _start(self) -> Any:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        from vllm import LLM
        from vllm.platforms import current_platform

        options, on_cpu = self.options, current_platform.is_cpu()
        if options.sleep and on_cpu:
            raise ModelError("rollouts.vllm.sleep frees GPU memory, but vLLM runs on a CPU here: leave it out")
        memory = VLLM_CACHE_GIB if options.memory is None and on_cpu else options.memory
        own = self.policy.causal_lm
        config = plain_config(own)
        config.architectures = [type(own).__name__]
        with tempfile.TemporaryDirectory(prefix="lmrl-vllm-") as folder:
            config.save_pretrained(folder)
            try:
                return LLM(
                    folder,
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    generation_config="vllm",
                    dtype=options.dtype,
                    max_model_len=options.max_model_len,
                    max_num_seqs=self.slots,
                    kv_cache_memory_bytes=None if memory is None else int(memory * GIB),
                    gpu_memory_utilization=options.gpu_memory_utilization,
                    tensor_parallel_size=options.tensor_parallel_size,
                    enforce_eager=on_cpu if options.enforce_eager is None else options.enforce_eager,
                    enable_sleep_mode=options.sleep,
                    logprobs_mode="processed_logprobs",
                )
            except Exception as error:  # an architecture it lacks, too little memory: vLLM raises many kinds
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ModelError(f"rollouts.engine: vllm cannot run this model ({reason})") from error

    def release_memory(self) -> None:
        if self.options.sleep and self.llm is not None and not self.asleep:
            self.llm.sleep(level=2)  # drops the weights: the next sync sends them again
            self.asleep = self.stale = True

    def close(self) -> None:
        if self.llm is None:
            return
        from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

        self.llm.llm_engine.engine_core.shutdown()
        self.llm, self.stale, self.asleep = None, True, False
        destroy_model_parallel()
        destroy_distributed_environment()
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    # ------------------------------------------------------------------------------------------------------- sampling
    @property
    def busy(self) -> bool:
        return bool(self._running)

    async def advance(self, arrived: list[Request]) -> None:
        """Hand vLLM what has arrived, and let it compute a step: one token of each request that it has begun."""
        with own_torch_random(self.policy.device):
            for request in arrived:
                self._begin(request)
            self._drop([name for name, (request, _) in self._running.items() if request.future.done()])
            for output in self.llm.llm_engine.step() if self._running else ():
                if output.request_id in self._running:
                    self._take(output)

    def abandon(self) -> list[Request]:
        left = [request for request, _ in self._running.values()]
        self._drop(list(self._running))
        return left

    def _begin(self, request: Request) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        if sampling is None:
            # vLLM has to sample; what counts are the log-probabilities of the prompt's own tokens.
            parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        else:
            parameters = SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=key(*request.key) % 2**63,
                logprobs=0,  # of the sampled token alone
                ignore_eos=True,  # vLLM takes it from the model's configuration; these are the policy's:
                stop_token_ids=sorted(self.policy.eos_ids),
                detokenize=False,
                output_kind=RequestOutputKind.DELTA if sampling.stop else RequestOutputKind.FINAL_ONLY,
            )
        self._begun += 1
        name = str(self._begun)
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": request.tokens}, parameters)
        self._running[name] = request, Completion([], [], "length", self.syncs)

    def _drop(self, names: list[str]) -> None:
        if names:
            self.llm.llm_engine.abort_request(names)
        for name in names:
            del self._running[name]

    def _take(self, output: Any) -> None:
        """Add what vLLM sampled to a completion, and answer a request that has ended."""
        request, completion = self._running[output.request_id]
        sampling = request.sampling
        if sampling is None:
            if output.finished:
                del self._running[output.request_id]
                request.answer(prompt_logprobs(request.tokens, output.prompt_logprobs))
            return
        (part,) = output.outputs
        completion.tokens += part.token_ids
        if sampling.temperature == 0:  # drawn from a single token
            completion.logprobs += [0.0] * len(part.token_ids)
        else:
            pairs = zip(part.token_ids, part.logprobs or (), strict=True)
            completion.logprobs += [chosen[token].logprob for token, chosen in pairs]
        if completion.tokens and completion.tokens[-1] in self.policy.eos_ids:
            completion.finish_reason = "eos"
        elif sampling.stop and self.stopped(completion.tokens, sampling.stop):
            completion.finish_reason = "stop"
        if output.finished:
            del self._running[output.request_id]
        elif completion.finish_reason == "stop":
            self._drop([output.request_id])
        else:
            return
        request.answer(completion)

    def validate(self, request: Request) -> None:
        longest, limit, sampling = len(request.tokens), self.llm.model_config.max_model_len, request.sampling
        if sampling is None:
            if longest >= limit:
                raise ModelError(
                    f"{longest} tokens cannot be scored: vLLM has {limit} positions, and needs one more than these: raise "
                    "rollouts.vllm.max_model_len as far as the model goes"
                )
            return
        refuse_guidance(self.policy, sampling)
        if longest + sampling.max_new_tokens > limit:
            raise ModelError(
                f"a context of {longest} tokens and max_new_tokens={sampling.max_new_tokens} need "
                f"{longest + sampling.max_new_tokens} positions, but vLLM has {limit}: lower rollouts.max_new_tokens, shorten "
                "the context (task.prompts.max_tokens, task.history), or raise rollouts.vllm.max_model_len as far as the "
                "model goes"
            )


def prompt_logprobs(tokens: list[int], found: list[Any]) -> list[float]:
    """The log-probability of each token but the first, from vLLM's prompt_logprobs: one mapping per token."""
    return [chosen[token].logprob for token, chosen in zip(tokens[1:], found[1:], strict=True)]


def refuse_guidance(policy: Policy, sampling: Sampling) -> None:
    """Raise ModelError for a policy that Q heads guide: vLLM only runs plain language models."""
    if guidance_of(policy, sampling) is not None:
        raise ModelError(
            "rollouts.engine: vllm cannot sample with Q heads: set rollouts.engine=hf, or export the policy first "
            "(lmrl export RUN FOLDER --beta B) and name that folder"
        )


def check_heads(model_config: Any) -> None:
    """On a CPU, raise ModelError for attention heads whose size vLLM would refuse only at the first token."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or model_config.use_mla:
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size, known = model_config.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if size not in known:
        raise ModelError(
            f"rollouts.engine: vllm on a CPU has no attention for heads of size {size} (it has "
            f"{', '.join(map(str, known))}): set rollouts.engine=hf, or for a model from scratch model.config.head_dim"
        )


def own_torch_random(device: torch.device) -> Any:
    """A context that leaves torch's generators as they were: vLLM seeds them, and draws from them as well as from each
    request's."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Keep what vLLM changes for the whole process as it starts: random generators, CPU threads, the environment."""
    python, numpy = random.getstate(), np.random.get_state()
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    environment = dict(os.environ)
    try:
        with own_torch_random(device):
            yield
    finally:
        torch.set_num_threads = set_threads  # vLLM on a CPU puts a function there that does nothing
        torch.set_num_threads(threads)
        if cores is not None:
            os.sched_setaffinity(0, cores)
        for name in {*os.environ, *environment}:
            if name in environment and not name.startswith("VLLM_"):
                os.environ[name] = environment[name]
            elif not name.startswith("VLLM_"):  # vLLM reads its own again later
                del os.environ[name]
        random.setstate(python)
        np.random.set_state(numpy)
