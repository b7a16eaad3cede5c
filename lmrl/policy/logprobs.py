"""Log-probabilities of chosen tokens without ever holding positions x vocabulary.

`token_logprobs` is the one primitive that every objective goes through. It takes hidden states at action positions
only, projects them to the vocabulary in slices with a running log-sum-exp, and recomputes each slice in the backward
pass, as fused cross-entropy kernels do (see Wijmans et al., "Cut your losses in large-vocabulary language models",
arXiv 2411.09009).

Where the vocabulary matrix W is frozen, nothing is recomputed: d log p(a) / d hidden = W_a - sum_v p_v W_v, and that sum is
attention with W as keys and values, so the forward pass keeps it with the same running maximum (Milakov and Gimelshein,
"Online normalizer calculation for softmax", arXiv 1805.02867).
"""

from __future__ import annotations

import math

import torch

from lmrl.recipe.estimates import SLICE


def token_logprobs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    temperature: float = 1.0,
    slice_size: int = SLICE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of each distribution, both of shape (N,), in nats.

    The distribution is softmax((hidden @ weight.T + bias) / temperature). Accumulates in float32 at least.
    """
    return _TokenLogprobs.apply(hidden_ND, weight_VD, bias_V, targets_N, temperature, slice_size)


def _logits(hidden, weight, bias, temperature, start, end) -> torch.Tensor:
    logits = hidden @ weight[start:end].T
    if bias is not None:
        logits = logits + bias[start:end]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, slice_size):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        mean_wanted = need_hidden and not (need_weight or need_bias)
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(weight.dtype)
            top = hidden.new_full(targets.shape, -math.inf, dtype=torch.promote_types(hidden.dtype, torch.float32))
            total, weighted, picked = (torch.zeros_like(top) for _ in range(3))
            mean = torch.zeros_like(hidden, dtype=top.dtype) if mean_wanted else None
            for start in range(0, weight.shape[0], slice_size):
                end = min(start + slice_size, weight.shape[0])
                logits = _logits(hidden, weight, bias, temperature, start, end)
                inside = (targets >= start) & (targets < end)
                found = logits.gather(1, (targets - start).clamp(0, end - start - 1)[:, None])[:, 0]
                picked = torch.where(inside, found, picked)
                new_top = torch.maximum(top, logits.amax(dim=1))
                shrink = (top - new_top).exp()
                exp = (logits - new_top[:, None]).exp_()
                total = total * shrink + exp.sum(dim=1)
                if mean_wanted:
                    mean.mul_(shrink[:, None]).add_(exp.to(weight.dtype) @ weight[start:end])
                weighted = weighted * shrink + exp.mul_(logits).sum(dim=1)
                top = new_top
            lse = top + total.log()
            entropy = lse - weighted / total
            if mean_wanted:
                mean.div_(total[:, None])
        # Not the parameter itself: where weights are shared out over processes, that is empty by then.
        ctx.save_for_backward(
            hidden, weight.detach(), None if bias is None else bias.detach(), targets, lse, entropy, mean
        )
        ctx.temperature, ctx.slice_size = temperature, slice_size
        return picked - lse, entropy

    @staticmethod
    def backward(ctx, grad_logprob, grad_entropy):
        hidden, weight, bias, targets, lse, entropy, mean = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        has_entropy = bool(grad_entropy.any())
        if mean is not None and not has_entropy:
            with torch.autocast(hidden.device.type, enabled=False):
                slope = (weight[targets] - mean).mul_(grad_logprob[:, None] / ctx.temperature)
            return slope.to(hidden.dtype), None, None, None, None, None
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_bias = torch.empty_like(bias) if need_bias and bias is not None else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, weight.shape[0], ctx.slice_size):
                end = min(start + ctx.slice_size, weight.shape[0])
                logprob = _logits(hidden, weight, bias, ctx.temperature, start, end).sub_(lse[:, None])
                prob = logprob.exp()
                # d logprob / d logit = 1[target] - p;  d entropy / d logit = -p (log p + H)
                if has_entropy:
                    slope = grad_entropy[:, None] * (logprob + entropy[:, None]) + grad_logprob[:, None]
                    grad = prob.mul_(slope).neg_()
                else:
                    grad = prob.mul_(grad_logprob[:, None]).neg_()
                inside = ((targets >= start) & (targets < end)).nonzero()[:, 0]
                grad[inside, targets[inside] - start] += grad_logprob[inside]
                grad = grad.div_(ctx.temperature).to(weight.dtype)
                if need_hidden:
                    grad_hidden += grad @ weight[start:end]
                if need_weight:
                    grad_weight[start:end] = grad.T @ hidden
                if grad_bias is not None:
                    grad_bias[start:end] = grad.sum(dim=0)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type, or float32 where that is wider."""
    return torch.promote_types(dtype, torch.float32)
