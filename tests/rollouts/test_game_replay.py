"""Recorded games are played again."""

import json

import pytest

from lmrl.engines.base import Sampling
from lmrl.rollouts.replay import replay_episode
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import build_task
from lmrl.training.monitoring.measures import sample_line
from tests.rollouts import echo
from tests.rollouts.echo import letters, nim, sampler_of


@pytest.fixture
def tokenizer():
    return letters()


@pytest.mark.parametrize("opponent", [None, "random"])
def test_games_are_played_again(tokenizer, opponent):
    task = build_task(nim(opponent=opponent), tokenizer)
    for one in Sampler(task).play_scripted("random", task.training, ("r",)):
        line = json.loads(json.dumps(sample_line("main", 1, "train", one, task.environment)))
        told, same = replay_episode(line)
        assert same, told
        if one.turns:
            line["turns"][-1]["reward"] += 1
            told, same = replay_episode(line)
            assert not same and told[-2].startswith(f"turn {len(one.turns) - 1}: reward ")


def test_truncated_and_failed_games_are_played_again(tokenizer):
    made = {"name": f"{echo.__file__}:Echo", "options": {}, "max_turns": 2, "version": None, "source": None}
    for choose, failure in (
        (lambda context: "a", None),
        (lambda context: "!" if context.endswith("p1:a") else "a", "exclaimed"),
    ):
        for one in sampler_of(tokenizer, choose, max_turns=2).play([None], 1, Sampling(), ("s",)):
            line = json.loads(json.dumps(sample_line("main", 1, "train", one, made)))
            assert (failure or "") in str(one.failure or "")
            told, same = replay_episode(line)
            assert same and one.failure in (None, "environment raised RuntimeError: exclaimed"), told
