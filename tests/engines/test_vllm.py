"""The `vllm` engine: it samples with the learner's probabilities, in float32 up to rounding, and stale weights are noticed.

Skipped where vLLM is not installed, but for what must work without it.
"""

import json
import os

import pytest
import torch

import lmrl
from lmrl.engines.base import Sampling
from lmrl.engines.build import build_engine
from lmrl.engines.hf import HFEngine
from lmrl.engines.vllm import VLLMEngine
from lmrl.errors import ModelError, SamplerError
from lmrl.evaluation.export import export
from lmrl.policy.heads import HeadsSpec
from lmrl.policy.load import load_policy, open_policy
from lmrl.recipe import VLLM, Lora, Model, Rollouts
from lmrl.training.monitoring.sampler_check import SamplerCheck, logprob_differences
from lmrl.trajectories.trajectory import Segment, Trajectory
from tests.conftest import TINY_LLAMA, TINY_WALKS, needs_vllm

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?"
CONFIG = TINY_LLAMA | {"head_dim": 32}
"""vLLM on a CPU has no smaller heads."""
FLOAT32 = Rollouts(engine="vllm", vllm=VLLM(dtype="float32", memory=0.05))
PROMPTS = [[5, 6, 7], [5, 6, 8, 9, 10, 11], [12], [5, 6, 7, 8]]
KEYS = [("vllm", row) for row in range(len(PROMPTS))]


def spread_out(policy, by=0.3):
    """Move all trainable weights, as training would, so that some tokens are much likelier than others."""
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(by * torch.randn_like(parameter))
    return policy


def gaps(policy, completions, temperature=1.0):
    """Of each sampled token, the difference of sampler and learner."""
    segments = []
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        segments.append(Segment())
        segments[-1].observe(prompt)
        segments[-1].act(completion.tokens, completion.logprobs, 0)
    return logprob_differences(policy, segments, temperature).abs()


def episodes(engine):
    found = []
    for prompt, completion in zip(PROMPTS, engine.complete(PROMPTS, Sampling(12), KEYS), strict=True):
        segment = Segment()
        segment.observe(prompt)
        segment.act(completion.tokens, completion.logprobs, 0)
        found.append(Trajectory([segment], "", ""))
    return found


def tokens(completions):
    return [completion.tokens for completion in completions]


@pytest.fixture(scope="module")
def policy():
    """A fully fine-tuned policy whose head is tied to its embeddings."""
    torch.manual_seed(0)
    return spread_out(load_policy(Model(config=CONFIG | {"tie_word_embeddings": True}), texts=lambda: [LETTERS]))


@pytest.fixture(scope="module")
def engine(policy):
    """Started once; leaves process-wide settings as they were."""
    before = (torch.get_num_threads(), torch.set_num_threads, os.sched_getaffinity(0), torch.get_rng_state().tolist())
    engine = VLLMEngine(policy, FLOAT32)
    engine.refresh()
    after = (torch.get_num_threads(), torch.set_num_threads, os.sched_getaffinity(0), torch.get_rng_state().tolist())
    assert before == after
    yield engine
    engine.close()
    assert not torch.distributed.is_initialized()


# ------------------------------------------------------------------------------------------------------------- sampling
@needs_vllm
def test_log_probabilities_are_the_learners(policy, engine):
    for temperature in (1.0, 0.6):
        completions = engine.complete(PROMPTS, Sampling(12, temperature), KEYS)
        assert gaps(policy, completions, temperature).max() < 1e-4
        for completion in completions:
            assert len(completion.tokens) == len(completion.logprobs) <= 12
            assert [token in policy.eos_ids for token in completion.tokens[:-1]] == [False] * (
                len(completion.tokens) - 1
            )
            assert completion.finish_reason == ("eos" if completion.tokens[-1] in policy.eos_ids else "length")


@needs_vllm
def test_samples_follow_the_distribution(policy, engine):
    """2,000 draws of a first token agree with the distribution (chi-square over the likely tokens, far tail)."""
    count = 2000
    found = engine.complete([[5, 6, 7]] * count, Sampling(1), [("chi", row) for row in range(count)])
    drawn = torch.bincount(
        torch.tensor([completion.tokens[0] for completion in found]), minlength=len(policy.vocabulary)
    )
    with torch.no_grad():
        expected = count * policy.causal_lm(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1)
    likely = expected > 5
    assert 4 < int(likely.sum()) < 40
    assert float(((drawn - expected)[likely] ** 2 / expected[likely]).sum()) < 80


@needs_vllm
def test_greedy_and_stop_strings_are_those_of_the_hf_engine(policy, engine):
    greedy = Sampling(16, temperature=0)
    expected = HFEngine(policy).complete(PROMPTS, greedy, KEYS)
    assert engine.complete(PROMPTS, greedy, KEYS) == expected
    text = policy.tokenizer.decode(expected[1].tokens)
    stopped = Sampling(16, temperature=0, stop=(text[3:5], "nowhere"))
    found = engine.complete(PROMPTS, stopped, KEYS)
    assert found == HFEngine(policy).complete(PROMPTS, stopped, KEYS)
    assert found[1].finish_reason == "stop" and len(found[1].tokens) <= 5


@needs_vllm
def test_top_k_and_top_p_renormalise(policy, engine):
    (one,) = engine.complete([PROMPTS[0]], Sampling(1, top_k=2), [("top",)])
    with torch.no_grad():
        logits = policy.causal_lm(torch.tensor([PROMPTS[0]])).logits[0, -1]
    best = logits.topk(2)
    where = best.indices.tolist().index(one.tokens[0])
    assert one.logprobs[0] == pytest.approx(float(best.values.log_softmax(-1)[where]), abs=1e-4)


@needs_vllm
def test_same_keys_same_samples_in_any_batch(engine):
    state = torch.get_rng_state()
    together = engine.complete(PROMPTS, Sampling(12), KEYS)
    assert torch.equal(state, torch.get_rng_state())
    alone = [engine.complete([p], Sampling(12), [k])[0] for p, k in zip(PROMPTS, KEYS, strict=True)]
    assert tokens(together) == tokens(alone)
    assert tokens(engine.complete(PROMPTS, Sampling(12), [("other", row) for row in range(4)])) != tokens(together)


@needs_vllm
def test_a_rollout_can_be_abandoned(engine, monkeypatch):
    expected = tokens(engine.complete(PROMPTS, Sampling(12), KEYS))
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(engine, "check", stop)
    with pytest.raises(KeyboardInterrupt):
        engine.complete(PROMPTS, Sampling(12), KEYS)
    assert not engine.llm.llm_engine.has_unfinished_requests()
    monkeypatch.undo()
    assert tokens(engine.complete(PROMPTS, Sampling(12), KEYS)) == expected


@needs_vllm
def test_too_long_a_context_is_one_line(engine):
    with pytest.raises(ModelError, match="60 tokens and max_new_tokens=8 need 68 positions, but vLLM has 64"):
        engine.complete([[5] * 60], Sampling(8), KEYS[:1])


# -------------------------------------------------------------------------------------------------------------- weights
@needs_vllm
def test_weights_are_synced_after_updates_and_a_stale_head_is_found(policy, engine, monkeypatch):
    before = engine.complete(PROMPTS, Sampling(12), KEYS)
    spread_out(policy)
    assert gaps(policy, engine.complete(PROMPTS, Sampling(12), KEYS)).max() > 0.1  # nobody has said so yet
    engine.stale = True
    after = engine.complete(PROMPTS, Sampling(12), KEYS)
    assert tokens(after) != tokens(before) and gaps(policy, after).max() < 1e-4
    sampler_check = SamplerCheck(policy, engine, FLOAT32)
    sampler_check.raise_on_mismatch(sampler_check(episodes(engine)), "here")

    monkeypatch.setattr("lmrl.engines.vllm.pack_head", lambda model: None)
    spread_out(policy)
    engine.stale = True
    sampler_check = SamplerCheck(policy, engine, FLOAT32)
    with pytest.raises(SamplerError, match="engine 'vllm'"):
        sampler_check.raise_on_mismatch(sampler_check(episodes(engine)), "here")
    monkeypatch.undo()
    engine.stale = True
    sampler_check = SamplerCheck(policy, engine, FLOAT32)
    assert sampler_check(episodes(engine))["gap_max"] < 1e-4


@needs_vllm
def test_lora(engine, tmp_path):
    """Adapters are merged on the way; a second engine starts where the first has been closed."""
    engine.close()
    load_policy(Model(config=CONFIG), texts=lambda: [LETTERS]).save(tmp_path / "model")
    torch.manual_seed(1)
    adapted = load_policy(Model(path=str(tmp_path / "model"), lora=Lora(r=4)))
    other = VLLMEngine(adapted, FLOAT32)
    other.refresh()
    try:
        for _ in range(2):
            spread_out(adapted)
            other.stale = True
            completions = other.complete(PROMPTS, Sampling(12), KEYS)
            assert gaps(adapted, completions).max() < 1e-4
            with adapted.model.disable_adapter():
                assert gaps(adapted, completions).max() > 0.1
    finally:
        other.close()


@needs_vllm
def test_a_distilled_policy_is_served(tmp_path):
    """A policy guided by Q heads on a separate trunk, which vLLM refuses, becomes a model that vLLM can decode."""
    changes = [one for one in TINY_WALKS if not one.startswith("task.")]
    changes += ["task.nodes=20", "model.config.head_dim=32", "objective={name: ilql, q_head: mlp, trunk: separate}"]
    lmrl.train("random_walks/bc", [*changes, "training.steps=1", "evaluation.suite=null"], output=tmp_path / "run")
    with pytest.raises(ModelError, match="Q heads"):
        build_engine(FLOAT32, open_policy(str(tmp_path / "run")))
    export(tmp_path / "run", tmp_path / "out", 8.0, distill=5, check=False)
    policy = open_policy(str(tmp_path / "out"))
    engine = build_engine(FLOAT32, policy)
    try:
        assert gaps(policy, engine.complete(PROMPTS, Sampling(12), KEYS)).max() < 1e-4
    finally:
        engine.close()


@needs_vllm
def test_a_run_on_vllm(tmp_path):
    """Two stages, evaluation, comparison and correction; and a suite that asks for it."""
    changes = [one for one in TINY_WALKS if not one.startswith("source.")] + [
        "model.config.head_dim=32",
        "stages.warmup.source.episodes=20",
        "stages.warmup.source.batch_size=8",
        "stages.warmup.training.steps=1",
        "rollouts={engine: vllm, vllm: {memory: 0.05}, prompts: 4, samples: 2, max_new_tokens: 10, check_every: 1}",
        "objective.value_warmup_steps=0",
        "training.steps=2",
        "evaluation.episodes=2",
    ]
    lmrl.train("random_walks/ppo", changes, output=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    main = [line for line in lines if line["stage"] == "main" and line["kind"] not in ("diagnostics", "memory")]
    assert [line["kind"] for line in main] == ["eval", "check", "train", "check", "train", "eval"]
    assert all(0 < line["gap_mean"] < 0.05 for line in main if line["kind"] == "check")
    assert all(line.get("correction_capped", 0) == 0 for line in main if line["kind"] == "train")
    suite = ["rollouts.engine=vllm", "rollouts.vllm.memory=0.05", "episodes=2", "samples=1"]
    report = lmrl.evaluate(tmp_path / "run", overrides=suite)
    assert report.metrics["optimality"]["n"] == 2


@needs_vllm
@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (TINY_LLAMA, {}, "no attention for heads of size 8"),
        (CONFIG, {"sleep": True}, "rollouts.vllm.sleep"),
        (CONFIG, {"max_model_len": 1000}, "vllm cannot run this model"),
    ],
)
def test_what_vllm_cannot_do_is_one_line(config, settings, message):
    if settings.get("sleep") and torch.cuda.is_available():
        pytest.skip("sleeps on a GPU")
    broken = VLLMEngine(
        load_policy(Model(config=config), texts=lambda: [LETTERS]),
        Rollouts(engine="vllm", vllm=VLLM(memory=0.05, **settings)),
    )
    with pytest.raises(ModelError, match=message) as caught:
        broken.refresh()
    broken.close()
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ without vLLM, too
def test_vllm_not_installed(tiny_policy, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install -e '\.\[vllm\]'"):
        build_engine(Rollouts(engine="vllm"), tiny_policy)


def test_guided_by_q(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    heads = HeadsSpec(value=False, q="tied", beta=4.0)
    guided = load_policy(Model(config=dict(TINY_LLAMA)), texts=lambda: [LETTERS], heads=heads)
    with pytest.raises(ModelError, match="lmrl export"):
        build_engine(Rollouts(engine="vllm"), guided)
    assert isinstance(build_engine(Rollouts(engine="vllm", beta=0.0, support=0.0), guided), VLLMEngine)


def test_asleep_during_updates(tiny_policy, monkeypatch):
    """Dropped weights are sent again before anything is sampled, even if no update has followed."""
    calls = []

    class LLM:
        def sleep(self, level):
            calls.append(f"sleep {level}")

        def wake_up(self):
            calls.append("wake")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(VLLMEngine, "sync", lambda self: calls.append("sync"))
    for sleep, expected in ((True, ["sync", "sleep 2", "wake", "sync"]), (False, ["sync"])):
        calls.clear()
        engine = VLLMEngine(tiny_policy, Rollouts(engine="vllm", vllm=VLLM(sleep=sleep)))
        engine.release_memory()
        engine.refresh()
        engine.llm = LLM()
        engine.release_memory()
        engine.release_memory()
        engine.refresh()
        engine.refresh()
        assert calls == expected
