"""Servers, policies and settings that cannot go together are refused with the fix."""

from __future__ import annotations

import pytest

from lmrl import distributed
from lmrl.engines.build import build_engine
from lmrl.errors import EngineError, ModelError, RecipeError, RunError
from lmrl.recipe import Rollouts
from lmrl.recipe.files import load_recipe
from tests.engines.vllm_server.conftest import generate


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
        (["rollouts.engine=vllm-server", "rollouts.server={urls: [here]}"], "'here' is not an address"),
        (["rollouts.engine=vllm-server", "rollouts.server={urls: ['http://a:1'], count: 2}"], "`count` is for servers"),
        (["rollouts.engine=vllm-server", "rollouts.server.port=1"], "port"),
    ],
)
def test_invalid_settings(changes, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe("random_walks/ppo", changes)


def test_started_servers_and_several_machines_are_refused(tiny_policy, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(RunError, match=r"start them by hand, and name them in rollouts.server.urls"):
        build_engine(Rollouts(engine="vllm-server"), tiny_policy)
