"""Mixtures of logged and fresh episodes: shares, replay, and exact resume."""

import signal

import pyarrow.parquet
import pytest

from lmrl.recipe import MixtureSource
from lmrl.recipe.files import load_recipe
from lmrl.sources.base import SourceBatch
from lmrl.sources.dataset import Dataset
from lmrl.sources.mixture import Mixture
from lmrl.training import dry_run
from tests.conftest import TINY_WALKS
from tests.launcher import launch
from tests.runs import assert_same_run, metrics


class Fresh:
    """Three fresh episodes a step, called 1.0, 1.1, 1.2, 2.0, ..., of which a fourth has failed."""

    name = (0, "main")

    def next(self, step):
        episodes = [f"{step}.{number}" for number in range(3)]
        return SourceBatch(episodes, [*episodes, "failed"], 1)


def mixture(steps, rows=10, **options):
    options = MixtureSource(name="mixture", player="random", **options)
    logged = Dataset(list(range(rows)), [0.0] * rows, options.batch_size, 0, "main")
    return Mixture(Fresh(), logged, options, steps, None)


@pytest.mark.parametrize(
    ("steps", "options", "expected"),
    [
        (7, {"batch_size": 10, "online": 0.2, "online_end": 1.0, "warmup_steps": 2}, [0, 0, 2, 4, 6, 8, 10]),
        (4, {"batch_size": 4, "online": 0.5, "online_end": 1.0}, [2, 3, 3, 4]),  # 2, 2.67, 3.33, 4
        (3, {"batch_size": 10, "online": 1.0, "online_end": 0.0}, [10, 5, 0]),
        (3, {"batch_size": 10, "online": 0.3, "online_end": 0.3}, [3, 3, 3]),
        (1, {"batch_size": 10, "online": 0.3, "online_end": 1.0}, [3]),
        (3, {"batch_size": 10, "online": 0.3, "online_end": 1.0, "warmup_steps": 2}, [0, 0, 3]),
    ],
)
def test_share_of_fresh_episodes(steps, options, expected):
    source = mixture(steps, **options)
    assert [source.online(step) for step in range(1, steps + 1)] == expected
    for step, count in enumerate(expected, start=1):
        source_batch = source.next(step)
        fresh = [one for one in source_batch.learn if isinstance(one, str)]
        learns = step > options.get("warmup_steps", 0)
        assert len(fresh) == count and len(source_batch.learn) == (options["batch_size"] if learns else 0)
        assert len(source_batch.played) == 4 and source_batch.failed == 1


def test_logged_episodes_are_all_used_before_any_twice():
    options = {"batch_size": 10, "online": 0.2, "online_end": 1.0, "warmup_steps": 2}
    source = mixture(7, **options)
    parts = [[one for one in source.next(step).learn if isinstance(one, int)] for step in range(1, 8)]
    assert [len(part) for part in parts] == [0, 0, 8, 6, 4, 2, 0]
    seen = [one for part in parts for one in part]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    alone = mixture(7, **options).next(5).learn  # whatever came before, a step's logged part is its own
    assert [one for one in alone if isinstance(one, int)] == parts[4]


def test_replay_keeps_the_newest_and_alone_is_drawn_from():
    source = mixture(9, batch_size=50, online=1.0, replay=5, warmup_steps=1)
    assert source.next(1).learn == [] and source.replay == ["1.0", "1.1", "1.2"]
    assert set(source.next(2).learn) == {"1.1", "1.2", "2.0", "2.1", "2.2"} == set(source.replay)
    third = source.next(3).learn
    assert source.replay == ["2.1", "2.2", "3.0", "3.1", "3.2"] and set(third) == set(source.replay)
    again = mixture(9, batch_size=50, online=1.0, replay=5, warmup_steps=1)
    again.replay = ["2.0", "2.1", "2.2"]
    assert again.next(3).learn == third  # a function of the step and of the saved buffer


def test_an_empty_buffer_leaves_the_log(monkeypatch):
    """As if task.min_group had dropped all groups of the first step."""
    source = mixture(3, batch_size=10, online=0.4, online_end=0.4)
    with monkeypatch.context() as patched:
        patched.setattr(Fresh, "next", lambda self, step: SourceBatch([], ["failed"], 1))
        first = source.next(1).learn
    assert len(first) == 6 and all(isinstance(one, int) for one in first)
    assert len(source.next(2).learn) == 10


MIXTURE = [
    *TINY_WALKS,
    "source={name: mixture, player: random, episodes: 40, batch_size: 8, warmup_steps: 2, replay: 14, online: 0.25}",
    "rollouts={prompts: 3, samples: 2, max_new_tokens: 10}",
    "objective={name: ilql, q_head: tied, polyak: 0.1}",
    "training.steps=7",
    "training.checkpoint_every=2",
    "training.keep_checkpoints=9",
    "evaluation.episodes=2",
    "evaluation.diagnostics_every=3",
]


def replayed(folder):
    return pyarrow.parquet.read_table(folder / "state" / "replay.parquet").to_pylist()


def test_a_killed_mixture_resumes_to_the_bit(tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    kill = int(signal.SIGKILL)
    done = launch("train", "random_walks/bc", *MIXTURE, "--output", str(whole))
    assert done.returncode == 0, done.stderr
    done = launch("train", "random_walks/bc", *MIXTURE, "--output", str(torn), stop=("record", 7, kill))
    assert done.returncode == -kill and metrics(torn)[-1]["step"] == 5
    done = launch("train", str(torn), "--resume", stop=("_fsync", 3, kill))  # while step 6 is written
    assert done.returncode == -kill and "resumed stage main at step 4" in done.stdout, done.stdout
    done = launch("train", str(torn), "--resume")
    assert done.returncode == 0 and "resumed stage main at step 4" in done.stdout, done.stderr
    assert_same_run(whole, torn)

    final, stage = whole / "stages/main/final", whole / "stages/main"
    assert replayed(final) == replayed(torn / "stages/main/final") and len(replayed(final)) == 14
    two, four, six = (replayed(stage / f"checkpoints/step-00000{step}") for step in (2, 4, 6))
    assert len(two) == 12 and four[-2:] == six[:2]  # twelve newer ones push out all but two
    lines = [line for line in metrics(whole) if line["kind"] == "train"]
    assert [line["updates"] for line in lines] == [0, 0, 1, 1, 1, 1, 1]
    assert "loss" not in lines[0] and all("online/reward" in line for line in lines)
    weights = [stage / name / "model.safetensors" for name in ("start", "checkpoints/step-000002", "final")]
    begun, collected, learned = (file.read_bytes() for file in weights)
    assert begun == collected != learned


def test_a_mixture_is_tried_on_a_tiny_scale(monkeypatch):
    """A dry run makes an update, in spite of the steps that only collect."""
    from lmrl.training.stage import Stage

    learned = []
    original = Stage._learn
    monkeypatch.setattr(Stage, "_learn", lambda self, *args: learned.append(original(self, *args)) or learned[-1])
    dry_run(load_recipe("random_walks/bc", MIXTURE))
    assert [metrics["updates"] for metrics in learned] == [1]
