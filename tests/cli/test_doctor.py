"""`lmrl doctor` on simulated machines."""

import os
import shutil
import sys
from collections import namedtuple
from importlib import metadata

import pytest
import torch

from lmrl.cli import doctor
from lmrl.findings import show

Usage = namedtuple("Usage", "total used free")


def test_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "OPTIONAL", {"deepspeed": "ZeRO", "not_there": "nothing"})
    found = {one.name: one for one in doctor.examine(tmp_path / "runs")}
    assert found["Python"].passed and found["packages"].passed, found
    assert found["not-there"].passed is None and "pip install not-there" in found["not-there"].detail
    assert {"device", "threads", "memory", "disk for runs"} <= set(found)
    assert show([found["Python"]], well="ready") == [found["Python"]]


def test_versions_out_of_range(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=99", "no-such-thing", 'vllm>=1; extra == "vllm"'])
    (finding,) = doctor.packages()
    assert finding.passed is False
    assert (
        f"torch is {metadata.version('torch')}, expected >=99" in finding.detail
        and "no-such-thing is missing" in finding.detail
    )
    assert "vllm" not in finding.detail and "pip install -e ." in finding.detail


def test_a_card_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    (finding,) = doctor.devices()
    assert finding.passed is False and "torch does not see it" in finding.detail


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_too_many_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert doctor.threads().passed is False and "OMP_NUM_THREADS=1" in doctor.threads().detail


def test_little_room(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "_free_memory", lambda: 2**30)
    assert doctor.memory().passed is None and "1.0 GiB free" in doctor.memory().detail
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(2**20, 0, 2**20))
    details = {one.name: one for one in doctor.space(tmp_path)}
    assert details["disk for runs"].passed is None and "0.0 GiB free" in details["disk for runs"].detail
    assert "shared memory" not in details or "--shm-size" in details["shared memory"].detail


def test_a_vllm_that_does_not_start(monkeypatch):
    monkeypatch.setattr(doctor, "IMPORT_SECONDS", 60)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert doctor._vllm("1.0").passed is False and "cannot be imported" in doctor._vllm("1.0").detail
