"""The recipe's schema, torch-free: one file per section, combined in recipe.py."""

from lmrl.recipe.base import Plugin, Section
from lmrl.recipe.blend import BlendSource
from lmrl.recipe.evaluations import OWN_TASK
from lmrl.recipe.model import Lora, Model
from lmrl.recipe.objectives import (
    OBJECTIVES,
    ArCHerObjective,
    CustomObjective,
    DPOObjective,
    GroupObjective,
    ILQLObjective,
    LikelihoodObjective,
    MCObjective,
    ObjectiveOptions,
    PolicyGradientObjective,
    PPOObjective,
    QObjective,
    QSFTObjective,
    RewardModelObjective,
)
from lmrl.recipe.recipe import CHOICES, MAIN_STAGE, REWARD_MODEL, SOURCES, Recipe, TaskSection
from lmrl.recipe.rollouts import VLLM, Rollouts
from lmrl.recipe.source import (
    CustomSource,
    DatasetOptions,
    DatasetSource,
    MixtureSource,
    RolloutsSource,
    SourceOptions,
)
from lmrl.recipe.steps import CustomListener, CustomTracker, Evaluation, Gate, Optimizer, OtherSuite, Tracking, Training
from lmrl.recipe.task import (
    ENVIRONMENTS,
    STAGE_PREFIX,
    AgentTask,
    CustomTask,
    EnvironmentTask,
    MazeTask,
    NimTask,
    Prompts,
    PromptTask,
    RandomWalksTask,
    Reward,
    SpecialTokens,
    any_weighted,
)
from lmrl.recipe.templates import Choices, Shots
