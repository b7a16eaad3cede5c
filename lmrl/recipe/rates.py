"""Default learning rates, by objective, trained weights and model size.

| trained | imitation, values | policy gradients, reward models | preferences |
|---|---|---|---|
| all weights of a pretrained model of N parameters | 1e-3 (N / 1M)^-0.5 | 5e-4 (N / 1M)^-0.68 | half of that |
| an adapter on it | 10 times as much | 10 times as much | 10 times as much |
| a model from scratch | 1e-3 (N / 1M)^-0.25 | 5e-4 (N / 1M)^-0.25 | half of that |

None is above 1e-3, and N counts as at least 1M. The curves go through settings that are known to work: fine-tuning of all weights
with 1e-5 at 7B (Llama 2, arXiv 2307.09288, uses 2e-5) and about 1e-4 at 125M; policy gradients with 1e-6 at 7B (verl's examples),
far below imitation; DPO with 5e-7 at 7B (Zephyr, arXiv 2310.16944). Adapters need about ten times the rate of all weights (Schulman
et al., "LoRA without regret", 2025). If policy gradients still move the policy too far, `training.kl_band` lowers the rate.

Muon and NAMO use the rates of AdamW: their steps have about the same size (Liu et al., arXiv 2502.16982, section 2.2). For all
weights of a small model, which has to find features that imitation did not teach it, they are the default where that was measured:
orthogonal steps move rare directions as far as common ones (Wang et al., arXiv 2509.26030). NAMO trains PPO, GRPO and its relatives,
whose rate is constant, so that steps must get short where gradients disagree; Muon trains Q values on logged episodes alone, whose
rate falls to 0.

A head starts at zero, on a hidden state of D numbers: one step of Adam moves a linear head's output by up to the rate times their sum.
So a value head's rate is 1 / D, at most 1e-2; Q heads, which have their own layer or an entry for each token, use 1e-3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lmrl.recipe.recipe import Recipe
from lmrl.recipe.steps import Optimizer

MOST = 1e-3
MILLION = 1e6
ADAPTER = 10.0
"""Learning rate of an adapter, relative to that of all weights."""
SMALL = 1e7
"""Parameters below which a model is small; pretrained language models that are of use are larger."""
UNKNOWN_SIZE = 1e9
"""Parameters assumed for a model whose size is unknown before it is loaded."""


@dataclass(frozen=True)
class Rates:
    """Learning rates of the trunk and of the heads, and why."""

    lr: float
    head_lr: float
    reason: str


def default_rates(recipe: Recipe, parameters: int, hidden: int) -> Rates:
    """Default rates of a stage whose model has this many parameters and this hidden size."""
    curve = recipe.objective.rate_curve
    exponent = curve.exponent
    size = f"{parameters / MILLION:,.2g}M" if parameters < 10 * MILLION else f"{parameters / MILLION:,.0f}M"
    if recipe.model.config is not None:
        trains, factor, exponent = "a model from scratch", 1.0, 0.25
    elif recipe.model.lora is not None:
        trains, factor = "an adapter on a model", ADAPTER
    else:
        trains, factor = "all weights of a pretrained model", 1.0
    lr = _two_digits(min(factor * curve.lr * max(parameters / MILLION, 1.0) ** -exponent, MOST))
    head_lr = _two_digits(recipe.objective.head_lr(lr, hidden))
    return Rates(lr, head_lr, f"{curve.learns}, {trains} of {size} parameters")


def with_rates(recipe: Recipe, parameters: int, hidden: int, sharded: bool = False) -> Optimizer:
    """A stage's optimizer section with defaults for all that it does not set.

    If only `lr` is set, heads use it too, unless the objective says otherwise. sharded: no process has whole matrices.
    """
    stated, rates = recipe.optimizer, default_rates(recipe, parameters, hidden)
    lr = rates.lr if stated.lr is None else stated.lr
    head_lr = rates.head_lr if stated.head_lr is None else stated.head_lr
    if stated.head_lr is None and stated.lr is not None and recipe.objective.head_lr_follows:
        head_lr = lr
    small = recipe.model.lora is None and parameters < SMALL and not sharded
    name = stated.name or (recipe.objective.small_optimizer(recipe) if small else "adamw")
    schedule = stated.schedule or default_schedule(recipe)
    betas = stated.betas or recipe.objective.betas
    norm = recipe.objective.max_grad_norm if stated.max_grad_norm == "auto" else stated.max_grad_norm
    floor = recipe.objective.norm_floor if stated.norm_floor is None else stated.norm_floor
    chosen = {"name": name, "lr": lr, "head_lr": head_lr, "schedule": schedule, "betas": betas, "norm_floor": floor}
    return stated.model_copy(update=chosen | {"max_grad_norm": norm})


def default_schedule(recipe: Recipe) -> Literal["constant", "linear"]:
    """The schedule of a stage that sets none."""
    return "constant" if recipe.source.plays else "linear"


def _two_digits(rate: float) -> float:
    return round(rate, 1 - math.floor(math.log10(rate)))
