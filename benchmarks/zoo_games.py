"""The games of zoo.py: small tasks whose every probability is known, so that what can be reached on them is computed.

A game is a finite Markov decision process over *information states*: what a player who forgets nothing knows. Of a
hidden number that is the interval it can still lie in. What is observed may say less (`history: all` then holds the
rest). Play samples from `outcomes`, and the dynamic programme sums over it, so that both are one specification.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

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
        self.state = starts[_draw(self.np_random, [probability for probability, _ in starts])][1]
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
            _, reward, self.state = outcomes[_draw(self.np_random, [outcome[0] for outcome in outcomes])]
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


def _draw(rng: np.random.Generator, probabilities: list[float]) -> int:
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
    layers = _reachable(game)
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


def _reachable(game: Game) -> list[dict[State, dict[str, list[Outcome]]]]:
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


# --------------------------------------------------------------------------------------------------- knowing too little
class Guess(Game):
    """A number from 1 to 15, told only whether it is higher or lower than the last guess; -1 a wrong guess."""

    name, turns, illegal, highest = "guess", 8, -2.0, 15

    def starts(self):
        return [(1.0, (1, self.highest, "guess"))]

    def actions(self, state):
        return [str(number) for number in range(1, self.highest + 1)]

    def outcomes(self, state, action):
        low, high, _ = state
        guess, count = int(action), high - low + 1
        below, above = min(max(guess - low, 0), count), min(max(high - guess, 0), count)
        found = count - below - above
        after = [
            (found / count, 0.0, None),
            (below / count, -1.0, (low, min(high, guess - 1), "lower")),
            (above / count, -1.0, (max(low, guess + 1), high, "higher")),
        ]
        return [outcome for outcome in after if outcome[0]]

    def observe(self, state):
        return state[2]


class Code(Game):
    """Two of four colours in an order; a guess is told how many are exact and how many misplaced; -5 a wrong one."""

    name, turns, scale, illegal = "code", 6, 5.0, -2.0
    colours = ("red", "blue", "green", "white")
    codes = [" ".join(pair) for pair in itertools.product(colours, repeat=2)]

    def starts(self):
        return [(1.0, (tuple(self.codes), "guess the code"))]

    def actions(self, state):
        return self.codes

    def outcomes(self, state, action):
        answers: dict[str, list[str]] = {}
        for code in state[0]:
            answers.setdefault(_marks(code, action), []).append(code)
        count = len(state[0])
        return [
            (len(left) / count, *((0.0, None) if left == [action] else (-1.0, (tuple(left), answer))))
            for answer, left in answers.items()
        ]

    def observe(self, state):
        return state[1]


@cache
def _marks(code: str, guess: str) -> str:
    """How many words stand where they do in the code, and how many elsewhere."""
    one, other = code.split(), guess.split()
    exact = sum(a == b for a, b in zip(one, other, strict=True))
    return f"{exact} exact {(Counter(one) & Counter(other)).total() - exact} near"


class Recall(Game):
    """Three colours are shown one by one and then asked for; 1 for each that is right."""

    name, turns = "recall", 6
    colours, asked = ("red", "blue", "green", "white"), ("first", "second", "third")

    def starts(self):
        return [(1 / len(self.colours), ((colour,), None)) for colour in self.colours]

    def actions(self, state):
        return ["next"] if state[1] is None else list(self.colours)

    def outcomes(self, state, action):
        seen, place = state
        if place is None and len(seen) < len(self.asked):
            return [(1 / len(self.colours), 0.0, ((*seen, colour), None)) for colour in self.colours]
        if place is None:
            return [(1.0, 0.0, (seen, 0))]
        after = (seen, place + 1) if place + 1 < len(self.asked) else None
        return [(1.0, float(action == seen[place]), after)]

    def observe(self, state):
        seen, place = state
        return f"see {seen[-1]}" if place is None else f"say the {self.asked[place]}"


class Haggle(Game):
    """Sell to someone whose limit, 1 to 8, is hidden; who refuses a price may leave (0.2) or hear another. Earns it x 10."""

    name, turns, scale, highest, leaves = "haggle", 5, 10.0, 8, 0.2

    def starts(self):
        return [(1.0, (self.highest, "name your price"))]

    def actions(self, state):
        return [str(price) for price in range(1, self.highest + 1)]

    def outcomes(self, state, action):
        limit, price = state[0], int(action)
        sold = max(limit - price + 1, 0) / limit
        after = [
            (sold, float(price), None),
            ((1 - sold) * self.leaves, 0.0, None),
            ((1 - sold) * (1 - self.leaves), 0.0, (min(limit, max(price - 1, 1)), "too much")),
        ]
        return [outcome for outcome in after if outcome[0]]

    def observe(self, state):
        return state[1]


class Bandit(Game):
    """Six pulls of three arms, each of which wins with 0.2 or 0.8, as likely; 1 a win."""

    name, turns = "bandit", 6
    arms, chances = ("red", "blue", "green"), (0.2, 0.8)

    def starts(self):
        return [(1.0, (((0, 0),) * len(self.arms), "pull"))]

    def actions(self, state):
        return list(self.arms)

    def outcomes(self, state, action):
        arm, tallies = self.arms.index(action), state[0]
        won, lost = tallies[arm]
        weights = [chance**won * (1 - chance) ** lost for chance in self.chances]
        win = sum(chance * weight for chance, weight in zip(self.chances, weights, strict=True)) / sum(weights)
        return [
            (win, 1.0, (_put(tallies, arm, (won + 1, lost)), "won")),
            (1 - win, 0.0, (_put(tallies, arm, (won, lost + 1)), "lost")),
        ]

    def observe(self, state):
        return state[1]


def _put(items: tuple, place: int, item: Any) -> tuple:
    return (*items[:place], item, *items[place + 1 :])


class TwoArms(Game):
    """Sixteen pulls of two arms, one of which wins with 0.7 and the other with 0.3; 0.01 a win."""

    name, turns, scale, chance = "two_arms", 16, 0.01, 0.7

    def starts(self):
        return [(1.0, (0, "pull"))]

    def actions(self, state):
        return ["left", "right"]

    def outcomes(self, state, action):
        """The state is how many pulls spoke for the left arm, less those that spoke against."""
        lead, toward = state[0], 1 if action == "left" else -1
        odds = (self.chance / (1 - self.chance)) ** (lead * toward)
        good = odds / (1 + odds)
        win = good * self.chance + (1 - good) * (1 - self.chance)
        return [(win, 1.0, (lead + toward, "won")), (1 - win, 0.0, (lead - toward, "lost"))]

    def observe(self, state):
        return state[1]


class Offers(Game):
    """Up to eight offers, 1 to 10, as likely: take one (it is earned, x 0.1) or pass it for good."""

    name, turns, scale, highest = "offers", 8, 0.1, 10

    def starts(self):
        return [(1 / self.highest, value) for value in range(1, self.highest + 1)]

    def actions(self, state):
        return ["take", "pass"]

    def outcomes(self, state, action):
        return [(1.0, float(state), None)] if action == "take" else [(p, 0.0, value) for p, value in self.starts()]

    def observe(self, state):
        return f"offer {state}"


# ------------------------------------------------------------------------------------------------------ seeing it all
class Sort(Game):
    """Sort four letters by swapping neighbours; -0.1 a swap that does not finish it."""

    name, turns, history, scale, illegal = "sort", 7, 1, 0.1, -2.0
    swaps = {"front": 0, "middle": 1, "back": 2}
    orders = list(itertools.permutations("abcd"))

    def starts(self):
        return [(1 / (len(self.orders) - 1), order) for order in self.orders[1:]]

    def actions(self, state):
        return list(self.swaps)

    def outcomes(self, state, action):
        place, order = self.swaps[action], list(state)
        order[place : place + 2] = reversed(order[place : place + 2])
        return [(1.0, 0.0, None) if tuple(order) == self.orders[0] else (1.0, -1.0, tuple(order))]

    def observe(self, state):
        return " ".join(state)


class Lock(Game):
    """A lock that opens after five letters in the right order, always the same; a wrong one starts over. Earns 100."""

    name, turns, history, scale, illegal = "lock", 8, 1, 100.0, -0.1
    letters, combination = "abcd", "cadbc"

    def starts(self):
        return [(1.0, 0)]

    def actions(self, state):
        return list(self.letters)

    def outcomes(self, state, action):
        if action != self.combination[state]:
            return [(1.0, 0.0, 0)]
        return [(1.0, 1.0, None) if state + 1 == len(self.combination) else (1.0, 0.0, state + 1)]

    def observe(self, state):
        return f"{state} clicks"


class Stock(Game):
    """A shop of at most five: order 0 to 3 at 2 each, sell up to the demand (0 to 3) at 4, and store the rest at 0.5."""

    name, turns, history, room = "stock", 8, 1, 5
    demand = ((0.2, 0), (0.3, 1), (0.3, 2), (0.2, 3))

    def starts(self):
        return [(0.5, 0), (0.5, 3)]

    def actions(self, state):
        return [f"order {count}" for count in range(min(3, self.room - state) + 1)]

    def outcomes(self, state, action):
        ordered = int(action.split()[1])
        after = []
        for probability, wanted in self.demand:
            sold = min(wanted, state + ordered)
            left = state + ordered - sold
            after.append((probability, 4.0 * sold - 2.0 * ordered - 0.5 * left, left))
        return after

    def observe(self, state):
        return f"stock {state}"


class Harvest(Game):
    """Fish from a lake of at most six: what is left multiplies, an empty lake is the end; 10 a fish."""

    name, turns, history, scale, room = "harvest", 8, 1, 10.0, 6
    growth = {0: ((1.0, 0),), 1: ((0.5, 0), (0.5, 1))}

    def starts(self):
        return [(0.5, 3), (0.5, 5)]

    def actions(self, state):
        return [f"take {count}" for count in range(min(3, state) + 1)]

    def outcomes(self, state, action):
        taken = int(action.split()[1])
        left = state - taken
        grown = [(p, min(left + more, self.room)) for p, more in self.growth.get(left, ((0.5, 1), (0.5, 2)))]
        return [(p, float(taken), fish or None) for p, fish in grown]

    def observe(self, state):
        return f"{state} fish"


class Swim(Game):
    """RiverSwim (Strehl and Littman, 2008), another stream: rest at the bank for 0.01, or swim on to where a stroke may earn 1."""

    name, turns, history, far = "swim", 10, 1, 4

    def starts(self):
        return [(1.0, 0)]

    def actions(self, state):
        return ["back", "on"]

    def outcomes(self, state, action):
        if action == "back":
            return [(1.0, 0.0 if state else 0.01, max(state - 1, 0))]
        reward = 1.0 if state == self.far else 0.0
        return [(0.6, reward, min(state + 1, self.far)), (0.3, 0.0, state), (0.1, 0.0, max(state - 1, 0))]

    def observe(self, state):
        return f"stone {state}"


# ---------------------------------------------------------------------------------------------------------- gymnasium's
class Table(Game):
    """A game of gymnasium's, by its own table of transitions; the numbers of its actions get words."""

    history = 1
    words: tuple[str, ...]
    columns: int
    first: tuple[int, ...]
    """Start states, as likely."""

    @classmethod
    def table(cls) -> dict[int, dict[int, list[tuple[float, int, float, bool]]]]:
        raise NotImplementedError

    def starts(self):
        return [(1 / len(self.first), state) for state in self.first]

    def actions(self, state):
        return list(self.words)

    def outcomes(self, state, action):
        rows = self.table()[state][self.words.index(action)]
        return [(float(p), float(reward), None if done else int(after)) for p, after, reward, done in rows]

    def observe(self, state):
        return f"at {state // self.columns} {state % self.columns}"


class FrozenLake(Table):
    """FrozenLake-v1, slippery: 1 at the goal, 0 in a hole."""

    name, turns, columns = "frozen_lake", 16, 4
    words, first = ("left", "down", "right", "up"), (0,)

    @classmethod
    @cache
    def table(cls):
        from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv

        return FrozenLakeEnv(map_name="4x4", is_slippery=True).P


class CliffWalking(Table):
    """CliffWalking: -1 a step and -100 over the cliff, which leads to the corner; from four cells above it."""

    name, turns, columns = "cliff_walking", 10, 12
    words, first, illegal = ("up", "right", "down", "left"), (28, 18, 31, 33), -50.0

    @classmethod
    @cache
    def table(cls):
        from gymnasium.envs.toy_text.cliffwalking import CliffWalkingEnv

        return CliffWalkingEnv().P


class Taxi(Table):
    """Taxi: -1 a step, -10 for a pick-up or drop-off where there is nothing to, 20 for the right one; from four states."""

    name, turns, illegal = "taxi", 8, -10.0
    words, stands = ("south", "north", "east", "west", "pickup", "dropoff"), ("red", "green", "yellow", "blue")
    first = (
        4 * 100 + 0 * 20 + 4 * 4 + 0,
        3 * 100 + 3 * 20 + 4 * 4 + 3,
        3 * 100 + 0 * 20 + 2 * 4 + 0,
        1 * 100 + 4 * 20 + 7,
    )
    """Each is ((row x 5 + column) x 5 + passenger) x 4 + destination."""

    @classmethod
    @cache
    def table(cls):
        from gymnasium.envs.toy_text.taxi import TaxiEnv

        return TaxiEnv().P

    def observe(self, state):
        place, goal = divmod(state, 4)
        place, passenger = divmod(place, 5)
        row, column = divmod(place, 5)
        where = self.stands[passenger] if passenger < len(self.stands) else "taxi"
        return f"at {row} {column} {where} to {self.stands[goal]}"


class Blackjack(Game):
    """Blackjack-v1 of gymnasium by its default rules: an infinite deck, 1, 0 or -1, no bonus for a natural."""

    name, turns, history = "blackjack", 8, 1
    cards = [(1 / 13, card) for card in range(1, 10)] + [(4 / 13, 10)]

    def starts(self):
        hands: Counter[State] = Counter()
        for (p, one), (q, other), (r, shown) in itertools.product(self.cards, repeat=3):
            hands[(*_with_card(_with_card((0, False), one), other), shown)] += p * q * r
        return [(probability, hand) for hand, probability in hands.items()]

    def actions(self, state):
        return ["hit", "stick"]

    def outcomes(self, state, action):
        *hand, shown = state
        if action == "hit":
            drawn = [(p, _with_card(tuple(hand), card)) for p, card in self.cards]
            return [(p, -1.0, None) if total > 21 else (p, 0.0, (total, soft, shown)) for p, (total, soft) in drawn]
        dealt = _dealer(_with_card((0, False), shown), hole=True)
        odds = {
            1.0: sum(p for total, p in dealt.items() if total > 21 or total < hand[0]),
            0.0: dealt.get(hand[0], 0.0),
            -1.0: sum(p for total, p in dealt.items() if hand[0] < total <= 21),
        }
        return [(p, reward, None) for reward, p in odds.items() if p]

    def observe(self, state):
        total, soft, shown = state
        return f"{'soft' if soft else 'hard'} {total} dealer {shown}"


def _with_card(hand: tuple[int, bool], card: int) -> tuple[int, bool]:
    """A hand's total, and whether an ace in it counts 11, after a card."""
    total, soft = hand
    hard = total - 10 * soft + card
    soft = (soft or card == 1) and hard + 10 <= 21
    return hard + 10 * soft, soft


@cache
def _dealer(hand: tuple[int, bool], hole: bool = False) -> dict[int, float]:
    """Distribution of the dealer's last total, who draws up to 17. hole: the second card comes in any case."""
    if hand[0] >= 17 and not hole:
        return {hand[0]: 1.0}
    totals: Counter[int] = Counter()
    for probability, card in Blackjack.cards:
        for total, then in _dealer(_with_card(hand, card)).items():
            totals[total] += probability * then
    return dict(totals)


GAMES: dict[str, type[Game]] = {
    game.name: game
    for game in (
        Guess,
        Code,
        Recall,
        Haggle,
        Bandit,
        TwoArms,
        Offers,
        Sort,
        Lock,
        Stock,
        Harvest,
        Swim,
        FrozenLake,
        CliffWalking,
        Taxi,
        Blackjack,
    )
}
