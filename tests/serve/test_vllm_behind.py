"""`lmrl serve` with vLLM behind it: the tokens and log-probabilities that a client is given are the policy's."""

import os
import signal
import subprocess
import sys

import pytest
import torch
import urllib3

from lmrl.engines.base import Sampling
from lmrl.engines.build import build_engine
from lmrl.engines.hf import HFEngine
from lmrl.policy.load import load_policy, open_policy
from lmrl.recipe import VLLM, Model, Rollouts
from lmrl.serve.app import App
from lmrl.serve.model import ServedPolicy
from tests.conftest import TINY_LLAMA, needs_vllm
from tests.serve.clients import ask

CHAT = "/v1/chat/completions"
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FLOAT32 = Rollouts(engine="vllm", vllm=VLLM(dtype="float32", memory=0.05))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """vLLM on a CPU has no heads below 32."""
    torch.manual_seed(0)
    letters = "\n" + "".join(chr(code) for code in range(32, 127))
    config = dict(TINY_LLAMA) | {"head_dim": 32, "max_position_embeddings": 256}
    policy = load_policy(Model(config=config), texts=lambda: [letters])
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    policy.tokenizer.chat_template = TEMPLATE
    policy.save(folder := tmp_path_factory.mktemp("served"))
    return folder


def chat(content, **fields):
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0} | fields


@needs_vllm
@pytest.mark.vllm
def test_answers_are_the_policys(folder):
    policy = open_policy(str(folder))
    engine = build_engine(FLOAT32, policy)
    engine.complete([[5, 6, 7]], Sampling(2), [("starts it",)])
    served = ServedPolicy(policy, engine, Sampling(12), "tiny")

    async def work(connect):
        connection = await connect()
        plain = (await connection.post(CHAT, chat("add", return_token_ids=True))).json["choices"][0]
        several = (
            await connection.post(CHAT, chat("add", temperature=1, n=4, seed=3, logprobs=True, return_token_ids=True))
        ).json
        again = (await connection.post(CHAT, chat("add", temperature=1, n=4, seed=3, return_token_ids=True))).json
        stream = (await connection.post(CHAT, chat("add", stream=True))).events
        return plain, several["choices"], again["choices"], stream

    try:
        plain, several, again, stream = ask(App(served), work)
    finally:
        engine.close()
    (expected,) = HFEngine(policy).complete([plain["prompt_token_ids"]], Sampling(12, temperature=0), [("k",)])
    assert plain["token_ids"] == expected.tokens
    drawn = several[0]  # at temperature 0 the likeliest token is certain
    context = torch.tensor([drawn["prompt_token_ids"] + drawn["token_ids"]])
    with torch.no_grad():
        own = policy.causal_lm(context).logits[0].log_softmax(-1)
    first = len(drawn["prompt_token_ids"]) - 1
    computed = [float(own[first + place, token]) for place, token in enumerate(drawn["token_ids"])]
    assert [one["logprob"] for one in drawn["logprobs"]["content"]] == pytest.approx(computed, abs=1e-4)
    assert len({tuple(one["token_ids"]) for one in several}) > 1
    assert [one["token_ids"] for one in several] == [one["token_ids"] for one in again]
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in stream) == plain["message"]["content"]


@needs_vllm
@pytest.mark.vllm
def test_the_verb_serves_by_vllm(folder):
    settings = ["rollouts.engine=vllm", "rollouts.vllm={dtype: float32, memory: 0.05}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lmrl", "serve", str(folder), "--port", "0", *settings],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    try:
        line = next(line for line in process.stdout if "/v1" in line)
        port = int(line.split("/v1")[0].rsplit(":", 1)[1])
        answer = urllib3.request("POST", f"http://127.0.0.1:{port}{CHAT}", json=chat("add"), timeout=60)
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
    finally:
        process.kill()
    assert answer.status == 200 and answer.json()["usage"]["completion_tokens"] > 0 and status == 0
