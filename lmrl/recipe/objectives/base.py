"""The base of all objectives' sections: options, and the answers that the rest of lmrl needs before there are tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from lmrl.recipe.base import Plugin, Section

if TYPE_CHECKING:
    from lmrl.recipe.recipe import Recipe

SHORT_MEMORY, LONG_MEMORY = (0.9, 0.95), (0.9, 0.999)
"""Adam's decay rates. After a long run of small gradients a sudden one moves each weight by up to (1 - beta1) / sqrt(1 - beta2) times
the rate: 3.2 times with 0.999, which was seen to throw a policy near its optimum 4 nats a token away in one update; 0.45 times with
0.95."""
HEAD_LR, LARGEST_HEAD_LR = 1e-3, 1e-2
BINS = 51
"""Categories of a value, as in lmrl.policy.heads."""


@dataclass(frozen=True)
class RateCurve:
    """The learning rate for all weights of a pretrained model of N parameters: lr (N / 1M)^-exponent (see lmrl/recipe/rates.py).

    learns: what is learned, in words.
    """

    lr: float
    exponent: float
    learns: str


class ObjectiveOptions(Section):
    """Base of all. A subclass holds an objective's options, and overrides what is otherwise with it."""

    name: str

    rate_curve: ClassVar[RateCurve] = RateCurve(1e-3, 0.5, "imitation and values")
    betas: ClassVar[tuple[float, float]] = LONG_MEMORY
    """AdamW's decay rates, where the recipe states none."""
    max_grad_norm: ClassVar[float] = 1.0
    """Norm that gradients are shortened to, where the recipe states none."""
    uses_sampling_temperature: ClassVar[bool] = True
    """True if log-probabilities of fresh episodes are taken at the temperature that sampled them."""
    uses_correction: ClassVar[bool] = True
    """True if `rollouts.correction` may weigh its loss."""
    imitates: ClassVar[bool] = False
    """True if it makes the policy more like the episodes it is given, whatever they earned."""
    leaves_policy: ClassVar[bool] = True
    """False if its result is a reward model instead of a policy."""
    twins: ClassVar[int] = 0
    """Q heads, each with a target."""
    episodes_a_row: ClassVar[int] = 1
    """Episodes in one row of logged data: 2 of pairs."""

    def mistakes(self, recipe: Recipe) -> Iterator[str]:
        """One line, with the fix, for each part of a recipe that does not go with this objective."""
        yield from ()

    def resolved(self, recipe: Recipe) -> Self:
        """The options, with what they leave to the rest of the recipe."""
        return self

    def head_lr(self, lr: float, hidden: int) -> float:
        """Learning rate of heads, of a model of this width whose other weights take `lr`."""
        return max(lr, HEAD_LR)

    head_lr_follows: ClassVar[bool] = True
    """True if heads take an `optimizer.lr` that the recipe states."""

    def head_parameters(self, hidden: int, vocabulary: int) -> tuple[int, int]:
        """Parameters of the heads that are trained, and of their targets."""
        return 0, 0

    def trained_parameters(self, learned: int, total: int) -> tuple[int, int]:
        """Parameters trained in the policy, and in a second model. learned: those of the adapters or of all weights; total: all."""
        return learned, 0

    def tokens_a_row(self) -> int | None:
        """Most tokens of a row, where the options say so."""
        return None

    @property
    def holds_reference(self) -> bool:
        """True if a frozen copy of the policy is kept beside it, unless an adapter can be switched off instead."""
        return False

    @property
    def export_options(self) -> str:
        """What `lmrl export` needs to be told, to export the policy as it decodes."""
        return ""


class CustomObjective(ObjectiveOptions, Plugin):
    """A custom objective: `file.py:Name`, a dotted path, or the name of an installed one. Its keys are checked when its
    code is loaded."""
