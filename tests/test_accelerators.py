"""Which device is chosen, and its properties; without an accelerator, with stubs of torch."""

import pytest
import torch

from lmrl import accelerators
from lmrl.training.monitoring import bundle, measures


def test_without_one_it_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    assert accelerators.default_device() == torch.device("cpu") and not accelerators.has_memory()


@pytest.mark.parametrize(("kind", "has_memory"), [("cuda", True), ("xpu", True), ("npu", True), ("mps", False)])
def test_any_kind_is_taken(monkeypatch, kind, has_memory):
    class Device:
        type = kind

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: Device)
    assert accelerators.default_device() is Device and accelerators.has_memory() is has_memory
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda: 7 << 20)
    assert (measures.peak_memory_mb() == 7) is has_memory


def test_copies_to_cuda_do_not_wait():
    class OnCPU:
        device, moves = torch.device("cpu"), []

        def pin_memory(self):
            self.moves.append("pinned")
            return self

        def to(self, device, **options):
            self.moves.append((device.type, options))
            return self

    for kind in ("cuda", "cpu"):
        accelerators.to_device(OnCPU(), torch.device(kind))
    assert OnCPU.moves == ["pinned", ("cuda", {"non_blocking": True}), ("cpu", {})]


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_a_real_one_is_counted_and_its_generator_restored():
    device = accelerators.default_device()
    torch.zeros(2**20, device=device)
    assert measures.peak_memory_mb() >= 4
    limits = bundle.memory_limits(device)
    assert limits["total_mb"] >= limits["free_mb"] > 0 and limits["device"] != device.type
    state = bundle.rng_state(device)
    first = torch.rand(3, device=device)
    bundle.set_rng_state(state, device)
    assert torch.equal(first, torch.rand(3, device=device))
