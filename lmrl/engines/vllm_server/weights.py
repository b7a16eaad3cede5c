"""How weights reach servers: a file in shared memory, or NCCL's broadcast from GPU to GPU."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import socket
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lmrl.engines.vllm_server.client import Client, ServerLost
from lmrl.errors import EngineError

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""As the safetensors format calls them."""
PREFIX, LOCK = "lmrl-weights-", "lock"
ENTRY_BYTES = 160
"""Bytes for one tensor's entry in the header, besides its name."""

Weights = Callable[[], Iterator[tuple[str, torch.Tensor]]]


class WeightFiles:
    """Files with the policy's weights, in shared memory where there is any; only the newest one is kept.

    It is kept until the next one comes, so that a restarted server can load it. parent: where the folder of files is
    made (None: in shared memory, if as much as `need` bytes are free there, else in the temporary folder). Folders that
    a killed run has left there are removed.
    """

    def __init__(self, parent: Path | None = None, need: int = 0) -> None:
        memory, disk = Path("/dev/shm"), Path(tempfile.gettempdir())
        parent = parent or (memory if memory.is_dir() and shutil.disk_usage(memory).free > need else disk)
        for left in parent.glob(f"{PREFIX}*"):
            _remove_if_left(left)
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock = open(self.folder / ".lock", "w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        (self.folder / ".lock").rename(self.folder / LOCK)  # a file of this name is always locked

    def write(self, weights: Weights, names: Sequence[str], version: str) -> Path:
        """names: of all tensors, or of more, from which the size of the header is estimated."""
        path = self.folder / f"{version}.safetensors"
        if path.exists():  # a server may be reading it
            return path
        for older in self.folder.glob("*.safetensors"):
            older.unlink()  # first, so that there is room; a reader keeps the open file
        part = path.with_suffix(".part")
        try:
            write_safetensors(part, weights(), sum(len(name) + ENTRY_BYTES for name in names))
        except OSError as error:
            part.unlink(missing_ok=True)
            raise EngineError(
                f"the weights for the servers cannot be written to {self.folder} ({error.strerror}): make room there"
            ) from error
        return part.rename(path)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


def _remove_if_left(folder: Path) -> None:
    """Remove a folder of weights whose run has ended: its lock went with the run."""
    with contextlib.suppress(OSError):  # in use, another user's, or removed meanwhile
        with open(folder / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)


def write_safetensors(path: Path, tensors: Iterator[tuple[str, torch.Tensor]], room: int) -> None:
    """Write tensors to a safetensors file one at a time, so that merged weights never exist all at once.

    room: bytes kept free for the header, which is written last and padded with spaces, as the format allows.
    """
    room += -room % 8
    header: dict[str, Any] = {}
    with open(path, "wb") as file:
        file.seek(8 + room)
        end = 0
        for name, tensor in tensors:
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            begin, end = end, end + data.nbytes
            header[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
            file.write(data.data)
        text = json.dumps(header).encode()
        if len(text) > room:
            raise ValueError(f"the header needs {len(text)} bytes, but only {room} were kept free")
        file.seek(0)
        file.write(room.to_bytes(8, "little") + text.ljust(room))


@dataclass(frozen=True)
class Member:
    """A server in a broadcast: how many workers it has, and the group that it reports."""

    client: Client
    workers: int
    group: str | None = None


class ControlPlane:
    """Relays the messages of vLLM's trainer side to all servers of a broadcast at the same time.

    It has the methods of vLLM's `VLLMWeightSyncClient` (vllm/distributed/weight_transfer/base.py).
    """

    def __init__(self, members: Sequence[Member]):
        self.members = members

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every worker gets its own rank: the policy is 0, and the servers follow one after the other."""
        bodies, offset = [], init_info["rank_offset"]
        for member in self.members:
            bodies.append({"init_info": init_info | {"rank_offset": offset}})
            offset += member.workers
        self._post_all("/init_weight_transfer_engine", bodies)

    def start_weight_update(self) -> None:
        self._post_all("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._post_all("/update_weights", [{"update_info": update_info}] * len(self.members))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post_all("/finish_weight_update")

    def _post_all(self, path: str, bodies: list[dict[str, Any]] | None = None) -> None:
        with ThreadPoolExecutor(len(self.members)) as threads:
            bodies = bodies or [{}] * len(self.members)
            list(threads.map(lambda member, body: member.client.post(path, body), self.members, bodies))


class Broadcast:
    """NCCL's broadcast of the policy's weights into the GPUs of servers, by vLLM's own weight transfer.

    It has been written against vLLM's interface and has not run on GPUs yet. A server that dies while weights are being
    sent leaves NCCL waiting, as it does in any training with NCCL.
    """

    def __init__(self, weights: Weights):
        self.weights = weights
        self.group: str | None = None
        """Name of the current process group."""
        self.members: tuple[Member, ...] = ()
        self._engine: Any = None

    def send(self, members: Sequence[Member], version: str) -> None:
        """Send the weights. The group is formed anew if servers have joined, left or been restarted."""
        if tuple(members) != self.members or any(member.group != self.group for member in members):
            self.close()
            members = [replace(member, group=version) for member in members]
            self._engine, self.members, self.group = self._join(members), tuple(members), version
        try:
            self._engine.send_weights()
            for member in members:
                member.client.name(version, self.group)
        except BaseException:
            self.group = None  # nothing is known of the others any more
            raise

    def _join(self, members: Sequence[Member]) -> Any:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        found = [address_towards(member.client.url) for member in members]
        address = next((one for one in found if not one.startswith("127.")), found[0])  # one that all servers can reach
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = probe.getsockname()[1]
        info = NCCLTrainerInitInfo(
            master_address=address,
            master_port=port,
            world_size=1 + sum(member.workers for member in members),
            rank=0,
        )
        return NCCLTrainerWeightTransferEngine.trainer_init(
            info, client=ControlPlane(members), source=weight_source(self.weights)
        )

    def close(self) -> None:
        if self._engine is not None:
            for member in self.members:
                with contextlib.suppress(ServerLost):
                    member.client.post("/shutdown_weight_transfer_engine", {})
            self._engine.shutdown()
        self._engine, self.members, self.group = None, (), None


def weight_source(weights: Weights) -> Any:
    """The weights as vLLM's `WeightSource`."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):  # type: ignore[misc]  # vLLM has no types
        def __init__(self) -> None:
            self._metadata = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights()]

        def metadata(self) -> list[ParamMeta]:
            return self._metadata

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return weights()

    return Source()


def address_towards(url: str) -> str:
    """The address by which this machine is reached from a server: the loopback one for a server on the same machine."""
    parts = urllib.parse.urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))
        address: str = probe.getsockname()[0]
        return address
