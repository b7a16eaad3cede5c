"""Learning rates where a recipe names none: by what is learned, what is trained, and how large the model is.

| trained | imitation, values | policy gradients, reward models | preferences |
|---|---|---|---|
| all weights of a pretrained model of N parameters | 1e-3 (N / 1M)^-0.5 | 5e-4 (N / 1M)^-0.68 | half of that |
| an adapter on it | 10 times as much | 10 times as much | 10 times as much |
| a model from scratch | 1e-3 (N / 1M)^-0.25 | 5e-4 (N / 1M)^-0.25 | half of that |

None is above 1e-3, and N counts as 1M at least. The curves go through settings that are known to work: fine-tuning of all weights with 1e-5 at 7B (Llama 2,
arXiv 2307.09288, has 2e-5) and about 1e-4 at 125M; policy gradients with 1e-6 at 7B (verl's examples), which is far below
imitation; DPO with 5e-7 at 7B (Zephyr, arXiv 2310.16944). Adapters want about ten times the rate of all weights (Schulman et al.,
"LoRA without regret", 2025). Where policy gradients still move the policy too far, `training.kl_band` lowers the rate.

A head begins at zero, on a hidden state of D numbers: a step of Adam moves a linear one by up to the rate times their sum. So a
value head's rate is 1 / D, at most 1e-2; Q heads, which have a layer of their own or an entry for each token, take 1e-3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lmrl.recipe.objective import DPOObjective, PolicyGradientObjective, PPOObjective, QObjective, RewardModelObjective
from lmrl.recipe.recipe import Recipe
from lmrl.recipe.steps import Optimizer

MOST, HEAD_MOST, Q_HEAD = 1e-3, 1e-2, 1e-3
MILLION = 1e6
ADAPTER = 10.0
"""How many times the rate of all weights an adapter takes."""
SHORT_MEMORY, LONG_MEMORY = (0.9, 0.95), (0.9, 0.999)
"""Adam's decay rates. After a long run of small gradients a sudden one moves each weight by up to (1 - beta1) / sqrt(1 - beta2) times
the rate: 3.2 times with 0.999, which was seen to throw a policy near its optimum 4 nats a token away in one update; 0.45 times with
0.95."""
GRAD_NORM, Q_GRAD_NORM = 1.0, 10.0
"""Norms that gradients are shortened to. A regression on returns must not be held to what its usual gradients have: the mean of rare
large returns is in the rare large gradients, and where these count no more than the others, the values learn about the median
(docs/offline.md has what was measured). 10 is also what DQNs use."""
UNKNOWN_SIZE = 1e9
"""Parameters of a model whose size cannot be told before it is loaded."""


@dataclass(frozen=True)
class Rates:
    """Learning rates of the trunk and of the heads, and why."""

    lr: float
    head_lr: float
    reason: str


def default_rates(recipe: Recipe, parameters: int, hidden: int) -> Rates:
    """The rates of a stage whose model has this many parameters and this width."""
    base, exponent, learns = _kind(recipe.objective)
    size = f"{parameters / MILLION:,.2g}M" if parameters < 10 * MILLION else f"{parameters / MILLION:,.0f}M"
    if recipe.model.config is not None:
        trains, factor, exponent = "a model from scratch", 1.0, 0.25
    elif recipe.model.lora is not None:
        trains, factor = "an adapter on a model", ADAPTER
    else:
        trains, factor = "all weights of a pretrained model", 1.0
    lr = _two_digits(min(factor * base * max(parameters / MILLION, 1.0) ** -exponent, MOST))
    is_value_head = isinstance(recipe.objective, PPOObjective)
    head_lr = _two_digits(min(1 / hidden, HEAD_MOST)) if is_value_head else max(lr, Q_HEAD)
    return Rates(lr, head_lr, f"{learns}, {trains} of {size} parameters")


def with_rates(recipe: Recipe, parameters: int, hidden: int) -> Optimizer:
    """A stage's optimizer section with the rates, the schedule, the decay rates and the norm that it leaves open.

    A Q head follows a stated `lr` if no `head_lr` is stated.
    """
    stated, rates = recipe.optimizer, default_rates(recipe, parameters, hidden)
    lr = rates.lr if stated.lr is None else stated.lr
    head_lr = rates.head_lr if stated.head_lr is None else stated.head_lr
    if stated.head_lr is None and stated.lr is not None and not isinstance(recipe.objective, PPOObjective):
        head_lr = lr
    schedule = stated.schedule or ("linear" if recipe.source.name == "dataset" else "constant")
    betas = stated.betas or (SHORT_MEMORY if isinstance(recipe.objective, PolicyGradientObjective) else LONG_MEMORY)
    norm = stated.max_grad_norm
    if norm == "auto":
        norm = Q_GRAD_NORM if isinstance(recipe.objective, QObjective) else GRAD_NORM
    chosen = {"lr": lr, "head_lr": head_lr, "schedule": schedule, "betas": betas, "max_grad_norm": norm}
    return stated.model_copy(update=chosen)


def _kind(objective: object) -> tuple[float, float, str]:
    """Rate of a model of a million parameters, how it falls with their number, and what is learned."""
    if isinstance(objective, PolicyGradientObjective):
        return 5e-4, 0.68, "policy gradients"
    if isinstance(objective, RewardModelObjective):
        return 5e-4, 0.68, "a reward model"
    if isinstance(objective, DPOObjective):
        return 2.5e-4, 0.68, "preferences"
    return 1e-3, 0.5, "imitation and values"


def _two_digits(rate: float) -> float:
    return round(rate, 1 - math.floor(math.log10(rate)))
