"""What can be reached on a game of zoo.py, computed exactly by dynamic programming over turns and information states."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

from zoo_games import Game, Solution, State, evaluate, greedy, optimum, uniform


@cache
def random_play(game: type[Game]) -> Solution:
    """Each legal action alike: what the logged data is played by."""
    return evaluate(game(), uniform)


@cache
def improved(game: type[Game]) -> Solution:
    """One step of policy improvement on random play, what regression on its returns can reach: greedy in its Q values."""
    base = random_play(game).actions
    return evaluate(game(), lambda turn, state, worth: greedy(turn, state, base[turn][state]))


def within(game: type[Game], pairs: Collection[tuple[State, str]]) -> Solution:
    """The optimum among actions that data hold for a state, at whatever turn; random play where they hold none."""
    known: dict[State, set[str]] = {}
    for state, action in pairs:
        known.setdefault(state, set()).add(action)

    def best_known(turn: int, state: State, worth: dict[str, float]) -> dict[str, float]:
        held = {action: value for action, value in worth.items() if action in known.get(state, ())}
        return greedy(turn, state, held) if held else uniform(turn, state, worth)

    return evaluate(game(), best_known)


__all__ = ["improved", "optimum", "random_play", "within"]
