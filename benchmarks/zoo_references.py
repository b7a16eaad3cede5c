"""What can be reached on a game of zoo.py, computed exactly by dynamic programming over turns and information states."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Collection
from functools import cache
from itertools import accumulate

from zoo_game import Game, Solution, State, evaluate, greedy, optimum, uniform


@cache
def random_play(game: type[Game]) -> Solution:
    """Each legal action alike: what the logged data is played by."""
    return evaluate(game(), uniform)


@cache
def improved(game: type[Game]) -> Solution:
    """One step of policy improvement on random play, what regression on its returns can reach: greedy in its Q values."""
    base = random_play(game).actions
    return evaluate(game(), lambda turn, state, worth: greedy(turn, state, base[turn][state]))


def decoded(game: type[Game], known: Solution, beta: float) -> float:
    """The expected return of play in proportion to exp(beta Q), with the exact Q of a policy in units of the deviation of random
    play's returns-to-go."""
    unit = deviation(game)

    def play(turn: int, state: State, worth: dict[str, float]) -> dict[str, float]:
        values = known.actions[turn][state]
        best = max(values.values())
        weights = {action: math.exp(beta * (value - best) / unit) for action, value in values.items()}
        return {action: weight / sum(weights.values()) for action, weight in weights.items()}

    return evaluate(game(), play).value


@cache
def deviation(game: type[Game], episodes: int = 800) -> float:
    """Deviation of the rewards that follow a turn, over turns of random play (by simulation)."""
    environment, rng, following = game(), random.Random(0), []
    for seed in range(episodes):
        environment.reset(seed=seed)
        rewards, over = [], False
        while not over:
            _, reward, over, _, _ = environment.step(rng.choice(environment.actions(environment.state)))
            rewards.append(reward)
        following += accumulate(reversed(rewards))
    return statistics.pstdev(following)


def within(game: type[Game], pairs: Collection[tuple[State, str]]) -> Solution:
    """The optimum among actions that data hold for a state, at whatever turn; random play where they hold none."""
    known: dict[State, set[str]] = {}
    for state, action in pairs:
        known.setdefault(state, set()).add(action)

    def best_known(turn: int, state: State, worth: dict[str, float]) -> dict[str, float]:
        held = {action: value for action, value in worth.items() if action in known.get(state, ())}
        return greedy(turn, state, held) if held else uniform(turn, state, worth)

    return evaluate(game(), best_known)


__all__ = ["decoded", "improved", "optimum", "random_play", "within"]
