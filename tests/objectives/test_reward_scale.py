"""The size of rewards changes nothing: ten updates at default options, in float64, with every reward multiplied."""

import copy
from types import SimpleNamespace

import pytest
import torch

from lmrl.objectives import load_objective
from lmrl.policy.load import load_policy
from lmrl.recipe import OBJECTIVES, DatasetSource, Model, Optimizer
from lmrl.training.updater import Updater
from lmrl.trajectories.trajectory import Segment, Trajectory
from tests.conftest import TINY_LLAMA

STEPS = 10


def episodes(factor: float) -> list[Trajectory]:
    """Four groups of three episodes of one to four turns, with rewards at turns and at the end."""
    rng = torch.Generator().manual_seed(3)
    played = []
    for number in range(12):
        segment, turns = Segment(), 1 + number % 4
        rewards = (torch.randn(turns, generator=rng, dtype=torch.float64) - 0.3).tolist()
        for turn, reward in enumerate(rewards):
            segment.observe([3 + number // 3, 4])
            segment.act(torch.randint(5, 15, (2,), generator=rng).tolist(), [-2.0, -2.5], turn)
            segment.rewards[-1] = reward * factor
        trajectory = Trajectory([segment], "", "", reward=sum(segment.rewards), group=number // 3)
        if number % 5 == 4 and turns > 1:
            trajectory.terminated = False
            segment.observe([4])
        played.append(trajectory)
    return played


def weights_after(name: str, factor: float, **options) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    objective = load_objective(OBJECTIVES[name](name=name, **options))
    letters = "abcdefghijklmnopqrstuvwxyz .,!?"
    policy = load_policy(Model(config=dict(TINY_LLAMA)), texts=lambda: [letters], heads=objective.heads).double()
    played = episodes(factor)
    if name in ("ilql", "mc"):
        objective.calibrate(policy, played)
    optimizer = objective.options.small_optimizer(
        SimpleNamespace(source=DatasetSource(name="dataset", player="random"))
    )
    objective.optimizer = optimizer
    updater = Updater(policy, Optimizer(name=optimizer, lr=3e-3, head_lr=1e-2), STEPS)
    for step in range(1, STEPS + 1):
        objective.begin(step)
        updater.begin(step)
        batch = objective.prepare(policy, copy.deepcopy(played))
        stats = updater.step(policy, objective, batch)
        assert "rejected" in stats or stats["grad_norm"] > 0
    units = ("mean", "std", "peak")
    return {key: value for key, value in policy.state_dict().items() if key.rpartition(".")[2] not in units}


METHODS = {
    "ppo": {"value_warmup_steps": 2},
    "ppo, hl_gauss": {"value_loss": "hl_gauss", "value_warmup_steps": 0},
    "ppo, not whitened": {"whiten_advantages": False, "value_warmup_steps": 0, "value_clip": 0.2},
    "grpo": {},
    "rloo": {},
    "reinforce_pp": {},
    "ilql": {},
    "ilql, hl_gauss": {"value_loss": "hl_gauss"},
    "mc": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_rewards_of_any_size_give_the_same_updates(method):
    name, options = method.partition(",")[0], METHODS[method]
    plain = weights_after(name, 1.0, **options)
    for factor in (2.0**7, 2.0**-7):
        scaled = weights_after(name, factor, **options)
        assert [key for key in plain if not torch.equal(plain[key], scaled[key])] == []
    for factor in (100.0, 0.01):
        scaled = weights_after(name, factor, **options)
        assert max(float((plain[key] - scaled[key]).abs().max()) for key in plain) < 1e-9


def test_without_units_the_size_of_rewards_matters():
    """The property does not hold by itself."""
    options = {"value_warmup_steps": 0, "value_normalization": "none"}
    one, other = (weights_after("ppo", factor, **options) for factor in (1.0, 2.0**7))
    assert any(not torch.equal(one[key], other[key]) for key in one)
