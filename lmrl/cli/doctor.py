"""`lmrl doctor`: checks of this machine, of versions, devices, memory, disk and optional packages, each with a fix."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from packaging.requirements import Requirement

from lmrl.cli.common import Debug, check_outputs, show_findings
from lmrl.extras import fix_of
from lmrl.findings import Finding
from lmrl.process_memory import CONTAINER, container_limit

GIB = 2**30
LEAST_MEMORY, LEAST_DISK, LEAST_SHARED = 4 * GIB, 5 * GIB, GIB
"""Minimums below which even small runs may fail: free RAM, disk space for checkpoints, shared memory for several
processes."""
IMPORT_SECONDS = 120
OPTIONAL = {
    "vllm": "rollouts.engine: vllm and vllm-server",
    "deepspeed": "ZeRO, by --accelerate zero2 or zero3",
    "bitsandbytes": "optimizer.name: adamw_8bit, model.quantization: nf4",
    "math_verify": "the reward lmrl.reward_models.math",
    "reasoning_gym": "environments reasoning_gym:TASK",
    "textarena": "environments textarena:GAME",
    "openenv": "environments openenv:ADDRESS",
    "verifiers": "environments verifiers:TASKSET",
    "vaderSentiment": "the recipe sentiment/ppo",
    "gguf": "model.path: FILE.gguf",
    "wandb": "tracking.trackers: [wandb]",
}
"""What each optional module is needed for."""


def command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where runs will be written")] = Path("runs"),
    to_json: Annotated[Path | None, typer.Option("--json", help="Also write the findings to this file")] = None,
    debug: Debug = False,
) -> None:
    """Check versions, devices, memory, disk and optional parts, and name fixes. Exit code 1: something is wrong."""
    check_outputs(to_json)
    show_findings(examine(output), to_json, well="ready")


def examine(folder: Path) -> Iterator[Finding]:
    """All findings about this machine. folder: where runs will be written."""
    yield Finding("Python", sys.version_info >= (3, 11), f"{sys.version.split()[0]}; lmrl needs 3.11 or newer")
    yield from packages()
    yield from devices()
    yield threads()
    yield memory()
    yield from space(folder)
    yield from optional()


def packages() -> Iterator[Finding]:
    """Installed versions against the ranges that lmrl was tested with."""
    try:
        required = [Requirement(text) for text in metadata.requires("lmrl") or ()]
    except metadata.PackageNotFoundError:
        yield Finding(
            "lmrl",
            None,
            "not installed as a package, so the tested ranges of its dependencies are unknown: pip install -e .",
        )
        return
    wrong = []
    needed = [one for one in required if one.marker is None]
    for one in needed:
        try:
            found = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{one.name} is missing")
            continue
        if not one.specifier.contains(found, prereleases=True):
            wrong.append(f"{one.name} is {found}, expected {one.specifier}")
    names = "torch", "transformers", "trl", "peft", "accelerate"
    known = ", ".join(f"{name} {metadata.version(name)}" for name in names if _has(name))
    yield Finding(
        "packages",
        not wrong,
        f"{'; '.join(wrong)}: pip install -e . in the clone of lmrl"
        if wrong
        else f"{known}, and {len(needed) - len(names)} more",
    )


def _has(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def devices() -> Iterator[Finding]:
    """Torch's build and what it can compute on."""
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU only"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        has_card = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
        fix = ": this machine has an NVIDIA card, but torch does not see it; install a build of torch for its driver (pytorch.org)"
        yield Finding(
            "device", False if has_card else None, f"the CPU (torch is built for {build}){fix if has_card else ''}"
        )
        return
    count = torch.accelerator.device_count()
    details = []
    if accelerator.type == "cuda":
        for index in range(count):
            card = torch.cuda.get_device_properties(index)
            details.append(f"{card.name}, {card.total_memory / GIB:.0f} GiB")
    yield Finding(
        "device", True, f"{count} x {accelerator.type} ({build}){': ' + '; '.join(details) if details else ''}"
    )
    if accelerator.type == "cuda":
        supported = torch.cuda.is_bf16_supported()
        yield Finding(
            "bfloat16",
            True if supported else None,
            "supported" if supported else "not in hardware: leave training.precision at float32",
        )


def threads() -> Finding:
    """Threads of torch against the cores that this process may use."""
    import torch

    cores, used = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        torch.get_num_threads(),
    )
    if used > cores:
        return Finding("threads", False, f"torch uses {used} threads on {cores} cores: export OMP_NUM_THREADS={cores}")
    return Finding(
        "threads", True, f"torch uses {used} of {cores} cores; small models are as fast with training.threads=1"
    )


def memory() -> Finding:
    """Free memory of the machine, or within the container's limit if that is less."""
    free = _free_memory()
    if free is None:
        return Finding("memory", None, "unknown on this system")
    enough = free >= LEAST_MEMORY
    return Finding(
        "memory",
        True if enough else None,
        f"{free / GIB:.1f} GiB free{'' if enough else ': enough only for tiny models'}; lmrl show RECIPE estimates what a recipe takes",
    )


def _free_memory() -> int | None:
    values = []
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        values.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    if (limit := container_limit()) is not None:
        values.append(limit - int((CONTAINER / "memory.current").read_text()))
    return min(values) if values else None


def space(folder: Path) -> Iterator[Finding]:
    """Disk for runs and for the hub's cache, and shared memory for several processes."""
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {"disk for runs": folder, "disk for hub models": Path(HF_HUB_CACHE)}
    for name, place in places.items():
        there = next(one for one in (place.resolve(), *place.resolve().parents) if one.exists())
        free = shutil.disk_usage(there).free
        enough = free >= LEAST_DISK
        yield Finding(
            name,
            True if enough else None,
            f"{free / GIB:.1f} GiB free in {place}{'' if enough else ': a checkpoint of a model of 1B weights takes 12 GiB with its optimizer'}",
        )
        if not os.access(there, os.W_OK):
            yield Finding(
                name,
                False,
                f"{there} cannot be written to: choose another folder" + ("" if place is folder else " with HF_HOME"),
            )
    if Path("/dev/shm").is_dir():
        size = shutil.disk_usage("/dev/shm").total
        enough = size >= LEAST_SHARED
        yield Finding(
            "shared memory",
            True if enough else None,
            f"{size / GIB:.1f} GiB in /dev/shm{'' if enough else ': give a container more for --processes (docker run --shm-size=8g)'}",
        )


def optional() -> Iterator[Finding]:
    """Packages that extras install; vLLM is imported, because it is often installed but broken."""
    for module, purpose in OPTIONAL.items():
        name = module.replace("_", "-")
        version = next((metadata.version(one) for one in (name, f"{name}-cpu") if _has(one)), None)
        if version is None:
            yield Finding(name, None, f"not installed; for {purpose}: {fix_of(module)}")
        elif module == "vllm":
            yield _vllm(version)
        else:
            yield Finding(name, True, f"{version}, for {purpose}")


def _vllm(version: str) -> Finding:
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import vllm"], capture_output=True, text=True, timeout=IMPORT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Finding("vllm", False, f"{version} is installed, but its import takes more than {IMPORT_SECONDS} s")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it ended without a message"])[-1]
        return Finding(
            "vllm",
            False,
            f"{version} is installed, but cannot be imported ({reason}): install the build for this machine (docs/rollouts.md)",
        )
    return Finding("vllm", True, f"{version}, for {OPTIONAL['vllm']}")
