"""What can be reached on a game of zoo.py, computed by dynamic programming over turns and information states.

A policy that sees the last observation alone (`history: 1`) knows the state, but not which turn it is, so it has to act
alike on all turns. Where it matters how many turns are left, it cannot reach the optimum.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Collection
from functools import cache
from itertools import accumulate

from zoo_game import TIE, Game, Solution, State, evaluate, greedy, optimum, uniform

NEAR = 1e-3
"""Share of what play can gain over random play that is not worth a search."""


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


@cache
def attainable(game: type[Game]) -> Solution:
    """The best policy that sees no more than what the game shows."""
    return within(
        game, {(state, action) for layer in optimum(game).actions for state in layer for action in layer[state]}
    )


def within(game: type[Game], pairs: Collection[tuple[State, str]]) -> Solution:
    """The best policy that sees what the game shows, among actions that data hold for a state, at whatever turn; random play
    where they hold none."""
    known: dict[State, set[str]] = {}
    for state, action in pairs:
        known.setdefault(state, set()).add(action)

    def best_known(turn: int, state: State, worth: dict[str, float]) -> dict[str, float]:
        held = {action: value for action, value in worth.items() if action in known.get(state, ())}
        return greedy(turn, state, held) if held else uniform(turn, state, worth)

    by_turn = evaluate(game(), best_known)
    return by_turn if game.history == "all" else alike(game, known, by_turn)


def alike(game: type[Game], known: dict[State, set[str]], by_turn: Solution) -> Solution:
    """The best policy that acts alike on all turns, as far as changes of one action at a time find it, starting from what is
    best on each turn. by_turn: the best that knows the turn."""
    enough = by_turn.value - NEAR * (by_turn.value - random_play(game).value)
    best = None
    for turn in range(game.turns):
        choices: dict[State, str] = {}
        for layer in (by_turn.actions[turn], *by_turn.actions):  # a state may not be met on this turn
            for state, worth in layer.items():
                if state in known:
                    choices.setdefault(state, max(sorted(known[state]), key=worth.get))
        found = _climb(game, choices, known, enough)
        best = found if best is None or found.value > best.value else best
        if best.value >= enough:
            break
    return best


def _climb(game: type[Game], choices: dict[State, str], known: dict[State, set[str]], enough: float) -> Solution:
    """Changes one choice at a time for as long as that helps and less than `enough` is reached."""

    def play(turn: int, state: State, worth: dict[str, float]) -> dict[str, float]:
        return {choices[state]: 1.0} if state in choices else uniform(turn, state, worth)

    best, last = evaluate(game(), play), None
    while best.value < enough and best is not last:
        last = best
        for state, action in [(one, action) for one in choices for action in sorted(known[one])]:
            before, choices[state] = choices[state], action
            found = evaluate(game(), play)
            if found.value > best.value + TIE:
                best = found
            else:
                choices[state] = before
    return best


__all__ = ["attainable", "decoded", "improved", "optimum", "random_play", "within"]
