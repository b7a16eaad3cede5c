"""Heads next to the vocabulary projection: a value head, and twin Q heads with targets.

Every head is `features(hidden)` times a weight matrix, so that Q values of a large vocabulary can be sliced as its
log-probabilities are (see logprobs.py) and, if the features are linear, folded into it (see export.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lmrl.policy.language_model import float32, trunk_of
from lmrl.policy.logprobs import token_logprobs
from lmrl.policy.pull import with_gradient_times

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BINS = 51
"""Categories of a value (Farebrother et al., section 4)."""
CHUNK = 2**22
"""Numbers that a slice of Q values over the vocabulary may hold."""

HeadKind = Literal["mlp", "linear", "tied"]
BUFFERS = {
    "offset": 0.0,
    "scale": 1.0,
    "v_offset": 0.0,
    "low": -1.0,
    "high": 1.0,
    "mean": 0.0,
    "std": 1.0,
    "gain": 1.0,
    "shift": 0.0,
    "peak": 0.0,
}
"""Numbers of `Values` and their values before anything is learned from returns; `peak`: the largest `std` so far."""


@dataclass(frozen=True)
class HeadsSpec:
    """Which heads a policy carries, and how they guide its decoding unless something else is asked for."""

    value: bool = True
    q: Literal["mlp", "linear", "tied", "probability"] | None = None
    """probability: no head, but the probabilities of a second model (Q-SFT)."""
    twins: int = 2
    value_target: bool = False
    """Give the value head a target even if there are no Q heads."""
    trunk: Literal["shared", "detached", "separate"] = "shared"
    bins: int = 0
    """Categories of a value (HL-Gauss); 0: plain numbers and squared error."""
    beta: float = 1.0
    support: float = 0.0


# ------------------------------------------------------------------------------------------------------------ mathematics
def hl_gauss(values_N: torch.Tensor, low: float, high: float, bins: int) -> torch.Tensor:
    """Target distribution (N, bins) of values: a Gaussian of .75 bin widths, integrated over each bin.

    Farebrother et al., "Stop regressing" (arXiv 2403.03950), section 3.1. Values outside [low, high] are clipped.
    """
    width = (high - low) / bins
    edges = torch.linspace(low, high, bins + 1, device=values_N.device, dtype=values_N.dtype)
    distance = (edges - values_N.clamp(low, high)[..., None]) / (0.75 * width * math.sqrt(2))
    cumulative = torch.erf(distance)
    mass = cumulative[..., 1:] - cumulative[..., :-1]
    return mass / (cumulative[..., -1:] - cumulative[..., :1])


def category_loss(logits_NK: torch.Tensor, values_N: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Cross-entropy of categories to values, (N,)."""
    return -(hl_gauss(values_N, low, high, logits_NK.shape[-1]) * logits_NK.log_softmax(-1)).sum(-1)


def bin_centres(low: float, high: float, bins: int, like: torch.Tensor) -> torch.Tensor:
    """Value of each category, (bins,)."""
    width = (high - low) / bins
    return torch.linspace(low + width / 2, high - width / 2, bins, device=like.device, dtype=like.dtype)


def guide(logits_BV: torch.Tensor, q_BV: torch.Tensor, beta: float, support: float) -> torch.Tensor:
    """Logits of value-guided decoding, log pi + beta Q up to a constant (Snell et al., arXiv 2206.11871, section 4.3).

    Tokens less likely than `support` under pi are ruled out; pi's most likely token never is.
    """
    guided_BV = logits_BV.float() + beta * q_BV
    if support > 0:
        logprobs_BV = logits_BV.float().log_softmax(-1)
        floor_B1 = logprobs_BV.amax(-1, keepdim=True).clamp(max=math.log(support))
        guided_BV = guided_BV.masked_fill(logprobs_BV < floor_B1, -torch.inf)
    return guided_BV


# ------------------------------------------------------------------------------------------------------------------ heads
class Head(nn.Module):
    """`features(hidden)` @ weight.T (+ bias), in float32; the last layer starts at (nearly) zero.

    A `tied` head has no weight: it mixes the hidden states and takes the vocabulary's matrix for one.
    """

    def __init__(self, kind: HeadKind, width: int, outputs: int, bias: bool = True):
        super().__init__()
        self.kind, inner = kind, 2 * width if kind == "mlp" else width
        self.hidden = nn.Linear(width, inner) if kind == "mlp" else None
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.mix = nn.Parameter(torch.empty(width, width)) if kind == "tied" else None
        self.weight = nn.Parameter(torch.zeros(outputs, inner)) if kind != "tied" else None
        if kind != "mlp" and not bias:  # twins that start equal would stay equal
            nn.init.normal_(self._parameter, std=1e-3 / math.sqrt(width))

    @property
    def _parameter(self) -> nn.Parameter:
        """`mix` of a tied head, else `weight`."""
        found = self.mix if self.weight is None else self.weight
        assert found is not None
        return found

    def features(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        hidden_ND = hidden_ND.to(self.precision)
        if self.hidden is not None:
            deeper_ND: torch.Tensor = self.hidden(hidden_ND)
            return deeper_ND.relu()
        return hidden_ND if self.mix is None else hidden_ND @ self.mix.T

    @property
    def precision(self) -> torch.dtype:
        """Float32, or float64 if the policy has been cast to it."""
        return self._parameter.dtype

    def matrix(self, vocabulary_VD: torch.Tensor) -> torch.Tensor:
        """The matrix that multiplies features, (outputs, F)."""
        return vocabulary_VD.detach() if self.weight is None else self.weight

    def linear_weight(self, vocabulary_VD: torch.Tensor) -> torch.Tensor:
        """The matrix that maps hidden states to outputs, (outputs, D), of a head that is linear in them."""
        return self._parameter if self.mix is None else vocabulary_VD @ self.mix

    def outputs(self, features_NF: torch.Tensor, vocabulary_VD: torch.Tensor | None = None) -> torch.Tensor:
        """All outputs, (N, outputs). vocabulary_VD: needed by a tied head."""
        matrix: torch.Tensor | None = self.weight if vocabulary_VD is None else self.matrix(vocabulary_VD)
        assert matrix is not None
        outputs = features_NF @ matrix.to(features_NF.dtype).T
        return outputs if self.bias is None else outputs + self.bias


def _set_bias(head: Head, bias: torch.Tensor) -> None:
    assert head.bias is not None
    head.bias.copy_(bias)


class Heads(nn.ModuleList):
    """Heads of one kind, as twins are."""

    def __iter__(self) -> Iterator[Head]:
        for head in super().__iter__():
            assert isinstance(head, Head)
            yield head


class Trunks(NamedTuple):
    """A second model that heads stand on, and its target."""

    own: PreTrainedModel
    target: PreTrainedModel


class Values(nn.Module):
    """All heads of a policy, their targets, and their own trunk if the spec says so.

    Values are learned in normalised units: a return is `mean + std x value`. So no learning rate, no clipping range and no `beta`
    depends on how large rewards are. A value is `gain x (offset + scale x output) + shift` (or with categories their mean between
    `low` and `high`). Where the unit follows fresh returns, `renormalise` moves gain and shift so that every value keeps its
    meaning: PopArt (van Hasselt et al., arXiv 1602.07714) with the correction kept next to the weights instead of inside of
    them, so that it is the same however the weights are sharded, and targets share it. An optimizer that takes no notice of
    a gradient's size then has to step by 1 / gain, see `Updater`.
    """

    offset: torch.Tensor
    scale: torch.Tensor
    v_offset: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    gain: torch.Tensor
    shift: torch.Tensor
    peak: torch.Tensor

    def __init__(self, spec: HeadsSpec, width: int, tokens: int, lm: PreTrainedModel):
        super().__init__()
        self.spec, self.tokens = spec, tokens
        outputs = max(spec.bins, 1)
        self.v = Head("mlp" if spec.q else "linear", width, outputs) if spec.value else None
        kind = spec.q
        self.q = Heads()
        if kind is not None and kind != "probability":
            self.q.extend(Head(kind, width, tokens * outputs, kind == "mlp") for _ in range(spec.twins))
        self.target_q = copy.deepcopy(self.q).requires_grad_(False)
        has_target = self.v is not None and (spec.q is not None or spec.value_target)
        self.target_v = copy.deepcopy(self.v).requires_grad_(False) if self.v is not None and has_target else None
        self.trunk: PreTrainedModel | None = None
        self.target_trunk: PreTrainedModel | None = None
        if spec.trunk == "separate":
            own = copy.deepcopy(lm if spec.q == "probability" else trunk_of(lm))
            self.trunk = float32(own).requires_grad_(True)
            self.target_trunk = copy.deepcopy(self.trunk).requires_grad_(False)
        for name, value in BUFFERS.items():
            self.register_buffer(name, torch.tensor(value))

    @property
    def trunks(self) -> Trunks | None:
        """The heads' own trunk and its target, if the spec asks for one. Of Q-SFT they are whole language models."""
        if self.trunk is None or self.target_trunk is None:
            return None
        return Trunks(self.trunk, self.target_trunk)

    def calibrate(self, start: float, mean: float, scale: float, low: float, high: float) -> None:
        """Say what Q (`start`) and V (`mean`) are before learning, how far one unit of a head's output moves them, and the
        range of categories; all in normalised units."""
        with torch.no_grad():
            for name, value in (("offset", start), ("v_offset", mean), ("scale", scale), ("low", low), ("high", high)):
                getattr(self, name).fill_(value)
            if self.spec.bins:
                for head in (*self.q, *self.target_q):
                    _set_bias(head, self._logits_for(start).repeat(self.tokens))
                for value_head in (self.v, self.target_v):
                    if value_head is not None:
                        _set_bias(value_head, self._logits_for(mean))

    # -------------------------------------------------------------------------------------------------------------- units
    @property
    def is_normalised(self) -> bool:
        """True if the units have been taken from returns."""
        return bool(self.peak > 0)

    @torch.no_grad()
    def renormalise(self, mean: float, std: float, preserve: bool = True) -> None:
        """Take new units, a return being mean + std x value; preserve: keep what every value means (PopArt)."""
        if preserve:
            self.shift.copy_((self.std * self.shift + self.mean - mean) / std)
            self.gain.mul_(self.std / std)
        self.mean.fill_(mean)
        self.std.fill_(std)
        self.peak.fill_(max(float(self.peak), std))

    def to_returns(self, values_N: torch.Tensor) -> torch.Tensor:
        """Normalised values in the unit of the reward, (N,), double."""
        return float(self.mean) + float(self.std) * values_N.double()

    def to_values(self, returns_N: torch.Tensor) -> torch.Tensor:
        """Returns in normalised units, (N,), double."""
        return (returns_N.double() - float(self.mean)) / float(self.std)

    def _logits_for(self, value: float) -> torch.Tensor:
        probs = hl_gauss(self.low.new_tensor([value]), float(self.low), float(self.high), self.spec.bins)[0]
        return (probs + 1e-4).log()

    @torch.no_grad()
    def polyak_update(self, polyak: float) -> None:
        """Move the target heads towards the heads: target += polyak * (head - target)."""
        pairs: list[tuple[nn.Module | None, nn.Module | None]] = [
            (self.q, self.target_q),
            (self.v, self.target_v),
            (self.trunk, self.target_trunk),
        ]
        for source, target in pairs:
            if source is None or target is None:
                continue
            for new, old in zip(source.parameters(), target.parameters(), strict=True):
                old.lerp_(new, polyak)

    # ------------------------------------------------------------------------------------------------------------- values
    def value(self, hidden_ND: torch.Tensor, head: Head | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """V of each state (N,) by the head (or `target_v`), and its categories' logits (N, bins) if there are any."""
        head = head or self.v
        assert head is not None
        if self.spec.bins:
            outputs = head.outputs(head.features(hidden_ND))
            return self._mean(outputs), outputs
        # The gain must not swell the head's gradient, which would fill the norm that all weights' gradients are clipped to.
        features = head.features(with_gradient_times(hidden_ND, self.gain))
        outputs = with_gradient_times(head.outputs(features), 1 / self.gain)
        return self.gain * (self.v_offset + self.scale * outputs[:, 0]) + self.shift, None

    def taken(
        self, head: Head, hidden_ND: torch.Tensor, actions_N: torch.Tensor, vocabulary_VD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Q of the given actions (N,), and their categories' logits (N, bins) if there are any."""
        features, weight = head.features(hidden_ND), head.matrix(vocabulary_VD)
        if self.spec.bins:
            rows = weight.view(self.tokens, self.spec.bins, -1)[actions_N]
            logits = torch.einsum("nkf,nf->nk", rows, features)
            if head.bias is not None:
                logits = logits + head.bias.view(self.tokens, -1)[actions_N]
            return self._mean(logits), logits
        output = (weight[actions_N].to(features.dtype) * features).sum(-1)
        output = output if head.bias is None else output + head.bias[actions_N]
        return self.gain * (self.offset + self.scale * output) + self.shift, None

    def all(self, head: Head, features_NF: torch.Tensor, vocabulary_VD: torch.Tensor) -> torch.Tensor:
        """Q of every token, (N, V), from `head.features(hidden)`."""
        outputs = head.outputs(features_NF, vocabulary_VD)
        if self.spec.bins:
            return self._mean(outputs.view(len(outputs), self.tokens, self.spec.bins))
        return self.gain * (self.offset + self.scale * outputs) + self.shift

    def push_down(
        self,
        head: Head,
        hidden_ND: torch.Tensor,
        actions_N: torch.Tensor,
        vocabulary_VD: torch.Tensor,
        temperature: float,
        floor_N: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """logsumexp_a(Q / T) - Q(action) / T for each state, (N,): the cross-entropy of CQL.

        floor_N: raise every Q to at least this much first (Cal-QL); then also the share of the tokens it lifted, (N,).
        """
        features = head.features(hidden_ND)
        if floor_N is None and not self.spec.bins:
            unit = self.gain * self.scale
            bias = None if head.bias is None else head.bias * unit
            weight = head.matrix(vocabulary_VD)
            return -token_logprobs(features * unit, weight, bias, actions_N, temperature)[0], None
        floors_N = torch.full_like(features[:, 0], -torch.inf) if floor_N is None else floor_N

        def rows(
            features_NF: torch.Tensor, actions_N: torch.Tensor, floors_N: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            q_NV = self.all(head, features_NF, vocabulary_VD)
            data_N = q_NV.gather(1, actions_N[:, None])[:, 0]
            lifted_N = (q_NV < floors_N[:, None]).float().mean(1).detach()
            return (torch.maximum(q_NV, floors_N[:, None]) / temperature).logsumexp(1) - data_N / temperature, lifted_N

        step = max(CHUNK // (self.tokens * max(self.spec.bins, 1)), 1)
        pieces = zip(features.split(step), actions_N.split(step), floors_N.split(step), strict=True)
        parts = [checkpoint(rows, *piece, use_reentrant=False) for piece in pieces]
        pushed, lifted = (torch.cat(column) for column in zip(*parts, strict=True))
        return pushed, None if floor_N is None else lifted

    def guiding(self, hidden_BD: torch.Tensor, vocabulary_VD: torch.Tensor) -> torch.Tensor:
        """Q of every token as decoding uses it, (B, V): the lower of the target twins."""
        values = [self.all(head, head.features(hidden_BD), vocabulary_VD) for head in self.target_q]
        return torch.stack(values).amin(0)

    def _mean(self, logits: torch.Tensor) -> torch.Tensor:
        centres = bin_centres(float(self.low), float(self.high), self.spec.bins, logits)
        return self.gain * (logits.softmax(-1) @ centres) + self.shift


def probability_ratio(p_logits_BV: torch.Tensor, pi_logits_BV: torch.Tensor) -> torch.Tensor:
    """Q values in [0, 1] as Q-SFT keeps them, p(a|s) / pi(a|s), (B, V).

    At its optimum p(a) = pi(a) Q(a) + (what the other actions leave over) / (V - 1), so the ratio is Q only where pi is
    well above 1 / V: use it inside the behaviour support alone.
    """
    return (p_logits_BV.float().log_softmax(-1) - pi_logits_BV.float().log_softmax(-1)).exp().clamp(max=1)
