"""The objective interface: `prepare` and `loss`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from lmrl.errors import PluginError
from lmrl.objectives.correction import Correction
from lmrl.policy.heads import HeadsSpec
from lmrl.policy.passes import ForwardRequest, Outputs
from lmrl.policy.policy import Policy
from lmrl.recipe import ObjectiveOptions
from lmrl.trajectories.batch import Batch, Microbatch, to_batch
from lmrl.trajectories.trajectory import Trajectory


@dataclass
class Loss:
    """A microbatch's share: the updater divides it by the `count` of the whole minibatch, over all processes."""

    sum: torch.Tensor
    stats: dict[str, torch.Tensor] = field(default_factory=dict)
    """Sums over the microbatch, reported divided by the count."""


def less_entropy(loss: torch.Tensor, entropy: torch.Tensor, coef: float) -> torch.Tensor:
    """A loss minus an entropy bonus. Without one, entropy gets no gradient at all: one of zeros would cost another product
    with the vocabulary's matrix."""
    return loss - coef * entropy if coef else loss


class Objective:
    """Base of all objectives. Subclasses implement `loss`, and `prepare` if they need more than the tokens."""

    Options: type[ObjectiveOptions] | None = None
    """The class of its section in a recipe, for a custom objective. The section is checked before anything is built;
    the objective gets an instance of this class."""
    label = "objective"
    """Name in tables."""
    epochs = 1
    minibatches = 1
    heads: HeadsSpec | None = None
    """The heads that the policy needs."""
    polyak: float | None = None
    """Polyak rate: how far target heads move towards the heads at every update; None if there are none."""
    dropout = False
    """True if updates use the model's dropout; False if log-probabilities are compared with earlier ones."""
    uses_reference = False
    """True if the policy needs a reference."""
    compares = False
    """True if the loss compares episodes of one prompt; steps then hold whole groups."""

    index_fields: tuple[str, ...] | None = None
    """Fields that hold the numbers of episodes or turns. Ranks that exchange prepared sequences, to balance their work,
    make these numbers differ from those of other ranks. (): there are none; None: each rank keeps what it prepared."""

    kl_controlled = False
    """True if `training.kl_band` lowers the learning rate if a step has moved the policy too far from the one that
    sampled."""

    loss_of_data: str | None = None
    """The metric on logged data that must fall while the policy learns; None if none must."""
    heldout_limits: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """The lowest and highest possible values of metrics in `heldout`, for their intervals."""

    correction: Correction | None = None
    """Importance correction for samples of an engine with its own probabilities; the stage sets it."""
    optimizer = "adamw"
    """The name of the optimizer that takes the steps; the stage sets it."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "numbered" in vars(cls):
            raise PluginError(f"objective {cls.__name__}: `numbered` was renamed to `index_fields`")

    def calibrate(self, policy: Policy, trajectories: list[Trajectory]) -> None:
        """Called once, before the first step of a stage that begins with new heads, with some logged episodes."""

    def start(self, policy: Policy) -> None:
        """Called once, when a stage begins, before its weights are sharded."""

    def ready(self, policy: Policy, dataset: Iterable[list[Trajectory]], fresh: bool) -> None:
        """Called once, when a stage is about to begin or resume. dataset: all logged episodes it may use, in parts.

        fresh: True if the stage begins, False if it resumes.
        """

    def begin(self, step: int) -> None:
        """Called before each step, counted from 1."""

    @property
    def forward_request(self) -> ForwardRequest:
        """The outputs that `loss` needs from a forward pass."""
        return ForwardRequest()

    def prepare(self, policy: Policy, trajectories: list[Trajectory]) -> Batch:
        """Turn trajectories into a batch, without gradient."""
        return to_batch(trajectories)

    def loss(self, outputs: Outputs, batch: Microbatch) -> Loss:
        raise NotImplementedError

    def count(self, batch: Batch) -> float:
        """A batch's weight in the mean over the minibatch it belongs to: its number of action tokens."""
        return batch.num_actions

    def heldout(self, policy: Policy, trajectories: list[Trajectory]) -> dict[str, list[float]]:
        """Metrics of held-out logged episodes, without gradient: one number per episode."""
        return {}

    def rejects(self, stats: dict[str, float]) -> bool:
        """True if a minibatch with these statistics must not be stepped on, and the step's updates end before it."""
        return False

    def divergence(self, policy: Policy, minibatch: Batch) -> dict[str, float]:
        """The statistics of `loss` that `rejects` needs, computed without a gradient; {} if it needs none. For
        strategies that cannot take a gradient back."""
        return {}

    def state(self) -> dict[str, Any]:
        """State that a resumed run needs, as JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass
