"""What is recorded of a step's episodes, by hand."""

from lmrl.training.monitoring.measures import measure
from lmrl.trajectories.trajectory import Trajectory


def episode(earned, **metrics):
    return Trajectory([], "", "", group=0, reward=earned, metrics=metrics)


def test_metrics_keep_lmrls_own_names_free():
    """An environment may also call something `reward`, `step` or `loss`."""
    episodes = [
        episode(1.0, reward=7.0, step=3.0, found=1.0, loss=0.0),
        episode(2.0, reward=9.0, step=5.0, found=0.0, loss=1.0),
    ]
    assert measure(episodes, taken={"loss": 0.1}) == {
        "length": 0.0,
        "cut": 0.0,
        "reward": 1.5,
        "reward_std": 0.5,
        "component/reward": 8.0,
        "component/step": 4.0,
        "found": 0.5,
        "component/loss": 0.5,
    }


def test_metrics_that_were_not_measured_are_left_out():
    assert measure([episode(1.0, found=None), episode(1.0, found=0.5)])["found"] == 0.5
