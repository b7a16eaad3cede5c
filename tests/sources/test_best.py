"""The best share of episodes: which are kept, and how ties are drawn."""

from dataclasses import replace

import pytest

from lmrl import distributed
from lmrl.errors import DataError
from lmrl.recipe import Rollouts
from lmrl.rollouts.task import Match
from lmrl.seeding import stream
from lmrl.sources.best import best_among_all, best_of
from lmrl.sources.dataset import Dataset, build_dataset
from lmrl.sources.fresh import FreshRollouts
from lmrl.trajectories.trajectory import Trajectory, Turn
from tests.sources.conftest import dataset, lines, rewarded


def test_the_best_share():
    rng = stream("x")
    assert best_of([1.0, 3.0, 2.0, 3.0], 1.0, rng) == [0, 1, 2, 3]
    assert best_of([1.0, 3.0, 2.0, 3.0], 0.5, rng) == [1, 3] and best_of([1.0, 3.0, 2.0, 3.0], 0.75, rng) == [1, 2, 3]
    assert best_of([1.0, 3.0], 0.01, rng) == [1] and best_of([None, 1.0], 1.0, rng) == [0, 1]


def test_which_of_equal_returns_is_kept_is_drawn():
    returns = [0.0, 1.0] * 40
    draws = [best_of(returns, 0.25, stream(seed)) for seed in range(200)]
    assert all(len(kept) == 20 and {returns[row] for row in kept} == {1.0} for kept in draws)
    times = [sum(row in kept for kept in draws) for row in range(1, 80, 2)]
    assert sum(times) == 4000 and 60 < min(times) and max(times) < 140  # 100 each, with a standard deviation of 7
    assert best_of(returns, 0.25, stream(3)) == draws[3] != draws[4]


def test_the_best_of_each_prompt():
    returns, prompts = [1.0, 9.0, 2.0, 8.0, 3.0, 7.0, 0.0], list("abababc")
    assert best_of(returns, 1 / 3, stream("x"), prompts) == [1, 4, 6]
    assert best_of(returns, 2 / 3, stream("x"), prompts) == [1, 2, 3, 4, 6]
    assert {row for seed in range(50) for row in best_of([1.0] * 3, 0.3, stream(seed), "aab")} == {0, 1, 2}


def test_logged_draws_follow_seed_and_stage():
    def kept(seed, stage):
        return Dataset(list(range(60)), [1.0] * 60, 4, seed, stage, best=0.5).kept

    assert kept(0, "main") == kept(0, "main") and len(kept(0, "main")) == 30
    assert len({tuple(kept(seed, stage)) for seed in (0, 1) for stage in ("main", "other")}) == 4


def test_the_best_of_each_logged_prompt(tmp_path, walks):
    rows = rewarded(("a", "x", 1), ("b", "x", 7), ("a", "y", 0), ("b", "y", 8), ("c", "z", 5))
    path = lines(tmp_path / "data.jsonl", rows)
    source = build_dataset(dataset(path=path, best=0.5, best_among="prompt"), walks, 0, "main")
    assert source.kept == [0, 3, 4] and build_dataset(dataset(path=path, best=0.5), walks, 0, "main").kept == [1, 3]
    path = lines(tmp_path / "data.jsonl", rewarded(("a", "x", 1), ("b", "x", 0)))
    with pytest.raises(DataError, match="source.best_among=prompt .* none has two: set it to all"):
        build_dataset(dataset(path=path, best=0.5, best_among="prompt"), walks, 0, "main")
    source = build_dataset(dataset(player="random", episodes=80, best=0.3, best_among="prompt"), walks, 0, "main")
    found = {source._episode(row).prompt for row in source.kept}
    assert found == {source._episode(row).prompt for row in range(80)} and len(source.kept) < 40


def test_draws_of_one_start_state_are_compared(tmp_path, walks):
    """A collected log numbers every draw of a start state as a group; states without a number are known by it."""

    def row(group, start, reward, side=None):
        turns = [{"observation": "go", "action": "x", "reward": reward}]
        return {"turns": turns, "group": group, "start": start, "game": side and {"player": side}}

    def kept(*rows):
        path = lines(tmp_path / "data.jsonl", rows)
        return build_dataset(dataset(path=path, best=0.5, best_among="prompt"), walks, 0, "main").kept

    assert kept(row(0, 5, 1.0), row(1, 5, 3.0), row(2, 7, 0.0), row(3, 7, -1.0)) == [1, 2]
    assert kept(row(0, 5, 1.0, 1), row(0, 5, 3.0, 1), row(1, 5, 0.0, 2), row(1, 5, -1.0, 2)) == [1, 2]
    assert kept(row(0, None, 1.0), row(0, None, 3.0), row(1, None, 0.0), row(1, None, -1.0)) == [1, 2]
    path = lines(tmp_path / "data.jsonl", [row(number, number % 2, float(number)) for number in range(8)])
    found = build_dataset(dataset(path=path), walks, 0, "main", compares=True)
    assert found.units == [[0, 2, 4, 6], [1, 3, 5, 7]] and found.scores()["return"]["clusters"] == 8


def judged(group, episode, reward):
    return Trajectory([], "", "", group=group, episode=episode, reward=reward)


@pytest.mark.parametrize("by_prompt", [False, True])
def test_all_processes_draw_the_same_best(monkeypatch, by_prompt):
    """Two processes, whose episodes lie in another order together than one's, keep what one process keeps."""
    everyone = [judged(number // 4, number, float(number % 2)) for number in range(32)]
    one = best_among_all(everyone, 0.25, stream("x"), by_prompt)
    assert len(one) == 8 and all(trajectory.reward == 1 for trajectory in one)
    parts = [everyone[16:], everyone[:16]]

    def numbers(trajectories):
        return [(each.group, each.episode, each.reward) for each in trajectories]

    monkeypatch.setattr(distributed, "all_gather", lambda items: numbers(parts[0]) + numbers(parts[1]))
    kept = [best_among_all(part, 0.25, stream("x"), by_prompt) for part in parts]
    assert kept[1] + kept[0] == one
    if by_prompt:
        assert [trajectory.group for trajectory in one] == list(range(8))
    assert best_among_all(parts[0], 1.0, stream("x")) == parts[0]


def test_fresh_rollouts_keep_the_best_of_each_prompt(walks):
    """Ties of a step are drawn anew each step, and again the same for the same step."""

    class Played:
        task = walks

        def play(self, starts, samples, sampling, name, shared):
            return [judged(number // samples, number, 1.0) for number in range(len(starts) * samples)]

    options = Rollouts(prompts=6, samples=4)
    source = FreshRollouts(Played(), options, 0, "main", best=0.5, by_prompt=True)
    kept = [[one.episode for one in source.next(step).learn] for step in (1, 2, 1)]
    assert kept[0] == kept[2] != kept[1] and [number // 4 for number in kept[0]] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_resampled_sides_of_a_game_keep_their_groups(walks):
    """Two sides a start state: no group of one round has the number of another round's, or of other episodes."""
    rounds = []

    class Played:
        task = replace(walks, match=Match(2, None))

        def play(self, starts, samples, sampling, name, shared):
            rounds.append(len(starts))
            played = []
            for group in range(2 * len(starts)):
                spread = len(rounds) == 3 or len(rounds) == 2 and group >= len(starts)
                for number in range(samples):
                    one = judged(group, 2 * number + group % 2, float(spread and number))
                    one.turns, one.columns = [Turn("", "")], {"origin": (len(rounds), group)}
                    played.append(one)
            return played

    learn = FreshRollouts(Played(), Rollouts(prompts=4, samples=2), 0, "main", resample=2).next(1).learn
    assert rounds == [4, 4, 2]  # eight groups without a signal, then four
    assert len({(one.group, one.columns["origin"]) for one in learn}) == len({one.group for one in learn}) == 8
    assert all(one.columns["origin"][0] > 1 for one in learn)
