"""Which accelerators each run of a sweep sees; without any by stubs."""

from types import SimpleNamespace

import pytest

from lmrl.training import devices, sweep
from lmrl.training.devices import Slots, deal, slots_here, variable_of, visible


@pytest.mark.parametrize(
    ("count", "jobs", "dealt"),
    [
        (4, 4, ["0", "1", "2", "3"]),
        (4, 2, ["0,1", "2,3"]),
        (5, 2, ["0,1", "2,3"]),
        (2, 5, ["0", "1", "0", "1", "0"]),
        (1, 3, ["0", "0", "0"]),
    ],
)
def test_devices_are_dealt(count, jobs, dealt):
    numbers = [str(number) for number in range(count)]
    assert [",".join(deal(numbers, jobs, slot)) for slot in range(jobs)] == dealt


def test_a_run_takes_the_place_that_became_free():
    slots = Slots(2, "CUDA_VISIBLE_DEVICES", ["4", "7"])
    assert slots.take("a") == {"CUDA_VISIBLE_DEVICES": "4"} and slots.take("b") == {"CUDA_VISIBLE_DEVICES": "7"}
    slots.free("b")
    assert slots.take("c") == {"CUDA_VISIBLE_DEVICES": "7"}
    slots.free("a")
    assert slots.take("d") == {"CUDA_VISIBLE_DEVICES": "4"}


def test_one_run_at_a_time_sees_them_all():
    assert Slots(1, "CUDA_VISIBLE_DEVICES", ["0", "1"]).take("a") == {}
    assert Slots(3).take("a") == {}


def test_names_are_those_of_the_environment():
    assert visible("CUDA_VISIBLE_DEVICES", {"CUDA_VISIBLE_DEVICES": "GPU-a, 3,-1"}, 2) == ["GPU-a", "3"]
    assert visible("CUDA_VISIBLE_DEVICES", {}, 3) == ["0", "1", "2"]
    assert variable_of("cuda") == "CUDA_VISIBLE_DEVICES" and variable_of("cuda", "6.4") == "HIP_VISIBLE_DEVICES"
    assert variable_of("xpu") == "ZE_AFFINITY_MASK" and variable_of("cpu") is None and variable_of("mps") is None


@pytest.mark.parametrize(("kind", "seen"), [("cuda", ["5", "6"]), ("cpu", [])])
def test_the_machine_is_asked(monkeypatch, kind, seen):
    monkeypatch.setattr(devices, "default_device", lambda: SimpleNamespace(type=kind))
    monkeypatch.setattr(devices.torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    assert list(slots_here(2).devices) == seen


def test_runs_of_a_sweep_get_their_own(tmp_path, monkeypatch):
    """Four runs, two at a time, on two devices: no two that go on together see the same one."""
    seen, active = [], []

    class Process:
        returncode = 1

        def __init__(self, command, env, **more):
            self.device, self.polls = env.get("CUDA_VISIBLE_DEVICES"), 0
            assert self.device not in active
            active.append(self.device)
            seen.append(self.device)

        def poll(self):
            self.polls += 1
            if self.polls < 2:
                return None
            active.remove(self.device)
            return 1

    monkeypatch.setattr(sweep, "slots_here", lambda jobs: Slots(jobs, "CUDA_VISIBLE_DEVICES", ["0", "1"]))
    monkeypatch.setattr(sweep.subprocess, "Popen", Process)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.01)
    with pytest.raises(sweep.SweepError, match="4 of 4 runs failed"):
        sweep.sweep("random_walks/bc", [], ["training.seed=0,1,2,3"], tmp_path / "sweep", jobs=2)
    assert seen == ["0", "1", "0", "1"]
