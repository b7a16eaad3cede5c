"""What only a real model can show. Runs where LMRL_TEST_MODEL names a folder with SmolLM2-135M-Instruct."""

import json
import os

import pytest
import torch

import lmrl
from lmrl.engines.base import Sampling
from lmrl.engines.hf import HFEngine
from lmrl.policy.heads import HeadsSpec
from lmrl.policy.load import load_policy, open_policy
from lmrl.policy.passes import ForwardRequest
from lmrl.recipe import Lora, Model
from lmrl.trajectories.batch import to_batch
from lmrl.trajectories.trajectory import Segment, Trajectory

MODEL, GGUF = os.environ.get("LMRL_TEST_MODEL"), os.environ.get("LMRL_TEST_GGUF")
pytestmark = [pytest.mark.smollm2, pytest.mark.skipif(not MODEL, reason="LMRL_TEST_MODEL is not set")]
PROMPTS = ["The film begins slowly, but", "I bought this", "Once upon a time there was a robot who"]


def test_greedy_decoding_equals_generate():
    policy = open_policy(MODEL)
    contexts = [policy.tokenizer(prompt).input_ids for prompt in PROMPTS]
    found = HFEngine(policy).complete(contexts, Sampling(max_new_tokens=12, temperature=0), [(i,) for i in range(3)])
    for context, completion in zip(contexts, found, strict=True):
        expected = policy.causal_lm.generate(torch.tensor([context]), max_new_tokens=12, do_sample=False)
        assert completion.tokens == expected[0, len(context) :].tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_does_not_hide_what_the_model_can_do(dtype):
    policy = load_policy(Model(path=MODEL, dtype=dtype, lora=Lora(r=16)))
    assert policy.shares_prompts and policy.holds_slots


def test_learner_and_sampler_agree():
    """float32: to rounding. bfloat16: within its resolution."""
    for dtype, tolerance in (("float32", 2e-4), ("bfloat16", 0.6)):
        policy = load_policy(Model(path=MODEL, dtype=dtype, lora=Lora(r=4)), heads=HeadsSpec())
        policy.temperature = 0.9
        contexts = [policy.tokenizer(prompt).input_ids for prompt in PROMPTS]
        found = HFEngine(policy).complete(contexts, Sampling(16, 0.9), [("s", i) for i in range(3)])
        trajectories = []
        for context, completion in zip(contexts, found, strict=True):
            segment = Segment()
            segment.observe(context)
            segment.act(completion.tokens, completion.logprobs, 0)
            trajectories.append(Trajectory([segment], "", ""))
        scored = policy.score(to_batch(trajectories), ForwardRequest(values=True))["logprobs"]
        for completion, logprobs in zip(found, scored, strict=True):
            torch.testing.assert_close(torch.tensor(completion.logprobs), logprobs, rtol=0, atol=tolerance)


def test_two_steps_of_the_sentiment_recipe(tmp_path):
    recipe = lmrl.load_recipe(
        "sentiment/ppo",
        [
            f"model.path={MODEL}",
            "training.steps=2",
            "rollouts.prompts=4",
            "rollouts.max_new_tokens=8",
            "objective.value_warmup_steps=0",
            "evaluation.suite=null",
            "task.prompts.limit=20",
            "training.checkpoint_every=0",
        ],
    )
    result = lmrl.train(recipe, output=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [1, 2] and all(line["skipped"] == 0 for line in steps)
    (diagnostics,) = (line for line in lines if line["kind"] == "diagnostics")
    assert diagnostics["step"] == 2 and diagnostics["effective_rank"] > 1
    report = lmrl.evaluate(result.checkpoint, "sentiment", ["episodes=2", "rollouts.max_new_tokens=4"])
    assert report.metrics["reward"]["n"] == 2


@pytest.mark.skipif(not GGUF, reason="LMRL_TEST_GGUF is not set")
def test_a_gguf_file_is_a_policy(tmp_path):
    policy = open_policy(GGUF)
    context = policy.tokenizer("The capital of France is").input_ids
    completion = HFEngine(policy).complete([context], Sampling(max_new_tokens=3, temperature=0), [("a",)])[0]
    assert "Paris" in policy.decode(completion.tokens)
    load_policy(Model(path=GGUF)).save(tmp_path / "saved")
    again = open_policy(str(tmp_path / "saved"))
    assert HFEngine(again).complete([context], Sampling(3, 0), [("a",)])[0].tokens == completion.tokens
