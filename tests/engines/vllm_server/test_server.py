"""Engine vllm-server: every prompt is asked once, by the current weights."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import pytest
import torch

from lmrl.coroutines import run
from lmrl.engines.base import Sampling
from lmrl.policy.merged import merged_weights
from tests.engines.vllm_server.conftest import EOS, complete, generate


def test_prompts_are_divided_and_each_is_sent_once(fakes, engine_of, tiny_policy):
    servers = fakes(2)
    for server in servers:
        server.delay = 0.01
    engine = engine_of(servers, in_flight=3)
    assert complete(generate(engine, 40), 40)
    assert sum(len(server.requests) for server in servers) == 40
    assert all(server.requests and server.most <= 3 for server in servers)
    sent = servers[0].loaded[0]
    expected = {name: tensor for name, tensor in merged_weights(tiny_policy)}
    assert sent.keys() == expected.keys() and all(torch.equal(sent[name], expected[name]) for name in sent)


def test_a_request_says_how_to_sample_and_the_key_decides_the_draw(fakes, engine_of):
    (server,) = fakes()
    engine = engine_of([server])
    first = generate(engine, 3, temperature=0.5, top_p=0.9, top_k=7, stop=("x",))
    options = server.requests[0]["sampling_params"]
    assert (options["temperature"], options["top_p"], options["top_k"], options["stop"]) == (0.5, 0.9, 7, ["x"])
    assert options["stop_token_ids"] == [EOS] and options["max_tokens"] == 4
    assert first == generate(engine, 3, temperature=0.5)
    assert len({one.logprobs[0] for one in first}) == 3  # each key has a seed of its own
    assert [one.logprobs for one in generate(engine, 1, temperature=0)] == [[0.0] * 3]


def test_a_new_turn_does_not_wait_for_the_others(fakes, engine_of):
    (server,) = fakes()
    engine, order = engine_of([server]), []
    server.on_generate = lambda number: time.sleep(1) if number == 1 else None

    async def turns(name, count):
        for turn in range(count):
            await engine.generate([5, 6], Sampling(max_new_tokens=2), (name, turn))
            order.append(name)

    async def both():
        slow = asyncio.create_task(turns("slow", 1))
        await asyncio.sleep(0.3)  # so that its request is the first
        await asyncio.gather(slow, turns("quick", 3))

    engine.refresh()
    run(both())
    assert order == ["quick"] * 3 + ["slow"]


def test_scores_come_from_the_current_weights(fakes, engine_of):
    (server,) = fakes()
    engine = engine_of([server])
    assert engine.score_all([[5, 6, 7], [9, 8]]) == [[-6.0, -7.0], [-8.0]]
    assert len(server.loaded) == 1
    server.version, server.stamp = None, "default"  # started again, and nobody has noticed
    assert engine.score_all([[5, 6]]) == [[-6.0]] and len(server.loaded) == 2


def test_weights_are_sent_when_they_are_stale_and_only_then(fakes, engine_of):
    (server,) = fakes()
    engine = engine_of([server])
    generate(engine)
    generate(engine)
    assert len(server.loaded) == 1
    engine.stale = True
    generate(engine)
    assert len(server.loaded) == 2 and engine.syncs == 2
    assert server.paths.count("/reset_prefix_cache?reset_running_requests=true") == 2
    files = engine.files.folder
    assert len(list(files.glob("*.safetensors"))) == 1  # the newest, for a server that comes back
    engine.close()
    assert not files.exists()


def test_other_ranks_sample_from_the_same_servers_and_leave_the_weights_alone(fakes, engine_of):
    servers = fakes(2)
    owner = engine_of(servers)
    other = engine_of([], shared=json.loads(json.dumps(owner.shared)))
    found = []
    thread = threading.Thread(target=lambda: found.append(generate(other)))
    thread.start()
    time.sleep(0.3)
    assert not found and not any(server.requests for server in servers)  # waits until the owner has sent its weights
    assert complete(generate(owner))
    thread.join(5)
    assert complete(found[0]) and all(len(server.loaded) == 1 for server in servers)


def test_a_rollout_can_be_abandoned(fakes, engine_of):
    (server,) = fakes()
    begun = threading.Event()
    server.on_generate = lambda number: begun.set() or time.sleep(2)

    def check() -> None:
        if begun.is_set():
            raise KeyboardInterrupt

    engine, started = engine_of([server], check), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        generate(engine)
    assert time.monotonic() - started < 1.5  # it does not wait for what is under way
