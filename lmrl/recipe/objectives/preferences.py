"""Objectives that learn from preferences: DPO and its variants, and reward models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from lmrl.recipe.objectives.base import ObjectiveOptions, RateCurve

if TYPE_CHECKING:
    from lmrl.recipe.recipe import Recipe

PREFERENCE_LOSSES = Literal[
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "simpo",
    "orpo",
]


class DPOObjective(ObjectiveOptions):
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290) and its variants, on pairs of episodes.

    The pairs are chosen and rejected of preference data, or the best and the worst of several episodes of a prompt.
    """

    name: Literal["dpo"]
    rate_curve = RateCurve(2.5e-4, 0.68, "preferences")
    uses_sampling_temperature = False
    uses_correction = False
    episodes_a_row = 2
    loss: PREFERENCE_LOSSES = "sigmoid"
    """Named as in trl (sigmoid_norm: per token instead of per episode); formulas and papers are in lmrl/objectives/dpo.py."""
    beta: float = Field(0.1, gt=0)
    """How strongly the policy is held to the reference; for simpo and orpo, the weight of the margin."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of pairs with swapped labels (sigmoid, robust, exo_pair)."""
    target_margin: float = Field(0.5, ge=0)
    """Margin of simpo: how much better a token of the chosen episode has to be, times beta."""
    sft_coef: float | None = Field(None, ge=0)
    """Weight of the likelihood of the chosen episodes, per token (null: 1 with orpo, else 0)."""
    minibatches: int = Field(1, ge=1)
    """Updates per step, each on a part of its pairs."""
    share_prompts: bool = True
    """Compute the common prefix of a pair only once, if the model allows it."""
    cache_reference: bool = False
    """Compute the reference's log-probabilities of logged episodes once, before the first step, and cache them on disk
    for later runs of the same model on the same data. Without LoRA this saves the reference's memory."""

    @property
    def reference_free(self) -> bool:
        return self.loss in ("simpo", "orpo")

    @property
    def holds_reference(self) -> bool:
        return not (self.reference_free or self.cache_reference)

    @model_validator(mode="after")
    def _sensible(self) -> DPOObjective:
        if self.label_smoothing and self.loss not in ("sigmoid", "robust", "exo_pair"):
            raise ValueError(f"`label_smoothing` is for sigmoid, robust and exo_pair; loss '{self.loss}' has none")
        if self.loss == "exo_pair" and not self.label_smoothing:
            raise ValueError("`loss: exo_pair` needs `label_smoothing` above 0 (its paper uses 1e-3)")
        if self.cache_reference and self.reference_free:
            raise ValueError(f"`cache_reference`: loss '{self.loss}' has no reference")
        return self

    def mistakes(self, recipe: Recipe) -> Iterator[str]:
        source = recipe.source
        if source.plays and source.has_log:
            yield "objective 'dpo' learns from logged pairs or from fresh ones, not both: set source.name=dataset (or rollouts)"
        elif not source.has_log and recipe.rollouts.samples == 1:
            yield "objective 'dpo' compares samples of the same prompt: set rollouts.samples to 2 or more"
        for key, section, _ in source.sections(recipe):
            if section.best < 1:
                yield f"objective 'dpo' learns from bad episodes as well as good ones: leave {key}.best at 1"
            if getattr(section, "turns", None) is not None:
                yield f"objective 'dpo' compares whole episodes: leave {key}.turns out"
        if self.cache_reference and source.plays:
            yield "`objective.cache_reference` is for logged episodes, which are used again: set source.name=dataset"


class RewardModelObjective(ObjectiveOptions):
    """A reward model from preferences (Bradley-Terry; Ouyang et al., arXiv 2203.02155), trained by trl's RewardTrainer.

    The source is a dataset of chosen and rejected completions. The result is a transformers sequence classifier with one
    output, which later stages can use as a reward: `task.rewards: [{model: stages/NAME}]`.
    """

    name: Literal["reward_model"]
    rate_curve = RateCurve(5e-4, 0.68, "a reward model")
    leaves_policy = False
    uses_correction = False
    holdout: float = Field(0.1, ge=0, lt=1)
    """Share of the prompts whose pairs are held out for evaluation; includes those that `task.prompts` holds out."""
    max_length: int = Field(1024, ge=1)
    """Maximum tokens of prompt plus completion; a longer text keeps its end."""
    center_coef: float = Field(0.0, ge=0)
    """Weight of the squared sum of a pair's rewards, which keeps their mean at zero (Eisenstein et al., arXiv 2312.09244)."""

    def mistakes(self, recipe: Recipe) -> Iterator[str]:
        from lmrl.recipe.source import DatasetSource

        source = recipe.source
        if recipe.optimizer.name not in ("adamw", None):
            yield f"`optimizer.name={recipe.optimizer.name}`: a reward model is trained with adamw: set that for its stage"
        learns = "objective 'reward_model' learns from pairs of a chosen and a rejected completion"
        if not isinstance(source, DatasetSource) or source.path is None:
            yield f"{learns}: set source.name=dataset and source.path (and leave source.player out)"
            return
        if source.best < 1:
            yield f"{learns}, which have no returns to rank them by: leave source.best at 1"
        if source.turns is not None:
            yield f"{learns} as a whole: leave source.turns out"

    def tokens_a_row(self) -> int | None:
        return 2 * self.max_length  # of a pair
