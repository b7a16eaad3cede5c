"""How weights reach servers: files, and a broadcast's messages."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmrl.engines.vllm_server import weights as server_weights
from lmrl.engines.vllm_server.weights import ControlPlane, Member, WeightFiles, weight_source, write_safetensors
from lmrl.errors import EngineError
from lmrl.policy.merged import merged_weights
from tests.conftest import needs_vllm


def test_a_file_is_written_piece_by_piece(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "b.weight": torch.randn(7).bfloat16(),
        "c": torch.tensor(2.0),
        "d": torch.randn(4, 6).half().t(),
    }
    write_safetensors(tmp_path / "x.safetensors", iter(tensors.items()), room=1000)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    with pytest.raises(ValueError, match="header needs"):
        write_safetensors(tmp_path / "y.safetensors", iter(tensors.items()), room=8)


def test_weights_without_room_are_one_line(tmp_path, monkeypatch):
    files = WeightFiles(tmp_path)
    first = files.write(lambda: iter([("a", torch.ones(3))]), ["a"], "one")

    def full(path, tensors, room):
        path.write_bytes(b"a part of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(server_weights, "write_safetensors", full)
    assert files.write(lambda: iter([]), ["a"], "one") == first  # is there already, and may be read just now
    with pytest.raises(EngineError, match=r"cannot be written to .* \(No space left on device\): make room there"):
        files.write(lambda: iter([]), ["a"], "two")
    assert [path.name for path in files.folder.iterdir()] == ["lock"]
    files.close()


def test_shared_memory_that_is_too_small_is_not_used():
    files = WeightFiles(need=2**60)
    assert files.folder.parent == Path(tempfile.gettempdir())
    files.close()


def test_stale_weight_files_are_removed_and_live_ones_kept(tmp_path):
    child = os.fork()
    if child == 0:
        WeightFiles(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    files = WeightFiles(tmp_path)
    others = WeightFiles(tmp_path)
    assert not left.exists() and files.folder.exists()
    files.close()
    others.close()
    assert not list(tmp_path.iterdir())


class Listener:
    """Stands for a client, and keeps what it is asked to post."""

    def __init__(self) -> None:
        self.posted: list[tuple[str, dict]] = []

    def post(self, path: str, body: dict) -> dict:
        self.posted.append((path, body))
        return {}


@needs_vllm
def test_broadcast_messages_have_vllms_format(tiny_policy):
    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLTrainerWeightTransferEngine,
        NCCLWeightTransferUpdateInfo,
    )

    members = [Member(Listener(), 2), Member(Listener(), 1)]
    plane = ControlPlane(members)
    assert isinstance(plane, VLLMWeightSyncClient)
    plane.init_weight_transfer_engine(
        {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 4, "packed": True}
    )
    infos = [NCCLWeightTransferInitInfo(**member.client.posted[0][1]["init_info"]) for member in members]
    assert [(info.rank_offset, info.world_size) for info in infos] == [(1, 4), (3, 4)]

    source = weight_source(lambda: merged_weights(tiny_policy))
    checked = list(NCCLTrainerWeightTransferEngine._checked_iter(source, source.metadata()))
    assert len(checked) == len(list(merged_weights(tiny_policy)))
    plane.start_weight_update()
    plane.update_weights(
        {
            "names": [one.name for one in source.metadata()],
            "dtype_names": [str(one.dtype).split(".")[-1] for one in source.metadata()],
            "shapes": [list(one.shape) for one in source.metadata()],
        }
    )
    plane.finish_weight_update()
    paths = [path for path, _ in members[1].client.posted]
    assert paths == ["/init_weight_transfer_engine", "/start_weight_update", "/update_weights", "/finish_weight_update"]
    NCCLWeightTransferUpdateInfo(**members[1].client.posted[2][1]["update_info"])
