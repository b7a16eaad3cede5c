"""A worker process of lmrl.rewards.workers: loads one reward function, and scores batches until its parent ends."""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import Any

from lmrl.errors import LmrlError, RewardError
from lmrl.parent_process import when_parent_ends
from lmrl.recipe import Reward
from lmrl.rewards.load import NEEDS, local_call, origin_of
from lmrl.rewards.rewards import checked_values, is_temporary
from lmrl.rewards.workers import packed, receive, send
from lmrl.secrets import redact


def main() -> None:
    when_parent_ends(os.getppid(), lambda: os.killpg(0, signal.SIGKILL))  # with all that it has started
    channel = socket.socket(fileno=int(sys.argv[1]))
    order = receive(channel)
    spec = Reward.model_validate(order["spec"])
    if spec.memory_mb is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (spec.memory_mb << 20, spec.memory_mb << 20))
    try:
        call, origin = local_call(spec, order["key"]), origin_of(spec)
        needs = getattr(call, NEEDS)
    except LmrlError as error:
        send(channel, {"plugin_error": redact(str(error))})
        return
    send(channel, {"needs": needs})
    while True:
        try:
            arguments = receive(channel)
        except (EOFError, OSError):
            return
        try:
            answer: dict[str, Any] = {
                "values": packed(checked_values(origin, call(**arguments), len(arguments["prompts"])))
            }
        except RewardError as error:
            answer = {"mistake": redact(str(error))}
        except (Exception, SystemExit) as error:
            answer = {"raised": redact(f"{type(error).__name__}: {error}"), "temporary": is_temporary(error)}
        send(channel, answer)


if __name__ == "__main__":
    main()
