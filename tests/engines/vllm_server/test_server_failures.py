"""Servers that hang, refuse, die or come back: a request is sent again, or the run stops with one line."""

from __future__ import annotations

import threading
import time

import pytest

from lmrl.engines.vllm_server import client as server_client
from lmrl.engines.vllm_server.client import ServerLost
from lmrl.engines.vllm_server.dispatch import TRIES
from lmrl.engines.vllm_server.supervisor import Target
from lmrl.errors import EngineError, ModelError
from tests.engines.vllm_server.conftest import complete, generate


def test_requests_that_fail_are_sent_again_and_nothing_is_counted_twice(fakes, engine_of):
    servers = fakes(2)
    servers[0].on_generate = lambda number: [500, "hang up", None][number % 3]
    assert complete(generate(engine_of(servers, in_flight=4)))


def test_a_request_that_hangs_is_sent_again(fakes, engine_of):
    (server,) = fakes()
    server.on_generate = lambda number: time.sleep(1.5) if number == 3 else None
    assert complete(generate(engine_of([server], timeout=0.5)))


def test_a_request_that_always_fails_stops_the_run_with_what_the_server_said(fakes, engine_of):
    (server,) = fakes()
    server.on_generate = lambda number: 500
    with pytest.raises(EngineError, match=f"failed {TRIES} times, at last: .* answered 500: out of luck"):
        generate(engine_of([server]), 1)


def test_a_request_that_is_refused_stops_the_run_at_once(fakes, engine_of):
    (server,) = fakes()
    server.on_generate = lambda number: 400
    with pytest.raises(ModelError, match="refused a request with 400: out of luck"):
        generate(engine_of([server]), 1)
    assert len(server.requests) == 1


def test_a_server_that_dies_leaves_its_requests_to_the_others(fakes, engine_of):
    servers = fakes(2)
    servers[1].delay = 0.02
    servers[0].on_generate = lambda number: threading.Thread(target=servers[0].close).start() or "hang up"
    assert complete(generate(engine_of(servers, in_flight=4)))
    assert len(servers[1].requests) >= 20 - 4


def test_a_restarted_server_gets_the_weights_first(fakes, engine_of):
    """A request that was about to be sent may reach it before them: its completion is of other weights."""
    (server,) = fakes()
    engine = engine_of([server])
    successors = []

    def die(number: int):
        if number == 5:
            threading.Thread(target=restart).start()
        return "hang up" if number >= 5 else None

    def restart() -> None:
        server.close()
        successors.extend(fakes(port=server.port))

    server.on_generate = die
    assert complete(generate(engine, 12), 12)
    (successor,) = successors
    assert len(successor.loaded) == 1 and successor.version == server.version
    assert server.completed == [server.version] * 4
    assert successor.completed.count(server.version) == 12 - 4


def test_completions_of_other_weights_are_thrown_away(fakes, engine_of):
    (server,) = fakes()
    engine = engine_of([server])
    generate(engine, 1)
    server.version, server.stamp = None, "default"  # started again, and nobody has noticed
    assert complete(generate(engine, 6), 6)
    assert len(server.loaded) == 2 and server.stamp == engine.supervisors[0].target.version


@pytest.mark.parametrize("others", [0, 1])
def test_lost_broadcast_weights_are_not_replaced_by_later_ones(fakes, engine_of, others):
    """While the policy is trained beside the sampling; the other servers go on."""
    servers = fakes(1 + others)
    engine = engine_of(servers)
    generate(engine, 1)
    for supervisor in engine.supervisors:
        supervisor.set_target(Target(supervisor.target.version))  # as after a broadcast: there is no file
    servers[0].version = None  # started again
    with engine.pinned_weights(lambda: None):
        if others:
            assert complete(generate(engine))
        else:
            with pytest.raises(EngineError, match="the weights they sampled with are lost"):
                generate(engine)
    assert len(servers[0].loaded) == 1
    engine.stale = True
    assert complete(generate(engine)) and len(servers[0].loaded) == 2


def test_new_weights_are_named_only_after_the_old_cache_is_dropped(fakes, engine_of):
    (server,) = fakes()
    server.resets = iter([False])  # its prefix cache still holds what the old weights computed
    engine = engine_of([server])
    named = []
    server.lmrl_name = lambda version: named.append(list(server.paths)) or setattr(server, "version", version) or {}
    assert complete(generate(engine))
    assert len(named) == 1 and len(server.loaded) == 2  # loaded once more, and named when the reset succeeded
    assert sum(path.startswith("/reset_prefix_cache") for path in named[0]) == 2


def test_completions_without_a_version_are_rejected(fakes, engine_of, monkeypatch):
    (server,) = fakes()
    own = server.generate

    def silent(body: dict):
        status, answer = own(body)
        del answer["choices"][0]["weight_versions"]
        return status, answer

    monkeypatch.setattr(server, "generate", silent)
    with pytest.raises(EngineError, match="does not say which weights it came from"):
        generate(engine_of([server]), 1)


def test_a_server_out_of_service_is_checked_five_times_a_second(fakes, engine_of, monkeypatch):
    (server,) = fakes()
    engine = engine_of([server], start_timeout=60)
    generate(engine, 1)
    looks = []
    monkeypatch.setattr(engine.supervisors[0].client, "describe", lambda: looks.append(None) or lost())

    def lost():
        raise ServerLost("nobody there")

    engine.supervisors[0].mark_lost("a test")
    time.sleep(1)
    assert 3 <= len(looks) <= 8


class Process:
    """A process that is there, in place of a server that was started."""

    ended, kills = False, 0

    def start(self) -> None: ...

    def kill(self) -> None:
        self.kills += 1

    stop = kill

    def ends_within(self, seconds: float) -> bool:
        return False

    def last_words(self) -> str:
        return "is still running"


def test_a_server_that_is_busy_for_longer_than_a_probe_is_left_alone(fakes, engine_of, monkeypatch):
    monkeypatch.setattr(server_client, "PROBE_TIMEOUT", 0.2)
    (server,) = fakes()
    engine = engine_of([server])
    generate(engine, 1)
    engine.supervisors[0].process = process = Process()
    free = server.lmrl_describe
    server.lmrl_describe = lambda: time.sleep(0.5) or free()
    engine.supervisors[0].mark_lost("a test")
    time.sleep(1.2)
    assert not engine.supervisors[0].in_service and process.kills == 0
    server.lmrl_describe = free
    assert complete(generate(engine))


def test_a_failing_supervisor_stops_the_run(fakes, engine_of):
    (server,) = fakes()
    engine = engine_of([server])

    def start() -> None:
        raise OSError(28, "No space left on device")

    engine.supervisors[0].process = Process()
    engine.supervisors[0].process.start = start
    with pytest.raises(EngineError, match=r"supervising http://.* failed: OSError: .*No space left on device"):
        generate(engine)


def test_a_server_that_stays_away_stops_the_run_with_one_line(fakes, engine_of):
    (server,) = fakes()
    engine = engine_of([server], start_timeout=0.5)
    generate(engine, 1)
    server.close()
    with pytest.raises(
        EngineError, match=r"127.0.0.1:\d+ cannot be reached: .*waited 0.5 s \(start_timeout\)"
    ) as raised:
        generate(engine, 1)
    assert raised.value.exit_code == 1
