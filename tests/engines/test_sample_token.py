"""Sampling inverts the cumulative distribution, up to rounding, over small and large vocabularies."""

import numpy as np
import pytest
import torch

from lmrl.engines.base import Sampling
from lmrl.engines.sample_token import invert, sample_token


def test_draw_inverts_the_distribution():
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]])).repeat(4, 1)
    tokens, logprobs = sample_token(logits, Sampling(), np.array([0.1, 0.3, 0.69, 0.71]))
    assert tokens.tolist() == [0, 1, 1, 2]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.2, 0.5, 0.5, 0.3]))


@pytest.mark.parametrize("sampling", [Sampling(temperature=1e-40), Sampling(top_p=1e-300)])
def test_the_most_likely_token_always_stays(sampling):
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]])).repeat(3, 1)
    tokens, logprobs = sample_token(logits, sampling, np.array([0.0, 0.5, 0.99]))
    assert tokens.tolist() == [1, 1, 1] and logprobs.tolist() == [0, 0, 0]


def test_draw_frequencies():
    """20,000 draws agree with the distribution (chi-square, 5 degrees of freedom, far tail)."""
    rng = np.random.default_rng(0)
    probs = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
    tokens, _ = sample_token(probs.log().expand(20_000, -1), Sampling(), rng.random(20_000))
    counts = torch.bincount(tokens, minlength=6)
    assert float(((counts - 20_000 * probs) ** 2 / (20_000 * probs)).sum()) < 25


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 5000])
def test_invert_finds_what_one_running_sum_finds(tokens):
    rng = np.random.default_rng(tokens)
    weights = torch.from_numpy(rng.exponential(size=(400, tokens)) * (rng.random((400, tokens)) < 0.3)).float()
    weights[:, rng.integers(tokens)] += 0.5  # at least one is positive
    shares = torch.from_numpy(rng.random(400))
    sums = weights.double().cumsum(-1)
    expected = torch.searchsorted(sums, shares[:, None] * sums[:, -1:], right=True)[:, 0]
    assert torch.equal(invert(weights, shares), expected)


@pytest.mark.parametrize("share", [0.0, 1 - 2**-53])
def test_zero_weight_is_never_sampled(share):
    weights = torch.zeros(1, 1000)
    weights[0, 300:600] = 0.1
    found = int(invert(weights, torch.tensor([share], dtype=torch.float64)))
    assert found == (300 if share == 0 else 599)


def test_top_k_and_top_p_renormalise():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]])).repeat(200, 1)
    uniforms = np.linspace(0, 0.999, 200)
    tokens, logprobs = sample_token(logits, Sampling(top_k=2), uniforms)
    assert set(tokens.tolist()) == {0, 1}
    torch.testing.assert_close(logprobs[0].exp(), torch.tensor(2 / 3))
    tokens, logprobs = sample_token(logits, Sampling(top_p=0.8), uniforms)
    assert set(tokens.tolist()) == {0, 1, 2}  # .5 + .25 falls short of .8, so the third is in
    torch.testing.assert_close(logprobs[0].exp(), torch.tensor(0.5 / 0.9))


@pytest.mark.parametrize("spread", [0.1, 4.0])
def test_top_p_of_a_large_vocabulary(spread):
    """With an edge among the most likely candidates (spread 4) and far beyond them (spread .1): equal to a full sort."""
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(3, 4000, generator=generator)
    ordered = logits.double().softmax(-1).sort(-1, descending=True).values
    kept = (ordered.cumsum(-1) - ordered < 0.7).sum(-1)
    assert (kept > 1024).all() if spread < 1 else (kept < 1024).all()
    for row, count in enumerate(kept.tolist()):
        inside = logits[row].topk(count).indices
        expected = logits[row, inside].log_softmax(-1)
        tokens, logprobs = sample_token(logits[row].expand(4000, -1), Sampling(top_p=0.7), np.linspace(0, 0.9999, 4000))
        assert set(tokens.tolist()) <= set(inside.tolist())
        position = (inside == tokens[0]).nonzero()[0, 0]
        torch.testing.assert_close(logprobs[0], expected[position], rtol=1e-4, atol=1e-4)
