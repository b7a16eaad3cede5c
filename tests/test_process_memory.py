"""The peak of a process is its own."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from lmrl import process_memory

LARGE = "import subprocess, sys; held = bytearray(b'x') * (200 << 20); sys.exit(subprocess.call([sys.executable, '-c', sys.argv[1]]))"
SMALL = "from lmrl.process_memory import peak_resident_mb; print(peak_resident_mb())"


@pytest.mark.skipif(not process_memory.STATUS.exists(), reason="needs Linux")
def test_peak_is_not_that_of_the_process_that_started_it():
    done = subprocess.run([sys.executable, "-c", LARGE, SMALL], capture_output=True, text=True, check=True)
    assert 5 <= int(done.stdout) < 150


def test_peak_stays_after_memory_is_freed():
    """In a process of its own: this one may have had a larger peak before."""
    grown = "from lmrl.process_memory import peak_resident_mb as peak; before = peak(); bytearray(b'x') * (64 << 20)"
    done = subprocess.run(
        [sys.executable, "-c", f"{grown}; print(peak() - before)"], capture_output=True, text=True, check=True
    )
    assert 60 <= int(done.stdout) <= 70


def test_without_proc_it_is_the_largest_since_the_start(monkeypatch):
    monkeypatch.setattr(process_memory, "STATUS", Path("/nowhere/status"))
    monkeypatch.setattr(sys, "platform", "linux")
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert process_memory.peak_resident_mb() >= usage >> 10 > 0
    monkeypatch.setattr(sys, "platform", "darwin")
    assert process_memory.peak_resident_mb() <= (usage >> 20) + 1  # bytes there
