"""Policy gradients: PPO, ArCHer, and those whose baseline comes from a group of episodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lmrl.recipe.objectives.base import BINS, LARGEST_HEAD_LR, SHORT_MEMORY, ObjectiveOptions, RateCurve
from lmrl.recipe.task import PromptTask

if TYPE_CHECKING:
    from lmrl.recipe.recipe import Recipe


RewardScale = Literal["auto", "group", "batch", "running", "none"]


class PolicyGradientObjective(ObjectiveOptions):
    """Options of all policy gradients, including the bounds of an update."""

    epochs: int = Field(2, ge=1)
    """Passes over a step's episodes."""
    minibatches: int = Field(4, ge=1)
    """Parts of a step's episodes; each pass makes an update from every part."""
    clip: float = Field(0.2, gt=0)
    """Clipping range of the ratio of new to old probability: [1 - clip, 1 + clip] (upper bound: `clip_high`, if set)."""
    clip_high: float | None = Field(None, gt=0)
    """Upper clipping bound, if it differs from `clip` (DAPO, arXiv 2503.14476, uses 0.28)."""
    dual_clip: float | None = Field(3.0, gt=1)
    """Upper bound of the ratio for negative advantages (Ye et al., arXiv 1912.09729; null: no bound)."""
    target_kl: float | None = Field(0.05, gt=0)
    """Limit in nats per token. If the policy has moved further than this from the sampling policy on a minibatch, that update is
    skipped, the previous one is undone, and the step's updates end (null: no limit). Shrinks below half a nat of entropy."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of an entropy bonus."""
    hold_entropy: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] | None = "auto"
    """Share of a stage's steps in which entropy falls from its first value to 0 at most in a straight line: below that an entropy bonus
    is added, in proportion to what is missing (null: never; auto: 0.5 with Muon and NAMO, else null)."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the divergence from the reference (0: none, and no reference is kept)."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Subtracted from the reward of a turn that was cut off by the token limit."""

    rate_curve = RateCurve(5e-4, 0.68, "policy gradients")
    betas = SHORT_MEMORY

    def small_optimizer(self, recipe: Recipe) -> str:
        return "namo"

    @property
    def holds_reference(self) -> bool:
        return self.kl_coef > 0

    def mistakes(self, recipe: Recipe) -> Iterator[str]:
        name = self.name
        if recipe.source.has_log:
            yield (
                f"objective '{name}' learns from its own fresh episodes: set source.name=rollouts "
                "(for logged data use objective.name=ilql or likelihood)"
            )
        elif recipe.source.best < 1:
            yield f"objective '{name}' learns from bad episodes as well as good ones: leave source.best at 1"
        if recipe.rollouts.top_p < 1 or recipe.rollouts.top_k > 0:
            yield (
                f"objective '{name}' needs the full distribution, because truncated sampling biases the probability ratio: "
                "set rollouts.top_p=1 and rollouts.top_k=0"
            )
        if recipe.rollouts.temperature == 0:
            yield f"objective '{name}' explores by sampling: set rollouts.temperature above 0"
        if recipe.rollouts.ahead and recipe.rollouts.correction == "none":
            yield (
                f"`rollouts.ahead=1` needs importance correction with objective '{name}', since older weights played the episodes: "
                "leave rollouts.correction at auto, or set rollouts.ahead=0"
            )


class PPOObjective(PolicyGradientObjective):
    """Proximal policy optimisation over action tokens (Schulman et al., arXiv 1707.06347)."""

    name: Literal["ppo"]
    head_lr_follows = False
    norm_floor = 0.5
    value_coef: float = Field(0.5, ge=0)
    """Weight of the value loss."""
    value_normalization: Literal["returns", "none"] = "returns"
    """returns: values are learned in units of the running mean and standard deviation of returns, so that the scale of rewards does
    not matter; unwhitened advantages are in these units too. none: in units of the reward."""
    value_clip: float | None = Field(None, gt=0)
    """Clipping range of the value around its old estimate, in the values' units (null: none)."""
    value_pull: Annotated[float, Field(ge=0)] | Literal["auto"] | None = "auto"
    """Bound on the values' gradient into a trunk shared with the policy, relative to the policy's own gradient, per
    token (null: none; auto: 1, but 0.1 with Muon and NAMO, whose steps make more of the smaller of two gradients)."""
    detach_value: bool = False
    """Stop the value loss's gradient at the trunk, so that it trains only the head."""
    value_warmup_steps: int = Field(10, ge=0)
    """Maximum number of first steps that train only the values; it ends earlier when their error on fresh returns stops falling."""
    value_loss: Literal["squared", "hl_gauss"] = "squared"
    """hl_gauss: values as categories over `value_range` (Farebrother et al., arXiv 2403.03950)."""
    value_range: tuple[float, float] = (-5.0, 5.0)
    """Lowest and highest value that `hl_gauss` can express, in the values' units."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per turn."""
    gamma_token: float = Field(1.0, gt=0, le=1)
    """Discount per token inside a turn."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation: 0 trusts the values, 1 the returns."""
    whiten_advantages: bool = True
    """Give a step's advantages zero mean and unit variance."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the divergence enters: per token in the reward (k1), or as a loss term (k3)."""
    kl_target: float | None = Field(None, gt=0)
    """Target divergence in nats per episode, towards which `kl_coef` is adapted (null: `kl_coef` is fixed)."""
    kl_horizon: int = Field(1000, ge=1)
    """Episodes over which `kl_coef` adapts."""

    @model_validator(mode="after")
    def _sensible(self) -> PPOObjective:
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("`kl_target` adapts `kl_coef`, which has to start above 0")
        if not self.value_range[0] < self.value_range[1]:
            raise ValueError("`value_range` is [LOW, HIGH] with LOW < HIGH")
        if (
            self.value_loss == "hl_gauss"
            and self.value_normalization == "none"
            and "value_range" not in self.model_fields_set
        ):
            raise ValueError(
                "`value_loss: hl_gauss` with `value_normalization: none` needs `value_range: [LOW, HIGH]`, the returns to expect"
            )
        return self

    def head_lr(self, lr: float, hidden: int) -> float:
        return min(1 / hidden, LARGEST_HEAD_LR)

    def head_parameters(self, hidden: int, vocabulary: int) -> tuple[int, int]:
        return (hidden + 1) * (BINS if self.value_loss == "hl_gauss" else 1), 0


class ArCHerObjective(PolicyGradientObjective):
    """ArCHer: a turn-level critic in a separate network, and a token-level policy (Zhou et al., arXiv 2402.19446)."""

    name: Literal["archer"]
    head_lr_follows = False

    value_coef: float = Field(0.5, ge=0)
    """Weight of the critic's loss, a mean over the starts and ends of turns."""
    value_warmup_steps: int = Field(10, ge=0)
    """Maximum number of first steps that train only the critic; it ends earlier when its error on fresh returns stops falling."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount per turn."""
    lam: float = Field(0.95, ge=0, le=1)
    """How far the critic's targets look ahead: 0 to the next turn, as in the paper; 1 to the end of the episode, without bootstrapping."""
    polyak: float = Field(0.1, gt=0, le=1)
    """Polyak step of the critic's target at every update."""

    def mistakes(self, recipe: Recipe) -> Iterator[str]:
        yield from super().mistakes(recipe)
        if isinstance(recipe.task, PromptTask):
            yield "objective 'archer' has a turn-level critic, but episodes of `task.prompts` have one turn: use ppo or grpo"
        if recipe.model.lora is not None:
            yield "objective 'archer' trains a second copy of all weights as its critic: leave model.lora out, or use ppo"

    def small_optimizer(self, recipe: Recipe) -> str:
        return "adamw"  # the others have not been measured

    def head_lr(self, lr: float, hidden: int) -> float:
        return min(1 / hidden, LARGEST_HEAD_LR)

    def head_parameters(self, hidden: int, vocabulary: int) -> tuple[int, int]:
        return hidden + 1, hidden + 1

    def trained_parameters(self, learned: int, total: int) -> tuple[int, int]:
        return learned, total


class GroupObjective(PolicyGradientObjective):
    """Options of policy gradients without a critic: their baseline comes from the other episodes of the prompt, or from the batch.

    `kl_coef` weights the divergence in the reward with rloo and reinforce_pp, and a loss term (k3) with grpo and dr_grpo.
    """

    scale_rewards: RewardScale = "none"
    """Divisor of advantages: the group's standard deviation; the batch's; the batch's or that of recent ones if it is larger
    (running); or none, so that the size of updates depends on the scale of rewards. With per-turn rewards it is one number for
    all turns. auto: group for prompts, running for environments and agents."""
    mask_cut: bool = False
    """Leave episodes with a turn that was cut off by the token limit out of the loss (overlong filtering, DAPO, arXiv
    2503.14476); they still count in the baseline."""
    state_weight: float = Field(0.0, ge=0)
    """Weight of a second advantage, by state: a turn's discounted return minus the mean over all visits of the same observation in the
    group, if there are several (GiGPO, Feng et al., arXiv 2505.10978, uses 1). 0: none."""
    state_gamma: float = Field(0.95, gt=0, le=1)
    """Discount per turn in the returns of `state_weight`: below 1, a reward at the end counts less in early turns than in late ones."""
    share_prompts: bool = True
    """Compute a group's prompt only once in updates, if the model allows it."""

    compares_samples: ClassVar[bool] = True
    """True if a prompt needs several samples."""

    def mistakes(self, recipe: Recipe) -> Iterator[str]:
        yield from super().mistakes(recipe)
        if self.state_weight and (isinstance(recipe.task, PromptTask) or recipe.rollouts.samples == 1):
            yield (
                "`objective.state_weight` compares turns that start in the same state: it needs a multi-turn task, and "
                "rollouts.samples of 2 or more"
            )
        if self.compares_samples and recipe.rollouts.samples == 1:
            yield f"objective '{self.name}' compares samples of the same prompt: set rollouts.samples to 2 or more"

    def resolved(self, recipe: Recipe) -> Self:
        if self.scale_rewards != "auto":
            return self
        return self.model_copy(update={"scale_rewards": "group" if isinstance(recipe.task, PromptTask) else "running"})


class GRPOObjective(GroupObjective):
    """GRPO: rewards standardised within the group, loss averaged over each episode's tokens (Shao et al., arXiv 2402.03300)."""

    name: Literal["grpo"]
    scale_rewards: RewardScale = "auto"
    """Divisor of advantages (see above)."""


class DrGRPOObjective(GroupObjective):
    """Dr. GRPO: rewards minus the group's mean, loss summed over tokens and divided by a constant (Liu et al., arXiv 2503.20783)."""

    name: Literal["dr_grpo"]
    constant_length: int = Field(256, ge=1)
    """Divisor of the sum over an episode's tokens, the same for every length."""


class RLOOObjective(GroupObjective):
    """RLOO: rewards minus the mean of the others in the group, loss summed over tokens (Ahmadian et al., arXiv 2402.14740)."""

    name: Literal["rloo"]
    scale_rewards: RewardScale = "batch"
    """Divisor of advantages (see above)."""


class ReinforcePPObjective(GroupObjective):
    """REINFORCE++: divergence in the reward, advantages standardised over the batch (Hu et al., arXiv 2501.03262)."""

    name: Literal["reinforce_pp"]
    compares_samples = False
