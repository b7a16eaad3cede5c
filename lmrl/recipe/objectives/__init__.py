"""The `objective` section: one class per objective, one file per family."""

from lmrl.recipe.objectives.base import CustomObjective, ObjectiveOptions, RateCurve
from lmrl.recipe.objectives.likelihood import LikelihoodObjective
from lmrl.recipe.objectives.policy_gradient import (
    ArCHerObjective,
    DrGRPOObjective,
    GroupObjective,
    GRPOObjective,
    PolicyGradientObjective,
    PPOObjective,
    ReinforcePPObjective,
    RLOOObjective,
)
from lmrl.recipe.objectives.preferences import DPOObjective, RewardModelObjective
from lmrl.recipe.objectives.q import Guidance, ILQLObjective, MCObjective, QObjective, QSFTObjective

OBJECTIVES: dict[str, type[ObjectiveOptions]] = {
    "likelihood": LikelihoodObjective,
    "ppo": PPOObjective,
    "archer": ArCHerObjective,
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
