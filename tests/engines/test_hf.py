"""The hf engine: samples exactly, reports exactly, stops where it should."""

import numpy as np
import pytest
import torch

from lmrl.engines.base import Sampling
from lmrl.engines.hf import HFEngine
from lmrl.errors import ModelError
from lmrl.policy.cache import SPARE, RowsLayer
from lmrl.policy.heads import HeadsSpec
from lmrl.policy.load import load_policy
from lmrl.policy.slots import SlotLayer
from lmrl.recipe import Model

PROMPTS = [[5, 6, 7, 8, 9], [5], [10, 11], [5, 6, 7], [12, 13, 14, 15]]


def keys(count: int = len(PROMPTS)) -> list[tuple]:
    return [("test", row) for row in range(count)]


def logprobs_of(policy, prompt, tokens, temperature=1.0):
    with torch.no_grad():
        logits = policy.causal_lm(torch.tensor([prompt + tokens])).logits[0].float() / temperature
    return logits.log_softmax(-1)[torch.arange(len(prompt) - 1, len(prompt) + len(tokens) - 1), tokens]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_sampled_tokens(tiny_policy, temperature):
    """Padded prompts of different lengths with a cache, against one plain pass each."""
    engine = HFEngine(tiny_policy)
    completions = engine.complete(PROMPTS, Sampling(max_new_tokens=20, temperature=temperature), keys())
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = logprobs_of(tiny_policy.eval(), prompt, completion.tokens, temperature)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-4, atol=1e-5)
    assert {completion.finish_reason for completion in completions} <= {"eos", "length"}


def test_same_keys_same_samples_in_any_batch(tiny_policy):
    sampling = Sampling(max_new_tokens=12)
    together = HFEngine(tiny_policy).complete(PROMPTS, sampling, keys())
    alone = [HFEngine(tiny_policy).complete([p], sampling, [k])[0] for p, k in zip(PROMPTS, keys(), strict=True)]
    few_slots = HFEngine(tiny_policy, slots=2).complete(PROMPTS, sampling, keys())
    assert [c.tokens for c in together] == [c.tokens for c in alone] == [c.tokens for c in few_slots]
    others = HFEngine(tiny_policy).complete(PROMPTS, sampling, [("other", row) for row in range(len(PROMPTS))])
    assert [c.tokens for c in together] != [c.tokens for c in others]


def one_by_one(policy, prompts, sampling, names):
    return [HFEngine(policy).complete([p], sampling, [k])[0] for p, k in zip(prompts, names, strict=True)]


def assert_same(found, expected):
    """The same tokens and ends, and log-probabilities up to rounding."""
    assert [(one.tokens, one.finish_reason) for one in found] == [(one.tokens, one.finish_reason) for one in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=1e-4, atol=1e-5)


@pytest.fixture(params=["slots", "rows"])
def kept(request, monkeypatch):
    """How keys and values are kept: engines of the test complete with slot_batch.py, or in waves."""
    if request.param == "rows":
        monkeypatch.setattr("lmrl.engines.hf.slots_fit", lambda config: False)
    return request.param


@pytest.fixture
def passes(tiny_policy, monkeypatch, kept):
    """Shapes (rows, positions) of the passes through the trunk."""
    shapes = []
    assert tiny_policy.holds_slots  # found out by passes of its own
    original = tiny_policy.causal_lm.model.forward

    def watched(*args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return original(*args, **kwargs)

    monkeypatch.setattr(tiny_policy.causal_lm.model, "forward", watched)
    return shapes


def many(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 2 to 30 tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 30, size=size).tolist() for size in rng.integers(2, 31, size=count)]


def test_finished_rows_leave_the_batch(tiny_policy, passes):
    """With an eos that comes early, later passes are narrower, and what stays is unchanged."""
    tiny_policy.causal_lm.generation_config.eos_token_id = list(range(0, 14))
    prompts = PROMPTS * 4
    completions = HFEngine(tiny_policy).complete(prompts, Sampling(max_new_tokens=16), keys(len(prompts)))
    rows = [shape[0] for shape in passes[1:]]
    assert rows == sorted(rows, reverse=True) and rows[-1] < rows[0] < len(prompts)  # some end with their first token
    for prompt, completion in zip(prompts, completions, strict=True):
        ended = [token for token in completion.tokens if token in tiny_policy.eos_ids]
        assert (completion.finish_reason == "eos") == bool(ended)
        assert completion.tokens[:-1] == [token for token in completion.tokens[:-1] if token not in tiny_policy.eos_ids]
        expected = logprobs_of(tiny_policy.eval(), prompt, completion.tokens)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slots", [1, 3, 16])
@pytest.mark.parametrize("stop", [(), ("e", "xy")])
def test_refilled_places_change_nothing(tiny_policy, passes, slots, stop):
    """More prompts than slots, of many lengths and ends, some of them equal."""
    tiny_policy.causal_lm.generation_config.eos_token_id = [1, 7]
    prompts = many(25) + many(5)
    sampling, names = Sampling(max_new_tokens=24, stop=stop), keys(30)
    found = HFEngine(tiny_policy, slots=slots).complete(prompts, sampling, names)
    steps = [rows for rows, positions in passes if positions == 1]
    assert max(steps) <= slots and {one.finish_reason for one in found} == {
        "eos",
        "length",
        *(["stop"] if stop else []),
    }
    assert sum(steps) == sum(len(one.tokens) - 1 for one in found)  # what has ended is not computed
    assert_same(found, one_by_one(tiny_policy, prompts, sampling, names))


def test_a_group_shares_its_prompt(tiny_policy, passes):
    """Positions of equal prompts are computed once: those of distinct prompts, and one for each token but the last."""
    prompts = [prompt for prompt in ([5, 6, 7, 8, 9], [9, 8, 7, 6, 5]) for _ in range(8)]
    sampling = Sampling(max_new_tokens=6)
    found = HFEngine(tiny_policy).complete(prompts, sampling, keys(16))
    assert passes[0] == (2, 5)
    assert sum(rows * columns for rows, columns in passes) == 10 + sum(len(one.tokens) - 1 for one in found)
    assert len({tuple(one.tokens) for one in found}) > 8
    assert_same(found, one_by_one(tiny_policy, prompts, sampling, keys(16)))


def test_a_beginning_that_all_share_is_computed_once(tiny_policy, passes):
    """20 tokens for all, then what is left of each prompt, of different lengths, one of them twice."""
    beginning = [index % 20 + 3 for index in range(20)]
    prompts = [beginning + prompt for prompt in ([5], [6, 7, 8, 9], [10, 11], [6, 7, 8, 9])]
    sampling = Sampling(max_new_tokens=9)
    found = HFEngine(tiny_policy).complete(prompts, sampling, keys(4))
    assert passes[:3] == [(1, 20), (3, 4), (4, 1)]
    assert_same(found, one_by_one(tiny_policy, prompts, sampling, keys(4)))
    refilled = HFEngine(tiny_policy, slots=2).complete(prompts, sampling, keys(4))
    assert_same(refilled, found)
    passes.clear()
    tiny_policy.causal_lm.config.sliding_window = 5  # the cache reads the config: distances would be wrong
    HFEngine(tiny_policy).complete(prompts, sampling, keys(4))
    assert passes[0] == (3, 24)


def test_prompts_are_computed_under_the_token_budget(tiny_policy, passes):
    tiny_policy.microbatch_tokens = 40
    prompts, sampling = many(20), Sampling(max_new_tokens=2)
    found = HFEngine(tiny_policy).complete(prompts, sampling, keys(20))
    sizes = [rows * columns for rows, columns in passes if columns > 1]
    assert max(sizes) <= 40 and sum(sizes) < 1.3 * sum(map(len, prompts))
    assert_same(found, one_by_one(tiny_policy, prompts, sampling, keys(20)))


@pytest.mark.parametrize("changes", [{"trunk": "separate"}, {"trunk": "shared"}])
def test_two_trunks_with_refilled_places(changes, kept):
    from tests.policy.test_heads import policy_with

    policy = policy_with(HeadsSpec(q="mlp", beta=2.0, support=0.01, **changes))
    if policy.values.target_trunk is not None:  # so that the two caches differ
        for parameter in policy.values.target_trunk.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    policy.causal_lm.generation_config.eos_token_id = [1, 7]
    prompts, sampling = many(12), Sampling(max_new_tokens=12)
    found = HFEngine(policy, slots=4).complete(prompts, sampling, keys(12))
    assert_same(found, one_by_one(policy, prompts, sampling, keys(12)))


def test_cache_tokens_limit_the_rows(tiny_policy, passes):
    """Places for rows of 30 + 10 tokens and the spare columns: 3 of them, and more as prompts get shorter."""
    prompts = [[5] * 30 + [index] for index in range(3, 9)] + [[index] for index in range(3, 15)]
    sampling, names = Sampling(max_new_tokens=9), keys(18)
    limit = 3 * (31 + 9 + SPARE)
    engine = HFEngine(tiny_policy, cache_tokens=limit)
    found = engine.complete(prompts, sampling, names)
    steps = [rows for rows, positions in passes if positions == 1]
    assert steps[0] == 3 and max(steps) == limit // (1 + 9 + SPARE)
    assert_same(found, one_by_one(tiny_policy, prompts, sampling, names))
    with pytest.raises(ModelError, match=r"for 104 tokens, but rollouts.cache_tokens=103: raise it, or lower"):
        HFEngine(tiny_policy, cache_tokens=103).complete(prompts, sampling, names)


def test_the_buffers_hold_no_more_than_cache_tokens(tiny_policy, monkeypatch, kept):
    sizes = []
    for layer in (RowsLayer, SlotLayer):

        def watched(self, *args, original=layer.update, **kwargs):
            found = original(self, *args, **kwargs)
            sizes.append(self.keys.shape[0] * self.keys.shape[2])
            return found

        monkeypatch.setattr(layer, "update", watched)
    limit = 5 * (30 + 30 + SPARE)
    engine = HFEngine(tiny_policy, cache_tokens=limit)
    assert (engine.batch is None) == (kept == "rows")
    engine.complete(many(30), Sampling(max_new_tokens=30), keys(30))
    assert 0 < max(sizes) <= limit


def test_repeats_to_the_bit(tiny_policy):
    tiny_policy.causal_lm.generation_config.eos_token_id = [1, 7]
    prompts, sampling = many(20), Sampling(max_new_tokens=20)
    one, other = (HFEngine(tiny_policy, slots=6).complete(prompts, sampling, keys(20)) for _ in range(2))
    assert one == other


def test_a_rollout_can_be_abandoned(tiny_policy):
    class Interrupted(Exception):
        pass

    left = [5]

    def check():
        left[0] -= 1
        if not left[0]:
            raise Interrupted

    tiny_policy.train()
    with pytest.raises(Interrupted):
        HFEngine(tiny_policy, check=check).complete(PROMPTS, Sampling(max_new_tokens=20), keys())
    assert tiny_policy.training


def test_models_with_a_state_take_one_row_at_a_time():
    """LFM2 mixes convolutions and attention: padding would end up in its state."""
    torch.manual_seed(0)
    config = {
        "model_type": "lfm2",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "layer_types": ["conv", "full_attention"],
    }
    policy = load_policy(Model(config=config), texts=lambda: ["abcdefghijklmnopqrstuvwxyz .,!?"])
    found = HFEngine(policy).complete(PROMPTS, Sampling(max_new_tokens=8), keys())
    for prompt, completion in zip(PROMPTS, found, strict=True):
        expected = logprobs_of(policy.eval(), prompt, completion.tokens)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-4, atol=1e-5)


def test_stop_string(tiny_policy):
    letter = tiny_policy.decode(
        [HFEngine(tiny_policy).complete([[5]], Sampling(max_new_tokens=3), keys(1))[0].tokens[1]]
    )
    completion = HFEngine(tiny_policy).complete([[5]], Sampling(max_new_tokens=30, stop=(letter,)), keys(1))[0]
    assert completion.finish_reason == "stop"
    assert tiny_policy.decode(completion.tokens).index(letter) == len(completion.tokens) - 1


def test_greedy(tiny_policy):
    completion = HFEngine(tiny_policy).complete([[5, 6]], Sampling(max_new_tokens=4, temperature=0), keys(1))[0]
    tokens = [5, 6]
    for token in completion.tokens:
        with torch.no_grad():
            assert token == int(tiny_policy.eval().causal_lm(torch.tensor([tokens])).logits[0, -1].argmax())
        tokens.append(token)
