"""Engine vllm-server: against a small server that misbehaves on purpose, and against vLLM where it is installed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from lmrl import distributed
from lmrl.coroutines import run
from lmrl.engines.base import Sampling
from lmrl.engines.build import build_engine
from lmrl.engines.vllm_server import client as server_client
from lmrl.engines.vllm_server.client import ServerLost
from lmrl.engines.vllm_server.dispatch import TRIES
from lmrl.engines.vllm_server.engine import VLLMServerEngine
from lmrl.engines.vllm_server.supervisor import Target
from lmrl.errors import EngineError, ModelError, RecipeError, RunError
from lmrl.policy.merged import merged_weights
from lmrl.recipe import Rollouts
from lmrl.recipe.files import load_recipe
from lmrl.recipe.server import Server
from tests.conftest import needs_vllm
from tests.engines.vllm_server import fake_server
from tests.engines.vllm_server.fake_server import FakeServer

EOS = 1


@pytest.fixture
def fakes():
    servers: list[FakeServer] = []

    def start(count: int = 1, **options: int) -> list[FakeServer]:
        servers.extend(FakeServer(**options) for _ in range(count))
        return servers[-count:]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def engine_of(tiny_policy):
    """Builds engines on tiny_policy, whose vocabulary has the fake server's number of tokens."""
    engines: list[VLLMServerEngine] = []

    def build(servers: list[FakeServer], check=lambda: None, shared=None, **options) -> VLLMServerEngine:
        options = {"timeout": 5, "start_timeout": 5} | options
        urls = [server.url for server in servers]
        engines.append(VLLMServerEngine(tiny_policy, Server(urls=urls, **options), None, check, shared))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


def generate(engine, count: int = 20, **sampling) -> list:
    prompts = [[2 + index % 30, 5] for index in range(count)]
    return engine.complete(
        prompts, Sampling(**({"max_new_tokens": 4} | sampling)), [("k", row) for row in range(count)]
    )


def complete(completions, count: int = 20) -> bool:
    """Whether every prompt has its own completion."""
    return [one.tokens[0] for one in completions] == [2 + index % 30 for index in range(count)]


def living(group: int) -> list[str]:
    """Processes of a process group that are not only waiting to be reaped."""
    lines = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if line.split()[0] == str(group) and not line.split()[1].startswith("Z")]


def wait_for(condition, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------------------ all is well
def test_prompts_are_shared_out_and_every_one_is_asked_once(fakes, engine_of, tiny_policy):
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


# --------------------------------------------------------------------------------------------------------- misbehaviour
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


def test_a_server_that_is_started_again_gets_the_weights_before_any_request(fakes, engine_of):
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
    before = [path for path in successor.paths[: successor.paths.index("/inference/v1/generate")]]
    assert before.count("/collective_rpc") >= 2 and "/update_weight_version" in before
    assert len(successor.requests) == 12 - 4


def test_completions_of_other_weights_are_thrown_away(fakes, engine_of):
    (server,) = fakes()
    engine = engine_of([server])
    generate(engine, 1)
    server.version, server.stamp = None, "default"  # started again, and nobody has noticed
    assert complete(generate(engine, 6), 6)
    assert len(server.loaded) == 2 and server.stamp == engine.supervisors[0].target.version


@pytest.mark.parametrize("others", [0, 1])
def test_weights_that_were_broadcast_and_are_gone_are_not_replaced_by_later_ones(fakes, engine_of, others):
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


def test_a_server_says_that_it_has_weights_only_when_nothing_of_the_old_ones_is_left(fakes, engine_of):
    (server,) = fakes()
    server.resets = iter([False])  # its prefix cache still holds what the old weights computed
    engine = engine_of([server])
    named = []
    server.lmrl_name = lambda version: named.append(list(server.paths)) or setattr(server, "version", version) or {}
    assert complete(generate(engine))
    assert len(named) == 1 and len(server.loaded) == 2  # loaded once more, and named when the reset succeeded
    assert sum(path.startswith("/reset_prefix_cache") for path in named[0]) == 2


def test_completions_that_do_not_say_where_they_come_from_are_not_taken(fakes, engine_of, monkeypatch):
    (server,) = fakes()
    own = server.generate

    def silent(body: dict):
        status, answer = own(body)
        del answer["choices"][0]["weight_versions"]
        return status, answer

    monkeypatch.setattr(server, "generate", silent)
    with pytest.raises(EngineError, match="does not say which weights it came from"):
        generate(engine_of([server]), 1)


def test_a_server_that_is_out_of_service_is_looked_at_five_times_a_second(fakes, engine_of, monkeypatch):
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


def test_a_keeper_that_fails_stops_the_run(fakes, engine_of):
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


# ------------------------------------------------------------------------------------------------ servers as processes
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


# ---------------------------------------------------------------------------------------------------- what is not possible
@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("extension", False, "without lmrl's extension; start it with: VLLM_SERVER_DEV_MODE=1 vllm serve MODEL "),
        ("logprobs", "raw_logprobs", "log-probabilities before temperature .*--logprobs-mode=processed_logprobs"),
        ("lmrl_load", lambda path: {"error": "no such file"}, "does not see the file"),
    ],
)
def test_a_server_that_cannot_be_used_is_refused_with_the_fix(fakes, engine_of, attribute, value, message):
    (server,) = fakes()
    setattr(server, attribute, value)
    with pytest.raises((ModelError, EngineError), match=message):
        generate(engine_of([server]))


def test_a_server_without_its_development_endpoints_is_refused(fakes, engine_of, monkeypatch):
    (server,) = fakes()
    monkeypatch.setattr(server, "answer", lambda path, body: (404, {"detail": "Not Found"}))
    with pytest.raises(ModelError, match="/collective_rpc answered 404 .*VLLM_SERVER_DEV_MODE=1"):
        generate(engine_of([server]))


def test_a_server_of_another_model_is_refused(fakes, engine_of, monkeypatch):
    (server,) = fakes()
    described = server.lmrl_describe() | {"vocabulary": 99}
    monkeypatch.setattr(server, "lmrl_describe", lambda: described | {"version": server.version})
    with pytest.raises(ModelError, match="serves a llama with 99 tokens, but the policy is a llama with 34"):
        generate(engine_of([server]))


def test_a_context_that_does_not_fit_is_refused(fakes, engine_of):
    engine = engine_of(fakes())
    with pytest.raises(ModelError, match="need 102 positions, but the servers have 64"):
        generate(engine, 1, max_new_tokens=100)


def test_broadcasting_needs_gpus(fakes, engine_of):
    with pytest.raises(ModelError, match="transfer=nccl: the policy is on 'cpu'; set it to files"):
        generate(engine_of(fakes(), transfer="nccl"))


def test_a_policy_guided_by_q_is_refused():
    from lmrl.policy.heads import HeadsSpec
    from lmrl.policy.load import load_policy
    from lmrl.recipe import Model
    from tests.conftest import TINY_LLAMA

    policy = load_policy(Model(config=dict(TINY_LLAMA)), texts=lambda: ["abc"], heads=HeadsSpec(q="tied", beta=1.0))
    with pytest.raises(ModelError, match="Q heads guide this policy: set rollouts.engine=hf"):
        build_engine(Rollouts(engine="vllm-server"), policy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["rollouts.engine=vllm-server", "rollouts.server={urls: [here]}"], "'here' is no address"),
        (["rollouts.engine=vllm-server", "rollouts.server={urls: ['http://a:1'], count: 2}"], "`count` is for servers"),
        (["rollouts.engine=vllm-server", "rollouts.server.port=1"], "port"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("random_walks/ppo", changes)


def test_started_servers_and_several_machines_are_refused(tiny_policy, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"start them by hand, and name them in rollouts.server.urls"):
        build_engine(Rollouts(engine="vllm-server"), tiny_policy)


# -------------------------------------------------------------------------------------------------------- vLLM, for real
def agrees(policy, prompts, completions, temperature: float) -> float:
    """The largest difference between the log-probabilities of completions and the policy's own."""
    worst = 0.0
    for prompt, one in zip(prompts, completions, strict=True):
        with torch.no_grad():
            logits_TV = policy.causal_lm(torch.tensor([prompt + one.tokens])).logits[0, len(prompt) - 1 : -1]
        own_T = (logits_TV / temperature).log_softmax(-1).gather(1, torch.tensor(one.tokens)[:, None])[:, 0]
        worst = max(worst, (own_T - torch.tensor(one.logprobs)).abs().max().item())
    return worst


@needs_vllm
@pytest.mark.vllm
def test_a_real_server_samples_from_the_policy_takes_updates_and_comes_back_after_a_kill(tmp_path):
    from lmrl.policy.load import load_policy
    from lmrl.recipe import Model
    from tests.conftest import TINY_LLAMA

    torch.manual_seed(0)
    # Tied, because vLLM's packed copy of a tied head is what an update may miss; heads of 32 are its smallest on a CPU.
    config = dict(TINY_LLAMA) | {"hidden_size": 64, "tie_word_embeddings": True, "max_position_embeddings": 256}
    policy = load_policy(Model(config=config), texts=lambda: ["abcdefghijklmnopqrstuvwxyz .,!?"])
    armed, killed = threading.Event(), []

    def check() -> None:
        if armed.is_set() and not killed and engine.supervisors[0].client._live:
            killed.append(engine.supervisors[0].process.process.pid)
            os.kill(killed[0], signal.SIGKILL)

    server = {"dtype": "float32", "memory": 0.5, "in_flight": 8, "restarts": 1}
    engine = build_engine(Rollouts(engine="vllm-server", server=server), policy, check, tmp_path)
    prompts = [[2 + row % 30, 5, 2 + row // 30] for row in range(48)]
    keys = [("k", row) for row in range(48)]
    sampling = Sampling(max_new_tokens=24, temperature=0.7, stop=("q",))
    try:
        first = engine.complete(prompts, sampling, keys)
        assert agrees(policy, prompts, first, 0.7) < 1e-4
        assert {one.finish_reason for one in first} == {"eos", "stop", "length"}
        for one in first:
            assert (one.tokens[-1] in policy.eos_ids) == (one.finish_reason == "eos")
            assert policy.decode(one.tokens).endswith("q") == (one.finish_reason == "stop")
            assert (len(one.tokens) == 24) >= (one.finish_reason == "length")
        assert engine.complete(prompts, sampling, keys) == first

        with torch.no_grad():
            for parameter in policy.causal_lm.parameters():
                parameter.mul_(3)
        engine.stale = True
        second = engine.complete(prompts, sampling, keys)
        assert agrees(policy, prompts, second, 0.7) < 1e-4 < agrees(policy, prompts, first, 0.7)

        armed.set()
        longer = Sampling(max_new_tokens=200, temperature=0.7)
        third = engine.complete(prompts, longer, keys)
        assert killed and engine.supervisors[0].restarts_left == 0 and engine.syncs == 2
        assert agrees(policy, prompts, third, 0.7) < 1e-4
        last = engine.supervisors[0].process.process.pid
    finally:
        engine.close()
    assert not any(living(group) for group in (*killed, last))
    assert "vllm" in (tmp_path / "servers" / "server-0.log").read_text()
