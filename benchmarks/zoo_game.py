"""What a game of zoo.py is: a small task whose every probability is known, so that what can be reached on it is computed.

A game is a finite Markov decision process over *information states*: what a player who forgets nothing knows. Of a
hidden number that is the interval it can still lie in. What is observed may say less (`history: all` then holds the
rest). Play samples from `outcomes`, and the dynamic programme sums over it, so that both are one specification.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

from lmrl.environments import TextEnvironment

State = Hashable
Outcome = tuple[float, float, State | None]
"""Probability, reward, and the state that follows (None: the episode has terminated)."""
Policy = Callable[[int, State, dict[str, float]], dict[str, float]]
"""From turn (counted from 0), state and the value of each legal action to each chosen action's probability."""
TIE = 1e-9


class Game(TextEnvironment):
    """Base of all games. Rewards of `outcomes` and `illegal` are in the game's own units; `scale` multiplies them all.

    An action is a legal one's text; other text earns `illegal`, takes a turn and leaves the state. An episode is
    over after `turns` turns, and what an action is worth counts the turns that are left.

    Players: `random`, each legal action alike, and `optimal`. Metrics: `regret`, what the actions so far cost beside the
    optimum, in expectation; and `illegal`, the number of texts that were no action.
    """

    name: str
    turns: int
    history: int | str = "all"
    scale: float = 1.0
    illegal: float = -1.0
    players = ("random", "optimal")

    # ----------------------------------------------------------------------------------------------- the specification
    def starts(self) -> list[tuple[float, State]]:
        """Start states with their probabilities."""
        raise NotImplementedError

    def actions(self, state: State) -> list[str]:
        """The legal actions."""
        raise NotImplementedError

    def outcomes(self, state: State, action: str) -> list[Outcome]:
        """What may follow a legal action."""
        raise NotImplementedError

    def observe(self, state: State) -> str:
        """What is seen on reaching the state."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------ gymnasium
    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[str, dict]:
        super().reset(seed=seed)
        starts = self.starts()
        self.state = starts[draw(self.np_random, [probability for probability, _ in starts])][1]
        self.turn, self.regret, self.mistakes = 0, 0.0, 0
        self.played: list[tuple[State, str]] = []
        return self.observe(self.state), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        action, solution = " ".join(action.split()), optimum(type(self))
        best, following = solution.values[self.turn][self.state], solution.values[self.turn + 1]
        if action in self.actions(self.state):
            self.played.append((self.state, action))
            self.regret += best - solution.actions[self.turn][self.state][action]
            outcomes = self.outcomes(self.state, action)
            _, reward, self.state = outcomes[draw(self.np_random, [outcome[0] for outcome in outcomes])]
        else:
            self.mistakes += 1
            self.regret += best - (self.scale * self.illegal + following[self.state])
            reward = self.illegal
        self.turn += 1
        terminated = self.state is None or self.turn >= self.turns  # the limit is a rule of the game
        metrics = {"regret": self.regret, "illegal": self.mistakes}
        observation = "" if terminated else self.observe(self.state)
        return observation, self.scale * reward, terminated, False, {"metrics": metrics}

    # ---------------------------------------------------------------------------------------------------------- extras
    def act(self, player: str, rng: np.random.Generator) -> str:
        if player == "random":
            return str(rng.choice(self.actions(self.state)))
        values = optimum(type(self)).actions[self.turn][self.state]
        return max(values, key=values.get)

    def texts(self) -> Iterable[str]:
        """Every observation and action."""
        states = set().union(*optimum(type(self)).actions)
        return sorted({text for state in states for text in [self.observe(state), *self.actions(state)]})


def draw(rng: np.random.Generator, probabilities: list[float]) -> int:
    place = int(np.searchsorted(np.cumsum(probabilities), rng.random(), side="right"))
    return min(place, len(probabilities) - 1)  # rounding may leave the sum just below 1


# ------------------------------------------------------------------------------------------------- dynamic programming
@dataclass
class Solution:
    """What a policy is worth: by turn and state; of its actions too, where it goes on after them."""

    value: float
    """Expected return of an episode."""
    values: list[dict[State, float]]
    """`turns` + 1 entries; the last, when no turn is left, is 0 everywhere."""
    actions: list[dict[State, dict[str, float]]]


def evaluate(game: Game, policy: Policy) -> Solution:
    """The exact value of a policy, backwards from the last turn."""
    layers = reachable(game)
    values: list[dict[State, float]] = [dict.fromkeys(layers[-1], 0.0)]
    actions: list[dict[State, dict[str, float]]] = []
    for turn in reversed(range(game.turns)):
        worth = {
            state: {
                action: sum(p * (game.scale * reward + values[0].get(after, 0.0)) for p, reward, after in outcomes)
                for action, outcomes in legal.items()
            }
            for state, legal in layers[turn].items()
        }
        chosen = {state: policy(turn, state, own) for state, own in worth.items()}
        actions.insert(0, worth)
        values.insert(0, {state: sum(p * worth[state][a] for a, p in own.items()) for state, own in chosen.items()})
    return Solution(sum(p * values[0][state] for p, state in game.starts()), values, actions)


def reachable(game: Game) -> list[dict[State, dict[str, list[Outcome]]]]:
    """For each turn, and the end, the states that it can begin in, with what their actions lead to.

    A state can always be met a turn later: a text that is no action leaves it.
    """
    known: dict[State, dict[str, list[Outcome]]] = {}
    states, layers = {state for _, state in game.starts()}, []
    for _ in range(game.turns + 1):
        for state in states - known.keys():
            known[state] = {action: game.outcomes(state, action) for action in game.actions(state)}
        layers.append({state: known[state] for state in states})
        met = {after for state in states for outcomes in known[state].values() for _, _, after in outcomes}
        states = (states | met) - {None}
    return layers


def uniform(turn: int, state: State, worth: dict[str, float]) -> dict[str, float]:
    return dict.fromkeys(worth, 1 / len(worth))


def greedy(turn: int, state: State, worth: dict[str, float]) -> dict[str, float]:
    """The best action; equally good ones share."""
    best = max(worth.values())
    alike = [action for action, value in worth.items() if value >= best - TIE * max(abs(best), 1e-3)]
    return dict.fromkeys(alike, 1 / len(alike))


@cache
def optimum(game: type[Game]) -> Solution:
    return evaluate(game(), greedy)
