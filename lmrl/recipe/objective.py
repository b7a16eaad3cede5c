"""The `objective` section: one class an objective."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lmrl.recipe.base import Plugin, Section


class LikelihoodObjective(Section):
    """Behaviour cloning: the likelihood of the action tokens."""

    name: Literal["likelihood"]
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of an entropy bonus (0: plain likelihood)."""


class PolicyGradientObjective(Section):
    """What policy gradients share, and how far an update may go."""

    epochs: int = Field(2, ge=1)
    """Passes over a step's episodes."""
    minibatches: int = Field(4, ge=1)
    """Parts of a step's episodes; each pass makes an update from every part."""
    clip: float = Field(0.2, gt=0)
    """Clipping range of the ratio of new to old probability: [1 - clip, 1 + clip] (upper bound: `clip_high`, if set)."""
    clip_high: float | None = Field(None, gt=0)
    """Upper clipping bound where it differs from `clip` (DAPO, arXiv 2503.14476, has 0.28)."""
    dual_clip: float | None = Field(3.0, gt=1)
    """Largest ratio that counts where the advantage is negative (Ye et al., arXiv 1912.09729; null: no bound)."""
    target_kl: float | None = Field(0.05, gt=0)
    """A minibatch on which the policy has moved further than this from the one that played, in nats a token, is not stepped
    on, and the step's updates end there (null: no limit)."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of an entropy bonus."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the divergence from the reference (0: none, and no reference is kept)."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Taken from the reward of a turn that was cut off by the token limit."""


class PPOObjective(PolicyGradientObjective):
    """Proximal policy optimisation over action tokens (Schulman et al., arXiv 1707.06347)."""

    name: Literal["ppo"]
    value_coef: float = Field(0.5, ge=0)
    """Weight of the values' loss."""
    value_normalization: Literal["returns", "none"] = "returns"
    """returns: values are learned in units of the running mean and deviation of returns, so that the size of rewards does not
    matter; advantages that are not whitened are in these units too. none: in the unit of the reward."""
    value_clip: float | None = Field(None, gt=0)
    """Clipping of the value around its old estimate, in the values' units (null: none)."""
    value_pull: float | None = Field(1.0, ge=0)
    """Bound on the gradient that values send into a trunk they share with the policy, relative to the policy's own, token by
    token (null: none)."""
    detach_value: bool = False
    """Stop the value loss at the trunk, so that it trains the head alone."""
    value_warmup_steps: int = Field(10, ge=0)
    """First steps, at most, that train the values alone; fewer where their error on fresh returns stops falling."""
    value_loss: Literal["squared", "hl_gauss"] = "squared"
    """hl_gauss: values as categories over `value_range` (Farebrother et al., arXiv 2403.03950)."""
    value_range: tuple[float, float] = (-5.0, 5.0)
    """Lowest and highest value that `hl_gauss` can express, in the values' units."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount a turn."""
    gamma_token: float = Field(1.0, gt=0, le=1)
    """Discount a token inside a turn."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation: 0 trusts the values, 1 the returns."""
    whiten_advantages: bool = True
    """Give a step's advantages zero mean and unit variance."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the divergence enters: per-token in the reward (k1), or as a loss term (k3)."""
    kl_target: float | None = Field(None, gt=0)
    """Nats an episode that `kl_coef` is adapted towards (null: fixed)."""
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


class Discounts(Section):
    """How later rewards count."""

    gamma: float = Field(0.99, gt=0, le=1)
    """Discount a turn."""
    gamma_token: float = Field(1.0, gt=0, le=1)
    """Discount a token inside a turn."""


class Guidance(Section):
    """How a policy with Q values decodes: log pi + beta Q, over the tokens that the behaviour supports."""

    beta: float = Field(16.0, ge=0)
    """Weight of Q where decoding says nothing else (an inference setting: sweep it with `lmrl eval --beta 1,4,16,64`)."""
    support: float = Field(0.01, ge=0, lt=1)
    """Tokens less likely than this under the likelihood-trained policy are never drawn (0: no such mask)."""


class QObjective(Discounts, Guidance):
    """What objectives with Q heads share."""

    minibatches: int = Field(1, ge=1)
    """Updates a step, each on a part of its episodes."""
    q_head: Literal["mlp", "linear", "tied"] = "mlp"
    """mlp: two layers; linear: one; tied: the vocabulary matrix times a d x d matrix. `lmrl export` folds the last two."""
    trunk: Literal["auto", "shared", "detached", "separate"] = "auto"
    """Where the heads stand: on the policy's last hidden states, on those without a gradient into the policy, or on a
    copy of the model of their own. auto: separate for MLP heads where all weights are trained, since what values need of a state
    imitation may have no use for; else shared, as adapters and exports want it."""
    value_normalization: Literal["returns", "none"] = "returns"
    """returns: values are learned, and `beta` and `start_value` are given, in units of the log's returns: their mean, and their
    deviation or the size of a reward, whichever is less. none: in the unit of the reward."""
    start_value: float | Literal["lowest", "mean"] = "mean"
    """What Q is before anything is learned, and stays for tokens never seen: `mean` is the mean return in the data, from where
    values have the least way to go; `lowest` is the lowest, so that what is unknown looks bad even without `support`."""
    value_loss: Literal["squared", "hl_gauss"] = "squared"
    """hl_gauss: values as categories over the returns in the data (Farebrother et al., arXiv 2403.03950)."""
    cql_coef: float = Field(0.1, ge=0)
    """Weight of the push-down of Q outside the data, CE(Q / cql_temperature, action) (CQL, arXiv 2006.04779)."""
    cql_temperature: float = Field(1.0, gt=0)
    calibrated: bool = False
    """Push no value below the return that the data realised (Cal-QL, Nakamoto et al., arXiv 2303.05479)."""
    bc_coef: float = Field(1.0, ge=0)
    """Weight of the likelihood of the actions (0: the policy stays as it is)."""

    @model_validator(mode="after")
    def _bins_need_mlp(self) -> QObjective:
        if self.value_loss == "hl_gauss" and self.q_head != "mlp":
            raise ValueError("`value_loss: hl_gauss` is not linear in the hidden state: it needs `q_head: mlp`")
        if self.calibrated and self.cql_coef == 0:
            raise ValueError("`calibrated` limits the push-down of `cql_coef`, which is 0")
        return self


class ILQLObjective(QObjective):
    """Implicit language Q-learning on logged data (Snell et al., arXiv 2206.11871)."""

    name: Literal["ilql"]
    expectile: float = Field(0.8, gt=0, lt=1)
    """How near V comes to the best action in the data (0.5: their mean)."""
    polyak: float = Field(0.05, gt=0, le=1)
    """How far the targets of Q and V follow at every update. What a last turn is worth takes about 2 / polyak updates to reach the
    turn before it; published runs of tens of thousands of updates have 0.005."""
    awbc_beta: float = Field(0.0, ge=0)
    """Weight the likelihood by exp(awbc_beta x advantage) (0: plain)."""


class MCObjective(QObjective):
    """Q by regression on the returns that followed (Monte Carlo returns), and decoding guided by it."""

    name: Literal["mc"]


class QSFTObjective(Discounts, Guidance):
    """Q-learning by supervised fine-tuning (Hong et al., arXiv 2411.05193): no heads, a second model's probabilities."""

    name: Literal["q_sft"]
    return_range: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest return-to-go of an episode; returns are scaled from there to [0, 1]."""
    polyak: float = Field(0.005, gt=0, le=1)
    """How far the target model follows at every update."""

    @model_validator(mode="after")
    def _ordered_range(self) -> QSFTObjective:
        if not self.return_range[0] < self.return_range[1]:
            raise ValueError("`return_range` is [LOW, HIGH] with LOW < HIGH")
        return self


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


class DPOObjective(Section):
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290) and its variants, on pairs of episodes.

    The pairs are chosen and rejected of preference data, or the best and the worst of several episodes of a prompt.
    """

    name: Literal["dpo"]
    loss: PREFERENCE_LOSSES = "sigmoid"
    """As trl calls them (sigmoid_norm: a token instead of an episode); formulas and papers are in lmrl/objectives/dpo.py."""
    beta: float = Field(0.1, gt=0)
    """How closely the policy is held to the reference; of simpo and orpo, the weight of the margin."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of the pairs that is taken to be labelled the wrong way round (sigmoid, robust, exo_pair)."""
    target_margin: float = Field(0.5, ge=0)
    """Of simpo: how much better a token of the chosen episode has to be, times beta."""
    sft_coef: float | None = Field(None, ge=0)
    """Weight of the likelihood of the chosen episodes, a token (null: 1 with orpo, else 0)."""
    minibatches: int = Field(1, ge=1)
    """Updates a step, each on a part of its pairs."""
    share_prompts: bool = True
    """Compute what both episodes of a pair begin with once, where the model allows it."""
    cache_reference: bool = False
    """Compute the reference's log-probabilities of logged episodes once, before the first step, and keep them on disk
    for later runs of the same model on the same data. Without LoRA this saves the reference's memory."""

    @property
    def reference_free(self) -> bool:
        return self.loss in ("simpo", "orpo")

    @model_validator(mode="after")
    def _sensible(self) -> DPOObjective:
        if self.label_smoothing and self.loss not in ("sigmoid", "robust", "exo_pair"):
            raise ValueError(f"`label_smoothing` is for sigmoid, robust and exo_pair; loss '{self.loss}' has none")
        if self.loss == "exo_pair" and not self.label_smoothing:
            raise ValueError("`loss: exo_pair` needs `label_smoothing` above 0 (its paper has 1e-3)")
        if self.cache_reference and self.reference_free:
            raise ValueError(f"`cache_reference`: loss '{self.loss}' has no reference")
        return self


class GroupObjective(PolicyGradientObjective):
    """What policy gradients share whose baseline is the episodes of the same prompt (or the batch), and no critic.

    `kl_coef` weighs the divergence in the reward with rloo and reinforce_pp, and a term of the loss (k3) with grpo and dr_grpo.
    """

    scale_rewards: Literal["group", "batch", "none"] = "none"
    """What advantages are divided by: the group's standard deviation, the batch's, or nothing, which leaves the step's size to the
    size of rewards. Where rewards fall at turns it is one number for all turns."""
    mask_cut: bool = False
    """Leave episodes with a turn that was cut off by the token limit out of the loss (overlong filtering, DAPO, arXiv
    2503.14476); they still count in the baseline."""
    share_prompts: bool = True
    """Compute the prompt of a group once in the updates, where the model allows it."""


class GRPOObjective(GroupObjective):
    """Rewards standardised in the group, the mean over each episode's tokens (Shao et al., arXiv 2402.03300)."""

    name: Literal["grpo"]
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by (see above)."""


class DrGRPOObjective(GroupObjective):
    """Rewards less the group's mean, the sum over tokens by a constant (Liu et al., arXiv 2503.20783)."""

    name: Literal["dr_grpo"]
    constant_length: int = Field(256, ge=1)
    """What the sum over an episode's tokens is divided by, the same for all of any length."""


class RLOOObjective(GroupObjective):
    """Rewards less the mean of the others in the group, the sum over tokens (Ahmadian et al., arXiv 2402.14740)."""

    name: Literal["rloo"]
    scale_rewards: Literal["group", "batch", "none"] = "batch"
    """What advantages are divided by (see above)."""


class ReinforcePPObjective(GroupObjective):
    """REINFORCE++: the divergence in the reward, standardised over the batch (Hu et al., arXiv 2501.03262)."""

    name: Literal["reinforce_pp"]


class RewardModelObjective(Section):
    """A reward model from preferences (Bradley-Terry; Ouyang et al., arXiv 2203.02155), trained by trl's RewardTrainer.

    The source is a dataset of chosen and rejected completions. The result is a transformers sequence classifier with one
    output, which later stages name as a reward: `task.rewards: [{model: stages/NAME}]`.
    """

    name: Literal["reward_model"]
    holdout: float = Field(0.1, ge=0, lt=1)
    """Share of the prompts whose pairs are never trained on and measure the result; those that `task.prompts` holds out
    are among them."""
    max_length: int = Field(1024, ge=1)
    """Tokens of a prompt with its completion; of a longer text the end is kept."""
    center_coef: float = Field(0.0, ge=0)
    """Weight of the squared sum of a pair's rewards, which keeps their mean at zero (Eisenstein et al., arXiv 2312.09244)."""


class CustomObjective(Plugin):
    """An objective of one's own, `file.py:Name` or a dotted path."""

    name: str


OBJECTIVES = {
    "likelihood": LikelihoodObjective,
    "ppo": PPOObjective,
    "ilql": ILQLObjective,
    "mc": MCObjective,
    "q_sft": QSFTObjective,
    "dpo": DPOObjective,
    "grpo": GRPOObjective,
    "dr_grpo": DrGRPOObjective,
    "rloo": RLOOObjective,
    "reinforce_pp": ReinforcePPObjective,
    "reward_model": RewardModelObjective,
}
