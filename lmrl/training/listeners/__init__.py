"""Listeners: called by a stage at fixed points of its loop; they may measure, warn, keep checkpoints and stop it."""

from lmrl.training.listeners.diagnostics import Diagnostics
from lmrl.training.listeners.entropy import EntropyController
from lmrl.training.listeners.evaluation import Evaluation
from lmrl.training.listeners.gate import GateMonitor
from lmrl.training.listeners.guard import Guard
from lmrl.training.listeners.listener import Listener
from lmrl.training.listeners.memory import Memory
from lmrl.training.listeners.rate import RateController
from lmrl.training.listeners.reward_hacking import RewardHackingMonitor

__all__ = [
    "Diagnostics",
    "EntropyController",
    "Evaluation",
    "GateMonitor",
    "Guard",
    "RewardHackingMonitor",
    "Listener",
    "Memory",
    "RateController",
]
