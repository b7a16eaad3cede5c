"""Supervising servers: start them, load the right weights, restart them if they are lost."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from lmrl.engines.vllm_server.client import Client, Description, RequestRefused, RequestTimeout, ServerLost
from lmrl.engines.vllm_server.process import ServerProcess
from lmrl.errors import EngineError, LmrlError, ModelError

logger = logging.getLogger(__name__)
POLL_DOWN, POLL_UP = 0.2, 5.0
"""Seconds between checks of a server that is out of service, and of one that is in service."""


@dataclass(frozen=True)
class Target:
    """The weights that a server should hold. path: a file with them; None if they are sent another way."""

    version: str
    path: Path | None = None


class ServerSupervisor(threading.Thread):
    """Supervises one server.

    A server is in service (`in_service`) while it holds the target's weights. Code that loses a request to it calls
    `mark_lost`; the supervisor then restarts the server or waits for it. If it gives up, `failure` says why. `changed`
    is notified of every change of state.
    """

    def __init__(
        self,
        client: Client,
        changed: threading.Condition,
        start_timeout: float,
        owner: bool = True,
        process: ServerProcess | None = None,
        restarts: int = 0,
    ):
        """owner: True if this process sends the server its weights; otherwise it waits until another one has."""
        super().__init__(daemon=True, name=f"supervisor of {client.url}")
        self.client, self.changed, self.start_timeout, self.owner = client, changed, start_timeout, owner
        self.process, self.restarts_left = process, restarts
        self.target: Target | None = None
        self.description: Description | None = None
        self.in_service, self.needs_file = False, False
        self.failure: LmrlError | None = None
        self.cause = "it has not answered yet"
        self.answers = False
        """True if it has answered since it was last started or lost."""
        self.described = False
        """True if it has answered since the target was last set, and since it was last started or lost."""
        self._answered = 0.0
        self._since = time.monotonic()
        self._look, self._closed = threading.Event(), False

    @property
    def known(self) -> Description:
        """How the server describes itself; for one that has answered."""
        assert self.description is not None, "the server has not answered yet"
        return self.description

    # ---------------------------------------------------------------------------------------- called by other threads
    def set_target(self, target: Target | None) -> None:
        """Take the server out of service until it holds these weights (None: until a target is set)."""
        with self.changed:
            self.target, self.in_service, self.needs_file, self.described = target, False, False, False
            self._since = time.monotonic()
        self._look.set()

    def mark_lost(self, cause: str) -> None:
        """Take the server out of service, because a request to it was lost."""
        with self.changed:
            if self.in_service:
                self._since = time.monotonic()
            self.in_service, self.cause = False, cause
            self.changed.notify_all()
        if threading.current_thread() is not self:  # which checks again after a pause
            self._look.set()

    def close(self) -> None:
        """Stop supervising, and stop the server if the run started it."""
        self._closed = True
        self._look.set()
        self.client.hang_up(completions_only=False)
        if self.is_alive():
            self.join(timeout=5)
        if self.process is not None:
            self.process.stop()

    # ------------------------------------------------------------------------------------------------ the thread itself
    def run(self) -> None:
        try:
            self._supervise()
        except LmrlError as error:
            self._give_up(error)
        except Exception as error:  # a full disk or a bug here must not leave the other threads waiting
            self._give_up(EngineError(f"supervising {self.client.url} failed: {type(error).__name__}: {error}"))

    def _supervise(self) -> None:
        if self.process is not None:
            self.process.start()
        while not self._closed and self.failure is None:
            try:
                self._step()
            except ServerLost as lost:
                self.mark_lost(str(lost))
                busy = isinstance(lost, RequestTimeout) and time.monotonic() - self._answered < self.client.timeout
                if not (self.answers and busy):  # it may be inside a long step of its engine
                    self._restart_or_wait()
                    self.answers = self.described = False
            self._look.wait(POLL_UP if self.in_service else POLL_DOWN)
            self._look.clear()

    def _step(self) -> None:
        """Ask which weights the server holds, and load the target's if they differ."""
        if self.process is not None and self.process.ended:
            raise ServerLost(f"{self.client.url} {self.process.last_words()}")
        target = self.target
        if target is None and self.described:
            return
        description = self.client.describe()
        self._answered = time.monotonic()
        with self.changed:
            self.description, self.answers, self.described = description, True, self.target is target
            self.changed.notify_all()
        if target is None:
            return
        if description.version != target.version:
            if not self.owner:
                raise ServerLost(f"{self.client.url} holds weights '{description.version}', not yet '{target.version}'")
            if target.path is None:
                with self.changed:
                    self.in_service, self.needs_file = False, self.target is target
                    self.changed.notify_all()
                return
            self._load(target.path, target)
        with self.changed:
            self.in_service = self.target is target
            self.changed.notify_all()

    def _load(self, path: Path, target: Target) -> None:
        try:
            self.client.load(path, target.version)
        except RequestRefused as refused:
            if self.target is not target:
                return  # the file has been replaced meanwhile
            raise EngineError(
                f"{refused} (a server on another machine, or in a container, does not see the file: set "
                "rollouts.server.transfer=nccl)"
            ) from refused

    def _restart_or_wait(self) -> None:
        """Restart a lost server if the run started it; otherwise wait for it to return."""
        late = time.monotonic() - self._since > self.start_timeout
        if self.process is None:
            if late:
                self._give_up(EngineError(f"{self.cause}; waited {self.start_timeout:g} s (start_timeout)"))
        elif self.process.ended or self.answers or late:
            self.process.ends_within(1)
            words = self.process.last_words()
            if self.description is None:
                self._give_up(ModelError(f"a server did not start: {self.client.url} {words}"))
            elif self.restarts_left == 0:
                self._give_up(EngineError(f"a server was lost, and no restart is left: {self.client.url} {words}"))
            elif not self._closed:
                self.restarts_left -= 1
                logger.warning(
                    "server %s is started again (%d restarts left): %s", self.client.url, self.restarts_left, self.cause
                )
                self._since = time.monotonic()
                self.process.kill()
                self.process.start()

    def _give_up(self, error: LmrlError) -> None:
        if self.process is not None:
            self.process.kill()
        with self.changed:
            self.in_service, self.failure = False, error
            self.changed.notify_all()
