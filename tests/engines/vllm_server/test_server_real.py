"""Engine vllm-server against vLLM itself."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from lmrl.engines.base import Sampling
from lmrl.engines.build import build_engine
from lmrl.recipe import Rollouts
from tests.conftest import needs_vllm
from tests.engines.vllm_server.conftest import living


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
