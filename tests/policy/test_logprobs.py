"""token_logprobs against the plain computation, values and gradients, in float64."""

import pytest
import torch

from lmrl.policy.logprobs import token_logprobs


def plain(hidden, weight, bias, targets, temperature):
    logits = hidden @ weight.T
    logits = (logits if bias is None else logits + bias) / temperature
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("slice_size", [1, 5, 17, 1000])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_plain_computation(slice_size, with_bias, temperature):
    generator = torch.Generator().manual_seed(1)
    double = {"dtype": torch.float64, "generator": generator}
    hidden = (3 * torch.randn(9, 6, **double)).requires_grad_()
    weight = torch.randn(17, 6, **double).requires_grad_()
    bias = torch.randn(17, **double).requires_grad_() if with_bias else None
    targets = torch.randint(17, (9,), generator=generator)
    left, right = torch.randn(9, **double), torch.randn(9, **double)
    inputs = [hidden, weight] + ([bias] if with_bias else [])

    expected = plain(hidden, weight, bias, targets, temperature)
    actual = token_logprobs(hidden, weight, bias, targets, temperature, slice_size)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    expected_grads = torch.autograd.grad((expected[0] * left + expected[1] * right).sum(), inputs)
    actual_grads = torch.autograd.grad((actual[0] * left + actual[1] * right).sum(), inputs)
    for a, e in zip(actual_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


def test_logprob_gradient_alone():
    """The shortcut for a loss without an entropy term."""
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64)
    targets = torch.tensor([0, 10, 3, 3, 7])
    (expected,) = torch.autograd.grad(plain(hidden, weight, None, targets, 1.0)[0].sum(), hidden)
    (actual,) = torch.autograd.grad(token_logprobs(hidden, weight, None, targets, 1.0, 4)[0].sum(), hidden)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    logprobs, entropy = token_logprobs(hidden, weight, None, torch.tensor([0, 0]), 1.0, 1)
    assert logprobs.tolist() == [0.0, -2000.0]
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.isfinite(hidden.grad).all()


def test_positions_times_vocabulary_never_exists():
    """Peak extra memory of forward and backward is a few slices, not the whole logits."""
    largest = 0
    original = torch.Tensor.exp

    def watched(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return original(tensor)

    hidden = torch.randn(32, 8, requires_grad=True)
    weight = torch.randn(4096, 8, requires_grad=True)
    torch.Tensor.exp = watched
    try:
        logprobs, _ = token_logprobs(hidden, weight, None, torch.zeros(32, dtype=torch.long), 1.0, 256)
        logprobs.sum().backward()
    finally:
        torch.Tensor.exp = original
    assert 0 < largest <= 32 * 256
