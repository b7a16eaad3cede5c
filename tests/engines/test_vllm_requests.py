"""The `vllm` engine's requests to vLLM, with a stub of it: requests join the running ones, leave, and are scored."""

import asyncio
import sys
from types import ModuleType, SimpleNamespace

import pytest

from lmrl.coroutines import run
from lmrl.engines.base import Sampling
from lmrl.engines.vllm import VLLMEngine
from lmrl.errors import ModelError
from lmrl.recipe import Rollouts


class Stub:
    """Speaks as vLLM's LLMEngine does: each step samples the last token of a request plus one."""

    def __init__(self):
        self.requests, self.sizes, self.aborted = {}, [], []

    def add_request(self, name, prompt, parameters):
        self.requests[name] = SimpleNamespace(tokens=list(prompt["prompt_token_ids"]), parameters=parameters, count=0)

    def abort_request(self, names):
        self.aborted += names
        for name in names:
            self.requests.pop(name, None)

    def step(self):
        self.sizes.append(len(self.requests))
        return [output for name in list(self.requests) for output in self._advance(name)]

    def _advance(self, name):
        request = self.requests[name]
        asked = request.parameters
        if hasattr(asked, "prompt_logprobs"):
            del self.requests[name]
            own = [None] + [{token: SimpleNamespace(logprob=-float(token))} for token in request.tokens[1:]]
            yield SimpleNamespace(request_id=name, finished=True, outputs=[], prompt_logprobs=own)
            return
        token = request.tokens[-1] + 1
        request.tokens.append(token)
        request.count += 1
        finished = request.count == asked.max_tokens or token in asked.stop_token_ids
        if finished:
            del self.requests[name]
        if asked.output_kind == "delta":
            new = [token]
        elif finished:
            new = request.tokens[-request.count :]
        else:
            return
        logprobs = [{one: SimpleNamespace(logprob=-0.25)} for one in new]
        yield SimpleNamespace(
            request_id=name, finished=finished, outputs=[SimpleNamespace(token_ids=new, logprobs=logprobs)]
        )


@pytest.fixture
def engine(tiny_policy, monkeypatch):
    module, inner = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    module.SamplingParams = lambda **options: SimpleNamespace(**options)
    inner.RequestOutputKind = SimpleNamespace(DELTA="delta", FINAL_ONLY="final")
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", inner)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    engine = VLLMEngine(tiny_policy, Rollouts(engine="vllm"))
    engine.llm = SimpleNamespace(llm_engine=Stub(), model_config=SimpleNamespace(max_model_len=40))
    engine.stale, engine.syncs = False, 3
    return engine


def test_a_new_turn_joins_the_requests_that_are_running(engine):
    async def turns(first, lengths):
        found = []
        for turn, length in enumerate(lengths):
            completion = await engine.generate([first], Sampling(max_new_tokens=length), (first, turn))
            found.append(len(completion.tokens))
        return found

    async def both():
        return await asyncio.gather(turns(5, [6]), turns(20, [2, 2, 2]))

    assert run(both()) == [[6], [2, 2, 2]]
    assert engine.llm.llm_engine.sizes == [2] * 6  # the short turns have not waited for the long one


def test_completions_end_as_the_policy_says(engine):
    (eos,) = engine.policy.eos_ids
    letter = engine.policy.decode([12])
    sampling = Sampling(max_new_tokens=9, stop=(letter,))
    stopped, ended = engine.complete([[9], [eos - 2]], sampling, [("a",), ("b",)])
    assert (stopped.tokens, stopped.finish_reason, stopped.logprobs) == ([10, 11, 12], "stop", [-0.25] * 3)
    assert ended.finish_reason == "eos" and ended.tokens == [eos - 1, eos] and ended.version == 3
    assert engine.llm.llm_engine.aborted == ["1"]


def test_scores_are_log_probabilities_of_the_prompt(engine):
    assert engine.score_all([[5, 6, 7], [9, 8]]) == [[-6.0, -7.0], [-8.0]]
    with pytest.raises(ModelError, match="40 tokens cannot be scored: vLLM has 40 positions"):
        engine.score_all([[5] * 40])


def test_what_is_abandoned_is_aborted(engine):
    class Stop(BaseException):
        pass

    left = [3]

    def check():
        left[0] -= 1
        if not left[0]:
            raise Stop

    engine.check = check
    with pytest.raises(Stop):
        engine.complete([[5], [6]], Sampling(max_new_tokens=9), [("a",), ("b",)])
    assert sorted(engine.llm.llm_engine.aborted) == ["1", "2"] and not engine.busy


def test_a_prompt_without_room_is_refused(engine):
    with pytest.raises(
        ModelError, match="a context of 35 tokens and max_new_tokens=8 need 43 positions, but vLLM has 40"
    ):
        engine.complete([[5] * 35], Sampling(max_new_tokens=8), [("a",)])
