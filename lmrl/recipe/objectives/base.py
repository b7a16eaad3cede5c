"""Base class of all objectives' sections: their options, and what the rest of lmrl needs to know about them without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from lmrl.recipe.base import Plugin, Section

if TYPE_CHECKING:
    from lmrl.recipe.recipe import Recipe

SHORT_MEMORY, LONG_MEMORY = (0.9, 0.95), (0.9, 0.999)
"""Adam's decay rates. After many small gradients, a sudden large one moves each weight by up to (1 - beta1) / sqrt(1 - beta2) times
the rate: 3.2 times with 0.999, which was seen to move a policy near its optimum by 4 nats per token in one update; 0.45 times with
0.95."""
HEAD_LR, LARGEST_HEAD_LR = 1e-3, 1e-2
BINS = 51
"""Number of categories of a value, as in lmrl.policy.heads."""


@dataclass(frozen=True)
class RateCurve:
    """Learning rate for training all weights of a pretrained model of N parameters: lr (N / 1M)^-exponent (see lmrl/recipe/rates.py).

    learns: what is learned, in words for the user.
    """

    lr: float
    exponent: float
    learns: str


class ObjectiveOptions(Section):
    """Base class of all objectives' options. A subclass adds its options, and overrides the defaults that differ."""

    name: str

    rate_curve: ClassVar[RateCurve] = RateCurve(1e-3, 0.5, "imitation and values")
    betas: ClassVar[tuple[float, float]] = LONG_MEMORY
    """AdamW's decay rates if the recipe does not set them."""
    max_grad_norm: ClassVar[float] = 1.0
    """Norm that gradients are clipped to if the recipe does not set one."""
    norm_floor: ClassVar[float] = 0.0
    """NAMO's `norm_floor` if the recipe does not set one."""
    uses_sampling_temperature: ClassVar[bool] = True
    """True if log-probabilities of fresh episodes are taken at the temperature that sampled them."""
    uses_correction: ClassVar[bool] = True
    """True if `rollouts.correction` may weight its loss."""
    imitates: ClassVar[bool] = False
    """True if it makes its episodes more likely, whatever they earned."""
    values_log: ClassVar[bool] = False
    """True if it learns values from what logged episodes earned."""
    leaves_policy: ClassVar[bool] = True
    """False if its result is a reward model instead of a policy."""
    twins: ClassVar[int] = 0
    """Q heads, each with a target."""
    episodes_a_row: ClassVar[int] = 1
    """Episodes in one row of logged data: 2 for pairs."""

    def mistakes(self, recipe: Recipe) -> Iterator[str]:
        """Yield one line, with the fix, for each part of a recipe that does not work with this objective."""
        yield from ()

    def resolved(self, recipe: Recipe) -> Self:
        """The options, with `auto` values filled in from the rest of the recipe."""
        return self

    def small_optimizer(self, recipe: Recipe) -> str:
        """The optimizer for all weights of a small model where the recipe names none."""
        return "adamw"

    def head_lr(self, lr: float, hidden: int) -> float:
        """Learning rate of heads on a model of hidden size `hidden` whose other weights use `lr`."""
        return max(lr, HEAD_LR)

    head_lr_follows: ClassVar[bool] = True
    """True if heads use `optimizer.lr` when the recipe sets it."""

    def head_parameters(self, hidden: int, vocabulary: int) -> tuple[int, int]:
        """Numbers of parameters in the trained heads, and in their targets."""
        return 0, 0

    def trained_parameters(self, learned: int, total: int) -> tuple[int, int]:
        """Numbers of parameters trained in the policy, and in a second model. learned: those of the adapters, or all; total: all."""
        return learned, 0

    def tokens_a_row(self) -> int | None:
        """Maximum tokens of a row; None if the options do not set one."""
        return None

    @property
    def holds_reference(self) -> bool:
        """True if it needs a frozen copy of the policy (without LoRA, where the adapter is switched off instead)."""
        return False

    @property
    def export_options(self) -> str:
        """Options of `lmrl export` that export the policy as it decodes."""
        return ""


class CustomObjective(ObjectiveOptions, Plugin):
    """A custom objective: `file.py:Name`, a dotted path, or the name of an installed one. Its keys are checked when its
    code is loaded."""
