"""The `vllm-server` engine: sampling from vLLM servers, given by address or started by the run.

All ranks of a run share the servers. One rank owns them: it starts them and sends them the weights; the others get
`engine.shared` and only sample.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from lmrl import distributed
from lmrl.coroutines import POLL, post
from lmrl.engines.base import Engine, Request
from lmrl.engines.vllm_server.client import Client, ServerLost
from lmrl.engines.vllm_server.dispatch import Dispatcher, Job
from lmrl.engines.vllm_server.process import ServerProcess, gpus_of
from lmrl.engines.vllm_server.supervisor import ServerSupervisor, Target
from lmrl.engines.vllm_server.weights import Broadcast, Member, WeightFiles
from lmrl.errors import EngineError, LmrlError, ModelError, RunError
from lmrl.policy.merged import merged_weights
from lmrl.policy.policy import Policy
from lmrl.policy.quantized import plain_config
from lmrl.recipe import Rollouts
from lmrl.recipe.server import Server
from lmrl.seeding import key


class VLLMServerEngine(Engine):
    """Samples from servers, and supervises them: see lmrl/engines/vllm_server/supervisor.py.

    folder: where `servers/server-N.log` goes (None: a temporary folder). shared: the owner's `shared`, on every other
    rank. Servers start with the first `refresh` of the owner. Raises ModelError for a policy guided by Q heads.
    """

    is_remote = True

    def __init__(
        self,
        policy: Policy,
        options: Server,
        folder: Path | None = None,
        check: Callable[[], None] = lambda: None,
        shared: dict[str, Any] | None = None,
    ):
        super().__init__(policy, check)
        if policy.guidance is not None:
            raise ModelError(
                "engine 'vllm-server' samples from the language model alone, but Q heads guide this policy: set "
                "rollouts.engine=hf"
            )
        self.options, self.owner = options, shared is None
        self.run_id = uuid.uuid4().hex[:12] if shared is None else shared["run"]
        self.scratch = Path(tempfile.mkdtemp(prefix="lmrl-server-"))
        self.files: WeightFiles | None = None
        self.broadcast = Broadcast(self.weights)
        self.changed = threading.Condition()
        processes: list[ServerProcess] = []
        if self.owner and not options.urls:
            processes = [self._process(index, (folder or self.scratch) / "servers") for index in range(options.count)]
        urls = shared["urls"] if shared else options.urls or [process.url for process in processes]
        patience = options.start_timeout
        if not self.owner and not options.urls:  # as long as the owner may start servers again
            patience = patience * (1 + options.restarts) + options.timeout
        self.supervisors = [
            ServerSupervisor(
                Client(url, options.timeout), self.changed, patience, self.owner, process, options.restarts
            )
            for url, process in zip_longest(urls, processes)
        ]
        self._dispatcher: Dispatcher | None = None
        self._asked: set[Request] = set()
        self.closed = False
        atexit.register(self.close)

    @classmethod
    def build(
        cls, policy: Policy, options: Rollouts, check: Callable[[], None], folder: Path | None
    ) -> VLLMServerEngine:
        server = options.server
        if not server.urls and distributed.size() > int(os.environ.get("LOCAL_WORLD_SIZE", distributed.size())):
            raise RunError(
                "rollouts.engine=vllm-server: servers that a run starts can be reached only from their own machine, and this "
                "launch has several: start them by hand, and name them in rollouts.server.urls (docs/rollouts_server.md)"
            )
        if not distributed.is_main():
            return cls(policy, server, folder, check, shared=distributed.broadcast(None))
        engine = cls(policy, server, folder, check)
        distributed.broadcast(engine.shared)
        return engine

    def _process(self, index: int, logs: Path) -> ServerProcess:
        options, model = self.options, self.scratch / "model"
        if not model.exists():
            save_skeleton(self.policy, model)
        gpus: tuple[str, ...] = ()
        if torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            gpus = gpus_of(index, options.count, options.tensor_parallel_size, visible.split(","), ranks)
        length = options.max_model_len or self.policy.max_length
        return ServerProcess(options, model, length, gpus, logs / f"server-{index}.log")

    @property
    def shared(self) -> dict[str, Any]:
        """Plain data to broadcast to the engines of other ranks."""
        return {"run": self.run_id, "urls": [supervisor.client.url for supervisor in self.supervisors]}

    # --------------------------------------------------------------------------------------------------------- weights
    def sync(self) -> None:
        """Have all servers load the policy's weights. On ranks other than the owner's: accept only these weights."""
        version = f"{self.run_id}-{self.syncs + 1}"
        for supervisor in self.supervisors:
            supervisor.set_target(None)
            if supervisor.ident is None:
                supervisor.start()
        path = None
        broadcasts = self.owner and self._broadcasts()
        if broadcasts:
            try:
                self.broadcast.send([member_of(supervisor) for supervisor in self._alive()], version)
            except ServerLost as lost:
                raise EngineError(f"weights could not be broadcast ({lost}): resume the run with --resume") from lost
        if self.owner and (not broadcasts or distributed.size() > 1):
            # In addition to a broadcast: for a server that is restarted while this process waits for the others.
            path = self._write(version)
        for supervisor in self.supervisors:
            supervisor.set_target(Target(version, path))
        self._wait(self._ready)
        for supervisor in self.supervisors:
            if supervisor.in_service:
                self._check_match(supervisor)

    def _ready(self) -> bool:
        """True if sampling may begin: it waits for servers given by address, not for servers that are still
        starting."""
        waits = self.owner and self.options.urls
        left = self._alive()
        return any(one.in_service for one in left) and all(one.in_service or not (waits or one.answers) for one in left)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which weights are sent: that of started servers; servers given by address may have any."""
        return torch.float32 if self.options.urls else getattr(torch, self.options.dtype)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The policy's weights as the servers get them."""
        for name, tensor in merged_weights(self.policy):
            yield name, tensor.to(self.dtype)

    def _write(self, version: str) -> Path:
        if self.files is None:
            numbers, _ = self.policy.size
            self.files = WeightFiles(need=numbers * self.dtype.itemsize)
        names = [name for name, _ in self.policy.causal_lm.named_parameters()]
        return self.files.write(self.weights, names, version)

    def _broadcasts(self) -> bool:
        """True if weights go from GPU to GPU. Raises ModelError if they should and cannot."""
        if self.options.transfer == "files" or (self.options.transfer == "auto" and self.policy.device.type != "cuda"):
            return False
        self._wait(lambda: all(supervisor.described for supervisor in self._alive()))
        descriptions = [supervisor.known for supervisor in self._alive()]
        own = torch.cuda.get_device_properties(self.policy.device).uuid if self.policy.device.type == "cuda" else None
        lacks = ""
        if own is None:
            lacks = f"the policy is on '{self.policy.device}'"
        elif any(description.transfer != "nccl" for description in descriptions):
            lacks = """a server was started without --weight-transfer-config='{"backend": "nccl"}'"""
        elif any(str(own) in description.gpus for description in descriptions):
            lacks = "a server shares its GPU with the policy"
        if lacks and self.options.transfer == "nccl":
            raise ModelError(f"rollouts.server.transfer=nccl: {lacks}; set it to files, or to auto")
        return not lacks

    def _check_match(self, supervisor: ServerSupervisor) -> None:
        lm: Any = self.policy.causal_lm
        ours, theirs = lm.config.get_text_config(), supervisor.known
        if (ours.model_type, ours.vocab_size) != (theirs.model_type, theirs.vocabulary):
            raise ModelError(
                f"{supervisor.client.url} serves a {theirs.model_type} with {theirs.vocabulary} tokens, but the policy is a "
                f"{ours.model_type} with {ours.vocab_size}: serve the model of model.path"
            )

    # -------------------------------------------------------------------------------------------------------- sampling
    @property
    def busy(self) -> bool:
        return self._dispatcher is not None and self._dispatcher.unanswered > 0

    async def advance(self, arrived: list[Request]) -> None:
        """Send what has arrived, and wait until there is an answer, a new request, or a moment has passed."""
        self._news.clear()
        if self._dispatcher is None:
            self._dispatcher = Dispatcher(self.supervisors, self.options.in_flight, self.changed)
        for request in arrived:
            self._dispatcher.put(self._job(request))
        self._watch()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), POLL)

    def _job(self, request: Request) -> Job:
        loop, version, eos = asyncio.get_running_loop(), f"{self.run_id}-{self.syncs}", self.policy.eos_ids
        syncs, tokens, sampling = self.syncs, request.tokens, request.sampling
        self._asked.add(request)

        def ask(supervisor: ServerSupervisor) -> Any:
            if sampling is None:
                return supervisor.client.score(tokens, version)
            completion = supervisor.client.complete(tokens, sampling, key(*request.key) % 2**63, eos, version)
            completion.version = syncs
            return completion

        def take(answer: Any, error: LmrlError | None) -> None:
            self._asked.discard(request)
            request.answer(answer) if error is None else request.fail(error)
            self._news.set()

        return Job(ask, lambda answer, error: post(loop, take, answer, error))

    def idle(self) -> None:
        if self._dispatcher is not None:
            self._dispatcher.close()
            self._dispatcher = None

    def abandon(self) -> list[Request]:
        left, self._asked = list(self._asked), set()
        self.idle()
        return left

    def validate(self, request: Request) -> None:
        limits = [supervisor.description.max_model_len for supervisor in self._alive() if supervisor.description]
        limit = min([*limits, *([self.policy.max_length] if self.policy.max_length else [])])
        longest, sampling = len(request.tokens), request.sampling
        if sampling is None:
            if longest >= limit:
                raise ModelError(
                    f"{longest} tokens cannot be scored: the servers have {limit} positions, and need one more than these: "
                    "raise the servers' max_model_len"
                )
        elif longest + sampling.max_new_tokens > limit:
            raise ModelError(
                f"a context of {longest} tokens and max_new_tokens={sampling.max_new_tokens} need "
                f"{longest + sampling.max_new_tokens} positions, but the servers have {limit}: lower "
                "rollouts.max_new_tokens, shorten the context (task.prompts.max_tokens, task.history), or raise the servers' "
                "max_model_len"
            )

    def _alive(self) -> list[ServerSupervisor]:
        return [supervisor for supervisor in self.supervisors if supervisor.failure is None]

    def _watch(self) -> None:
        """Called while waiting for servers: raises if waiting is pointless, and writes the weights that a server
        needs."""
        self.check()
        gone = [supervisor.failure for supervisor in self.supervisors if supervisor.failure]
        for error in gone:
            if isinstance(error, ModelError) or len(gone) == len(self.supervisors):
                raise error
        if self.weights_pinned:  # the policy has changed since, so no copy of the pinned weights is left
            if all(supervisor.needs_file for supervisor in self._alive()):
                raise EngineError(
                    "all servers were restarted while the policy was training, and the weights they sampled with are lost: "
                    "resume the run with --resume"
                )
        elif any(supervisor.needs_file for supervisor in self.supervisors):  # started again after a broadcast
            target = self.supervisors[0].target
            assert target is not None, "a server needs the target's weights"
            path = self._write(target.version)
            for supervisor in self.supervisors:
                if supervisor.needs_file:
                    supervisor.set_target(Target(target.version, path))

    def _wait(self, done: Callable[[], bool]) -> None:
        while True:
            self._watch()
            with self.changed:
                if self.changed.wait_for(done, timeout=0.1):
                    return

    def close(self) -> None:
        """End the servers that the run has started, and leave no files."""
        if self.closed:
            return
        self.closed = True
        self.abandon()
        atexit.unregister(self.close)
        self.broadcast.close()
        for supervisor in self.supervisors:
            supervisor.close()
        if self.files is not None:
            self.files.close()
        shutil.rmtree(self.scratch, ignore_errors=True)


def member_of(supervisor: ServerSupervisor) -> Member:
    return Member(supervisor.client, supervisor.known.workers, supervisor.known.group)


def save_skeleton(policy: Policy, folder: Path) -> None:
    """A model folder without weights: config and tokenizer, of which a server is started."""
    lm = policy.causal_lm
    config = plain_config(lm)
    config.architectures = [type(lm).__name__]
    config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
