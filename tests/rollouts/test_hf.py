"""The hf engine: samples exactly, reports exactly, stops where it should."""

import numpy as np
import pytest
import torch

from lmrl.rollouts.draw import draw
from lmrl.rollouts.engine import Sampling
from lmrl.rollouts.hf import HFEngine

PROMPTS = [[5, 6, 7, 8, 9], [5], [10, 11], [5, 6, 7], [12, 13, 14, 15]]


def keys(count: int = len(PROMPTS)) -> list[tuple]:
    return [("test", row) for row in range(count)]


def logprobs_of(policy, prompt, tokens, temperature=1.0):
    with torch.no_grad():
        logits = policy.causal_lm(torch.tensor([prompt + tokens])).logits[0].float() / temperature
    return logits.log_softmax(-1)[torch.arange(len(prompt) - 1, len(prompt) + len(tokens) - 1), tokens]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_what_was_sampled(tiny_policy, temperature):
    """Padded prompts of different lengths with a cache, against one plain pass each."""
    engine = HFEngine(tiny_policy)
    completions = engine.generate(PROMPTS, Sampling(max_new_tokens=20, temperature=temperature), keys())
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected = logprobs_of(tiny_policy.eval(), prompt, completion.tokens, temperature)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-4, atol=1e-5)
    assert {completion.end for completion in completions} <= {"eos", "length"}


def test_same_keys_same_samples_whatever_the_company(tiny_policy):
    sampling = Sampling(max_new_tokens=12)
    together = HFEngine(tiny_policy).generate(PROMPTS, sampling, keys())
    alone = [HFEngine(tiny_policy).generate([p], sampling, [k])[0] for p, k in zip(PROMPTS, keys(), strict=True)]
    few_slots = HFEngine(tiny_policy, slots=2).generate(PROMPTS, sampling, keys())
    assert [c.tokens for c in together] == [c.tokens for c in alone] == [c.tokens for c in few_slots]
    others = HFEngine(tiny_policy).generate(PROMPTS, sampling, [("other", row) for row in range(len(PROMPTS))])
    assert [c.tokens for c in together] != [c.tokens for c in others]


def test_finished_rows_leave_the_batch(tiny_policy, monkeypatch):
    """With an eos that comes early, later passes are narrower, and what stays is unchanged."""
    tiny_policy.causal_lm.generation_config.eos_token_id = list(range(0, 14))
    sizes = []
    original = tiny_policy.causal_lm.model.forward

    def watched(*args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(tiny_policy.causal_lm.model, "forward", watched)
    prompts = PROMPTS * 4
    completions = HFEngine(tiny_policy).generate(prompts, Sampling(max_new_tokens=16), keys(len(prompts)))
    monkeypatch.undo()
    assert sizes[0] == len(prompts) and sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0]
    for prompt, completion in zip(prompts, completions, strict=True):
        ended = [token for token in completion.tokens if token in tiny_policy.eos_ids]
        assert (completion.end == "eos") == bool(ended)
        assert completion.tokens[:-1] == [token for token in completion.tokens[:-1] if token not in tiny_policy.eos_ids]
        expected = logprobs_of(tiny_policy.eval(), prompt, completion.tokens)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-4, atol=1e-5)


def test_stop_string(tiny_policy):
    letter = tiny_policy.decode(
        [HFEngine(tiny_policy).generate([[5]], Sampling(max_new_tokens=3), keys(1))[0].tokens[1]]
    )
    completion = HFEngine(tiny_policy).generate([[5]], Sampling(max_new_tokens=30, stop=(letter,)), keys(1))[0]
    assert completion.end == "stop"
    assert tiny_policy.decode(completion.tokens).index(letter) == len(completion.tokens) - 1


def test_greedy(tiny_policy):
    completion = HFEngine(tiny_policy).generate([[5, 6]], Sampling(max_new_tokens=4, temperature=0), keys(1))[0]
    tokens = [5, 6]
    for token in completion.tokens:
        with torch.no_grad():
            assert token == int(tiny_policy.eval().causal_lm(torch.tensor([tokens])).logits[0, -1].argmax())
        tokens.append(token)


# ------------------------------------------------------------------------------------------------------------- drawing
def test_draw_inverts_the_distribution():
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]])).repeat(4, 1)
    tokens, logprobs = draw(logits, Sampling(), np.array([0.1, 0.3, 0.69, 0.71]))
    assert tokens.tolist() == [0, 1, 1, 2]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.2, 0.5, 0.5, 0.3]))


def test_draw_frequencies():
    """20,000 draws agree with the distribution (chi-square, 5 degrees of freedom, far tail)."""
    rng = np.random.default_rng(0)
    probs = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
    tokens, _ = draw(probs.log().expand(20_000, -1), Sampling(), rng.random(20_000))
    counts = torch.bincount(tokens, minlength=6)
    assert float(((counts - 20_000 * probs) ** 2 / (20_000 * probs)).sum()) < 25


def test_top_k_and_top_p_renormalise():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]])).repeat(200, 1)
    uniforms = np.linspace(0, 0.999, 200)
    tokens, logprobs = draw(logits, Sampling(top_k=2), uniforms)
    assert set(tokens.tolist()) == {0, 1}
    torch.testing.assert_close(logprobs[0].exp(), torch.tensor(2 / 3))
    tokens, logprobs = draw(logits, Sampling(top_p=0.8), uniforms)
    assert set(tokens.tolist()) == {0, 1, 2}  # .5 + .25 falls short of .8, so the third is in
    torch.testing.assert_close(logprobs[0].exp(), torch.tensor(0.5 / 0.9))
