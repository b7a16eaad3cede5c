"""Objectives whose policy decodes with Q values: ILQL, Monte Carlo returns, Q-SFT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lmrl.recipe.objectives.base import BINS, ObjectiveOptions

if TYPE_CHECKING:
    from lmrl.recipe.recipe import Recipe


class Discounts(ObjectiveOptions):
    """Discounting of later rewards."""

    gamma: float = Field(0.99, gt=0, le=1)
    """Discount per turn."""
    gamma_token: float = Field(1.0, gt=0, le=1)
    """Discount per token inside a turn."""


class Guidance(ObjectiveOptions):
    """How a policy with Q values decodes: log pi + beta Q, over the tokens within the behaviour policy's support."""

    beta: float = Field(64.0, ge=0)
    """Default weight of Q in decoding (an inference setting: sweep it with `lmrl eval --beta 1,4,16,64`)."""
    support: float = Field(0.01, ge=0, lt=1)
    """Tokens less likely than this under the likelihood-trained policy are never drawn (0: no such mask)."""

    uses_sampling_temperature = False
    uses_correction = False
    values_log = True

    @property
    def needs_returns(self) -> bool:
        """True if it learns from the returns that followed, which it cannot bootstrap."""
        return False

    @property
    def folds(self) -> bool:
        """True if Q can be folded into the vocabulary matrix."""
        return False

    @property
    def export_options(self) -> str:
        return f"--beta {self.beta:g}" + ("" if self.folds or not self.beta else " --distill")

    def mistakes(self, recipe: Recipe) -> Iterator[str]:
        for key, section, _ in recipe.source.sections(recipe):
            if section.best < 1:
                yield f"objective '{self.name}' learns from bad episodes as well as good ones: leave {key}.best at 1"
            if self.needs_returns and getattr(section, "turns", None) is not None:
                yield f"`{key}.turns` cuts off the returns that followed, which the objective needs: leave it out"


class QObjective(Discounts, Guidance):
    """Options of all objectives with Q heads."""

    minibatches: int = Field(1, ge=1)
    """Updates per step, each on a part of its episodes."""
    q_head: Literal["mlp", "linear", "tied"] = "mlp"
    """mlp: two layers; linear: one; tied: the vocabulary matrix times a d x d matrix. `lmrl export` folds the last two."""
    trunk: Literal["auto", "shared", "detached", "separate"] = "auto"
    """What the heads are built on: the policy's last hidden states (shared), the same without a gradient into the policy (detached), or
    a separate copy of the model (separate). auto: separate for MLP heads if all weights are trained, since values may need features
    that imitation does not; else shared, which adapters and exports need."""
    value_normalization: Literal["returns", "none"] = "returns"
    """returns: values, `beta` and `start_value` are in units of the log's returns: relative to their mean, and divided by their
    standard deviation or the size of a reward, whichever is less. none: in units of the reward."""
    start_value: float | Literal["lowest", "mean"] = "mean"
    """Value of Q before learning, which it keeps for unseen tokens: `mean` is the mean return in the data, the start closest to most
    values; `lowest` is the lowest return, so that unseen tokens look bad even without `support`."""
    value_loss: Literal["squared", "hl_gauss"] = "squared"
    """hl_gauss: values as categories over the returns in the data (Farebrother et al., arXiv 2403.03950)."""
    cql_coef: float = Field(0.1, ge=0)
    """Weight of the push-down of Q outside the data, CE(Q / cql_temperature, action) (CQL, arXiv 2006.04779)."""
    cql_temperature: float = Field(1.0, gt=0)
    """Temperature of that push-down."""
    calibrated: bool = False
    """Push no value below the return that the data realised (Cal-QL, Nakamoto et al., arXiv 2303.05479)."""
    bc_coef: float = Field(1.0, ge=0)
    """Weight of the likelihood of the actions (0: the policy is not trained)."""

    @model_validator(mode="after")
    def _bins_need_mlp(self) -> QObjective:
        if self.value_loss == "hl_gauss" and self.q_head != "mlp":
            raise ValueError("`value_loss: hl_gauss` is not linear in the hidden state: it needs `q_head: mlp`")
        if self.calibrated and self.cql_coef == 0:
            raise ValueError("`calibrated` limits the push-down of `cql_coef`, which is 0")
        return self

    max_grad_norm = 10.0
    """Rare large returns cause rare large gradients: if these are clipped to the size of usual ones, the regression learns about the
    median instead of the mean (measurements: docs/offline.md). 10 is also usual for DQNs."""
    twins: ClassVar[int] = 1
    """Q heads, each with a target."""
    has_value: ClassVar[bool] = False
    """True if there is also a head for V."""

    def mistakes(self, recipe: Recipe) -> Iterator[str]:
        yield from super().mistakes(recipe)
        if self.trunk == "separate" and recipe.model.lora is not None:
            yield "`objective.trunk: separate` trains a second copy of all weights: with model.lora use shared (or detached)"

    @property
    def needs_returns(self) -> bool:
        return self.calibrated

    def small_optimizer(self, recipe: Recipe) -> str:
        return "adamw" if recipe.source.plays else "muon"  # whose steps stay as long as the rate lets them

    def resolved(self, recipe: Recipe) -> Self:
        if self.trunk != "auto":
            return self
        own = recipe.model.lora is None and self.q_head == "mlp"
        return self.model_copy(update={"trunk": "separate" if own else "shared"})

    def head_parameters(self, hidden: int, vocabulary: int) -> tuple[int, int]:
        outputs = BINS if self.value_loss == "hl_gauss" else 1

        def mlp(entries: int) -> int:
            return 2 * hidden * (hidden + 1) + (2 * hidden + 1) * entries * outputs

        one = {"mlp": mlp(vocabulary), "linear": hidden * vocabulary, "tied": hidden * hidden}[self.q_head]
        heads = self.twins * one + (mlp(1) if self.has_value else 0)
        return heads, heads

    def trained_parameters(self, learned: int, total: int) -> tuple[int, int]:
        return learned, total if self.trunk == "separate" else 0

    @property
    def folds(self) -> bool:
        return self.q_head != "mlp" and self.trunk != "separate"


class ILQLObjective(QObjective):
    """Implicit language Q-learning on logged data (Snell et al., arXiv 2206.11871)."""

    name: Literal["ilql"]
    twins, has_value = 2, True
    expectile: float = Field(0.8, gt=0, lt=1)
    """How close V is to the best action in the data (0.5: the mean)."""
    polyak: float = Field(0.05, gt=0, le=1)
    """Polyak step of the targets of Q and V at every update. Values propagate back by one turn in about 2 / polyak updates;
    published runs of tens of thousands of updates use 0.005."""
    awbc_beta: float = Field(0.0, ge=0)
    """Weights the likelihood by exp(awbc_beta x advantage) (0: unweighted)."""


class MCObjective(QObjective):
    """Q by regression on observed (Monte Carlo) returns, and decoding guided by it."""

    name: Literal["mc"]

    @property
    def needs_returns(self) -> bool:
        return True


class QSFTObjective(Discounts, Guidance):
    """Q-learning by supervised fine-tuning (Hong et al., arXiv 2411.05193): Q from a second model's probabilities, without heads."""

    name: Literal["q_sft"]
    return_range: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest return-to-go of an episode; returns are scaled from this range to [0, 1]."""
    polyak: float = Field(0.005, gt=0, le=1)
    """Polyak step of the target model at every update."""

    @model_validator(mode="after")
    def _ordered_range(self) -> QSFTObjective:
        if not self.return_range[0] < self.return_range[1]:
            raise ValueError("`return_range` is [LOW, HIGH] with LOW < HIGH")
        return self

    def mistakes(self, recipe: Recipe) -> Iterator[str]:
        if recipe.source.plays:
            yield (
                "objective 'q_sft' measures values against the behaviour that made the data, which fresh episodes change: "
                "set source.name=dataset (for online learning use objective.name=ilql)"
            )
        yield from super().mistakes(recipe)
        if recipe.model.lora is not None:
            yield "objective 'q_sft' trains a second copy of all weights: leave model.lora out"

    def trained_parameters(self, learned: int, total: int) -> tuple[int, int]:
        return 0, total  # trains a copy, not the policy
