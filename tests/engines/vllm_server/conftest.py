"""Engines in front of small servers that misbehave on purpose."""

from __future__ import annotations

import subprocess
import time

import pytest

from lmrl.engines.base import Sampling
from lmrl.engines.vllm_server.engine import VLLMServerEngine
from lmrl.recipe.server import Server
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
