"""Completions restricted to a given set: nothing else is sampled, and probabilities are renormalised at every token."""

import asyncio
import itertools

import numpy as np
import pytest
import torch

from lmrl.coroutines import run
from lmrl.engines.base import Completion, Engine, Sampling
from lmrl.engines.hf import HFEngine
from lmrl.engines.sample_token import restrict
from lmrl.engines.token_trie import TokenTrie
from lmrl.errors import DataError, ModelError
from lmrl.policy.passes import ForwardRequest
from lmrl.trajectories.batch import Batch, to_sequence
from lmrl.trajectories.shared import pack
from lmrl.trajectories.trajectory import Segment

EOS = 1
ACTIONS = {"fgh": [5, 6, 7, EOS], "fgi": [5, 6, 8, EOS], "j": [9, EOS]}
SAMPLING = Sampling(max_new_tokens=6)


@pytest.fixture(params=["slots", "rows"])
def engine(request, monkeypatch, tiny_policy):
    """Completes with slot_batch.py, or in waves."""
    if request.param == "rows":
        monkeypatch.setattr("lmrl.engines.hf.slots_fit", lambda config: False)
    assert tiny_policy.eos_ids == {EOS}
    return HFEngine(tiny_policy)


def sample(engine, prompts, tries, sampling=SAMPLING, name="test"):
    async def everything():
        calls = [
            engine.generate(prompt, sampling, (name, number), allowed=trie)
            for number, (prompt, trie) in enumerate(zip(prompts, tries, strict=True))
        ]
        return await asyncio.gather(*calls)

    return run(everything())


def segment_of(prompt, completion):
    segment = Segment()
    segment.observe(prompt)
    segment.act(completion.tokens, completion.logprobs, 0, completion.allowed)
    return segment


def test_a_trie_knows_what_may_follow():
    trie = TokenTrie(ACTIONS)
    assert trie.root.allowed == (5, 9) and trie.longest == 4
    assert trie.root.children[5].children[6].allowed == (7, 8)
    assert trie.text([5, 6, 8, EOS]) == "fgi"


@pytest.mark.parametrize("actions", [{"a": [5], "ab": [5, 6]}, {"ab": [5, 6], "a": [5]}, {"a": [5], "A": [5]}])
def test_actions_of_the_same_tokens_are_refused(actions):
    with pytest.raises(DataError, match="cannot be told apart"):
        TokenTrie(actions)


def test_restrict_keeps_the_logits_of_allowed_tokens():
    logits = torch.arange(6.0).reshape(2, 3)
    assert restrict(logits, [None, (0, 2)]).tolist() == [[0.0, 1.0, 2.0], [3.0, -torch.inf, 5.0]]
    assert restrict(logits, [None, None]) is logits


def test_only_allowed_actions_are_sampled(engine):
    """300 restricted requests along with 20 free ones: each of the three actions occurs as often as its probability says."""
    prompts = [[5, 6, 7, 8]] * 320
    found = sample(engine, prompts, [TokenTrie(ACTIONS)] * 300 + [None] * 20)
    restricted, free = found[:300], found[300:]
    assert {tuple(one.tokens) for one in restricted} == {tuple(tokens) for tokens in ACTIONS.values()}
    assert {one.finish_reason for one in restricted} == {"eos"}
    assert all(one.allowed == [] for one in free) and any(len(one.tokens) == 6 for one in free)
    probability = {tuple(one.tokens): np.exp(sum(one.logprobs)) for one in restricted}
    assert sum(probability.values()) == pytest.approx(1, abs=1e-5)
    for tokens, share in probability.items():
        count = sum(tuple(one.tokens) == tokens for one in restricted)
        assert abs(count - 300 * share) < 5 * np.sqrt(300 * share * (1 - share))


def test_learner_finds_the_sampled_probabilities(engine, tiny_policy):
    """The ratio on fresh data is 1: packed end to end or padded, restricted actions along with free ones."""
    prompts = [[5, 6, 7][: 1 + number % 3] for number in range(12)]
    trie = TokenTrie(ACTIONS)
    found = sample(engine, prompts, [trie if number % 4 else None for number in range(12)], Sampling(6, 0.7))
    tiny_policy.temperature = 0.7
    batch = Batch([to_sequence(segment_of(*pair)) for pair in zip(prompts, found, strict=True)])
    scored = tiny_policy.score(batch, ForwardRequest(greedy=True))
    for completion, logprobs in zip(found, scored["logprobs"], strict=True):
        torch.testing.assert_close(logprobs, torch.tensor(completion.logprobs), rtol=1e-4, atol=1e-5)
    single = [
        logprobs[1]
        for completion, logprobs in zip(found, scored["logprobs"], strict=True)
        if completion.tokens[0] == 9 and completion.allowed
    ]
    assert single and all(float(one) == 0 for one in single)  # nothing but the end may follow


def test_sharing_a_prompt_changes_no_probability(tiny_policy):
    trie = TokenTrie(ACTIONS)
    prompts = [[5, 6, 7, 8]] * 4
    found = sample(HFEngine(tiny_policy), prompts, [trie, None, trie, trie])
    plain = [to_sequence(segment_of(*pair)) for pair in zip(prompts, found, strict=True)]
    (together,) = tiny_policy.score(Batch([pack(plain)]))["logprobs"]
    alone = torch.cat(tiny_policy.score(Batch(plain))["logprobs"])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("splits", [True, False])
def test_gradient_is_that_of_a_masked_softmax(tiny_policy, splits):
    """Through the whole policy, by autograd over all logits; tests/policy/test_logprobs.py has the float64 of it alone."""
    policy = tiny_policy.double()
    policy.splits_head, policy.temperature = splits, 0.6
    segment = Segment()
    segment.observe([5, 6])
    segment.act([7, 8], None, 0, [(7, 9), None])
    segment.act([9], None, 1, [(8, 9, 11)])
    micro = Batch([to_sequence(segment)] * 2).collate([0, 1], policy.pad_id, policy.packs)
    left, right = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs = policy(micro)
    parameters = list(policy.causal_lm.parameters())
    found = torch.autograd.grad((outputs.logprobs * left + outputs.entropy * right).sum(), parameters)

    logits = policy.causal_lm(torch.tensor([segment.tokens])).logits[0, 1:4] / 0.6
    mask = torch.zeros_like(logits, dtype=torch.bool)
    mask[0, [7, 9]] = mask[1, :] = mask[2, [8, 9, 11]] = True
    logprobs = logits.masked_fill(~mask, -torch.inf).log_softmax(-1)
    own = logprobs[torch.arange(3), torch.tensor([7, 8, 9])]
    entropy = -(logprobs.exp() * logprobs.masked_fill(~mask, 0)).sum(-1)
    torch.testing.assert_close(outputs.logprobs, own.repeat(2), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(outputs.entropy, entropy.repeat(2), rtol=1e-10, atol=1e-10)
    loss = (own.repeat(2) * left + entropy.repeat(2) * right).sum()
    for one, other in zip(found, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # norms inside of the model are in float32


def test_restriction_leaves_other_requests_alone(tiny_policy):
    prompts = [[5, 6], [7], [8, 9, 10]]
    free = sample(HFEngine(tiny_policy), prompts, [None] * 3)
    mixed = sample(HFEngine(tiny_policy), prompts * 2, [None] * 3 + [TokenTrie(ACTIONS)] * 3)
    assert [one.tokens for one in mixed[:3]] == [one.tokens for one in free]


def test_stop_strings_do_not_cut_allowed_actions(engine, tiny_policy):
    stop = tiny_policy.decode([6])
    (found,) = sample(engine, [[5]], [TokenTrie({"fgh": [5, 6, 7, EOS]})], Sampling(max_new_tokens=6, stop=(stop,)))
    assert found.tokens == [5, 6, 7, EOS] and found.finish_reason == "eos" and sum(found.logprobs) == 0


def test_an_action_must_fit_into_max_new_tokens(tiny_policy):
    with pytest.raises(ModelError, match="4 tokens, more than rollouts.max_new_tokens=3"):
        sample(HFEngine(tiny_policy), [[5]], [TokenTrie(ACTIONS)], Sampling(max_new_tokens=3))


def test_engines_that_cannot_restrict_say_so(tiny_policy):
    class Plain(Engine):
        def sample(self, prompts, sampling, keys):
            return [Completion([EOS], [0.0], "eos") for _ in prompts]

    with pytest.raises(ModelError, match="engine 'Plain' cannot restrict"):
        sample(Plain(tiny_policy), [[5]], [TokenTrie(ACTIONS)])


def test_disallowed_tokens_cannot_be_recorded():
    segment = Segment()
    segment.observe([5])
    with pytest.raises(ValueError, match="token 6 was sampled, but not allowed"):
        segment.act([7, 6], None, 0, [None, (7, 8)])


def test_all_allowed_is_no_restriction(tiny_policy):
    """A set with every token changes nothing, in one slice of the vocabulary or several."""
    everything = tuple(range(tiny_policy.vocabulary.shape[0]))
    free, full = Segment(), Segment()
    for segment, allowed in ((free, ()), (full, [everything, everything])):
        segment.observe([5, 6])
        segment.act([7, EOS], None, 0, allowed)
    scored = [torch.cat(tiny_policy.score(Batch([to_sequence(one)]))["logprobs"]) for one in (free, full)]
    torch.testing.assert_close(*scored, rtol=1e-6, atol=1e-6)
    assert len(list(itertools.chain(*full.allowed.values()))) == 2 * len(everything)
