"""The wheels that a bare machine with torch and transformers lacks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WHEELS = (
    "pydantic==2.14.4", "pydantic-core==2.50.5", "annotated-types", "typing-inspection", "gymnasium>=1.2,<2",
    "farama-notifications", "cloudpickle", "datasets==5.2.0", "multiprocess", "dill", "trl==1.16.0", "peft>=0.21,<0.22",
)  # fmt: skip


def wheels(folder: Path) -> None:
    """Fetch the wheels for Python 3.12 on x86-64."""
    platforms = [f"--platform=manylinux{name}_x86_64" for name in ("_2_28", "_2_17", "2014")]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version=3.12",
    ]
    subprocess.run([*command, *platforms, "-d", str(folder), *WHEELS], check=True)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    print(f"{len(list(folder.iterdir()))} wheels, {size:.1f} MiB")
