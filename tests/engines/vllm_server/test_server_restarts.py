"""Servers that the engine starts itself: one that is killed is started again."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from lmrl.engines.vllm_server.engine import VLLMServerEngine
from lmrl.errors import EngineError, ModelError
from lmrl.recipe.server import Server
from tests.engines.vllm_server import fake_server
from tests.engines.vllm_server.conftest import complete, generate, living, wait_for


@pytest.fixture
def started(tiny_policy, tmp_path, monkeypatch):
    """Builds engines that start the fake server, or a command of the test's, in place of vLLM."""
    engines: list[VLLMServerEngine] = []

    def build(*command: str, **options) -> VLLMServerEngine:
        options = {"timeout": 5, "start_timeout": 10} | options
        engine = VLLMServerEngine(tiny_policy, Server(**options), tmp_path)
        for supervisor in engine.supervisors:
            own = [sys.executable, fake_server.__file__, str(supervisor.process.port)]
            supervisor.process.command = list(command) or own
        engines.append(engine)
        return engine

    yield build
    for engine in engines:
        engine.close()
        assert not any(living(supervisor.process.process.pid) for supervisor in engine.supervisors)


def kill_once(engine, requests: int):
    """Kill the first server while its `requests`-th request is under way."""
    complete, seen = engine.supervisors[0].client.complete, []

    def killing(*args):
        seen.append(None)
        if len(seen) == requests:
            os.kill(engine.supervisors[0].process.process.pid, signal.SIGKILL)
        return complete(*args)

    engine.supervisors[0].client.complete = killing


@pytest.mark.parametrize("count", [1, 2])
def test_a_server_that_is_killed_is_started_again_and_nothing_is_lost(started, count):
    engine = started(count=count, in_flight=4)
    generate(engine, 4)
    wait_for(lambda: all(supervisor.in_service for supervisor in engine.supervisors), 10)
    first = [supervisor.process.process.pid for supervisor in engine.supervisors]
    kill_once(engine, 5)
    assert complete(generate(engine, 40), 40)
    wait_for(lambda: all(supervisor.in_service for supervisor in engine.supervisors), 10)
    assert [supervisor.restarts_left for supervisor in engine.supervisors] == [2, 3][:count]
    assert engine.supervisors[0].process.process.pid != first[0] and not living(first[0])
    assert engine.syncs == 1


def test_the_loss_of_the_last_server_is_one_line_with_the_last_words_of_its_log(started):
    engine = started(restarts=0)
    generate(engine, 4)
    kill_once(engine, 1)
    with pytest.raises(
        EngineError, match=r"no restart is left: .* ended with -9; its log .*server-0.log says: serving"
    ):
        generate(engine, 4)
    assert EngineError.exit_code == 1


def test_a_server_that_does_not_start_is_one_line_with_the_error_of_its_log(started):
    engine = started(sys.executable, "-c", "print('loading'); raise ValueError('too little memory')")
    with pytest.raises(ModelError, match=r"did not start: .* ended with 1; .* says: ValueError: too little memory$"):
        generate(engine, 4)
    assert engine.supervisors[0].restarts_left == 3  # what never ran is not tried again
