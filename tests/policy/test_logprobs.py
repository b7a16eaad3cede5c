"""token_logprobs against the plain computation, values and gradients, in float64."""

import pytest
import torch

from lmrl.policy import logprobs as logprobs_module
from lmrl.policy.logprobs import restricted_logprobs, token_logprobs
from lmrl.trajectories.allowed import Allowed


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


@pytest.mark.parametrize("slice_size", [1, 4, 100])
@pytest.mark.parametrize("frozen", [False, True])
def test_logprob_gradient_alone(slice_size, frozen):
    """The shortcuts for a loss without an entropy term, and for a vocabulary matrix that is not trained."""
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=not frozen)
    bias = torch.randn(11, dtype=torch.float64)
    targets = torch.tensor([0, 10, 3, 3, 7])
    loss = torch.randn(5, dtype=torch.float64)
    inputs = [hidden] if frozen else [hidden, weight]
    expected = torch.autograd.grad(plain(hidden, weight, bias, targets, 0.7)[0] @ loss, inputs)
    actual = torch.autograd.grad(token_logprobs(hidden, weight, bias, targets, 0.7, slice_size)[0] @ loss, inputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


def test_entropy_gradient_with_a_frozen_matrix():
    torch.manual_seed(0)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64)
    targets = torch.tensor([0, 10, 3, 3, 7])
    (expected,) = torch.autograd.grad(sum(plain(hidden, weight, None, targets, 1.0)).sum(), hidden)
    (actual,) = torch.autograd.grad(sum(token_logprobs(hidden, weight, None, targets, 1.0, 4)).sum(), hidden)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_bfloat16_gradient_of_a_frozen_matrix_is_near_the_exact_one():
    torch.manual_seed(0)
    hidden = torch.randn(64, 32).bfloat16().requires_grad_()
    weight = (0.1 * torch.randn(5000, 32)).bfloat16()  # small logits, which bfloat16 holds well
    targets = torch.randint(5000, (64,))
    token_logprobs(hidden, weight, None, targets)[0].sum().backward()
    exact = hidden.detach().double().requires_grad_()
    plain(exact, weight.double(), None, targets, 1.0)[0].sum().backward()
    error = (hidden.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 4e-3  # a rounding to bfloat16 is 2e-3


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    logprobs, entropy = token_logprobs(hidden, weight, None, torch.tensor([0, 0]), 1.0, 1)
    assert logprobs.tolist() == [0.0, -2000.0]
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_positions_times_vocabulary_never_exists(frozen, monkeypatch):
    """Peak extra memory of forward and backward is a few slices, not the whole logits."""
    sizes = []
    original = logprobs_module._logits
    monkeypatch.setattr(
        logprobs_module, "_logits", lambda *args: sizes.append(original(*args).numel()) or original(*args)
    )
    hidden = torch.randn(32, 8, requires_grad=True)
    weight = torch.randn(4096, 8, requires_grad=not frozen)
    logprobs, _ = token_logprobs(hidden, weight, None, torch.zeros(32, dtype=torch.long), 1.0, 256)
    logprobs.sum().backward()
    assert sizes == [32 * 256] * (4096 // 256 * (1 if frozen else 2))  # computed once where the matrix is frozen


@pytest.mark.parametrize("slice_size", [1, 3, 100])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("all_restricted", [False, True])
def test_restricted_equals_a_masked_softmax(slice_size, frozen, entropy, all_restricted):
    """Values and gradients against autograd over all logits, in float64; slices in which nothing is allowed to a row included."""
    generator = torch.Generator().manual_seed(2)
    double = {"dtype": torch.float64, "generator": generator}
    hidden = (3 * torch.randn(6, 4, **double)).requires_grad_()
    weight = torch.randn(11, 4, **double).requires_grad_(not frozen)
    bias = torch.randn(11, **double).requires_grad_(not frozen)
    sets = {0: (2, 3, 10), 2: (0, 9), 3: (2, 3, 10), 5: (7,)}
    sets |= {1: (0, 1, 2), 4: (4, 10)} if all_restricted else {}
    targets = torch.tensor([3, 1, 9, 10, 4, 7])
    left, right = torch.randn(2, 6, **double)
    found = restricted_logprobs(hidden, weight, bias, targets, Allowed.of(sets), 0.7, slice_size)

    logits = (hidden @ weight.T + bias) / 0.7
    mask = torch.ones(6, 11, dtype=torch.bool)
    for row, tokens in sets.items():
        mask[row] = False
        mask[row, list(tokens)] = True
    logprobs = logits.masked_fill(~mask, -torch.inf).log_softmax(-1)
    own = logprobs[torch.arange(6), targets]
    expected = own, -(logprobs.exp() * logprobs.masked_fill(~mask, 0)).sum(-1), own >= logprobs.amax(-1)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    inputs = [hidden] if frozen else [hidden, weight, bias]
    losses = [(one[0] * left).sum() + ((one[1] * right).sum() if entropy else 0) for one in (found, expected)]
    for one, other in zip(*(torch.autograd.grad(loss, inputs) for loss in losses), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_products_in_float32_have_gradients(monkeypatch):
    """On CUDA torch multiplies so, without a derivative; a CPU does not."""
    monkeypatch.setattr(torch, "mm", lambda left, right, out_dtype: left.to(out_dtype) @ right.to(out_dtype))
    left, right = (torch.randn(size, dtype=torch.bfloat16, requires_grad=True) for size in ((3, 4), (4, 5)))
    found = logprobs_module._ProductInFloat32.apply(left, right)
    assert found.dtype == torch.float32
    found.square().sum().backward()
    own, other = (one.detach().float().requires_grad_() for one in (left, right))
    (own @ other).square().sum().backward()
    torch.testing.assert_close(left.grad.float(), own.grad, atol=0.05, rtol=0.02)
    torch.testing.assert_close(right.grad.float(), other.grad, atol=0.05, rtol=0.02)
