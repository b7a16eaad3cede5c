"""The games of zoo.py, except those of gymnasium (zoo_gymnasium.py) and later ones (zoo_later.py, zoo_tuning.py); zoo_game.py says what a game is."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any

from zoo_game import Game
from zoo_gymnasium import Blackjack, CliffWalking, FrozenLake, Taxi
from zoo_later import Dive, Press, Wager
from zoo_tuning import Bids, Boxes, Duel, Ferry, Keys, Lift, Market


# --------------------------------------------------------------------------------------------------- knowing too little
class Guess(Game):
    """A number from 1 to 15, told only whether it is higher or lower than the last guess; -1 per wrong guess."""

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
    """Two of four colours in an order; each guess is told how many are exact and how many misplaced; -5 per wrong guess."""

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
    """Three colours are shown one by one and then asked for; 1 per right answer."""

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
    """Sell to a buyer with a hidden limit, 1 to 8, who leaves after a price above it with probability 0.2. Earns price x 10."""

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
    """Six pulls of three arms, each of which wins with probability 0.2 or 0.8, equally likely; 1 per win."""

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
    """Sixteen pulls of two arms, one of which wins with probability 0.7 and the other with 0.3; 0.01 per win."""

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
    """Up to eight offers, 1 to 10, equally likely: take one (earns it x 0.1) or pass it for good."""

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
    """Sort four letters by swapping neighbours; -0.1 per swap that does not finish it."""

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
    """A lock that opens after five letters in a fixed order; a wrong letter starts over. Opening earns 100."""

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
    """Fish from a lake of at most six: what is left multiplies, an empty lake ends the episode; 10 per fish."""

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


SETS = ("first", "second", "later", "tuning")
LATER = {game.name: game for game in (Wager, Dive, Press)}
TUNING = {game.name: game for game in (Ferry, Duel, Market, Boxes, Lift, Bids, Keys)}

GAMES: dict[str, type[Game]] = (
    {
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
    | LATER
    | TUNING
)


def half(which: str) -> list[str]:
    """Tasks of the first (tuning) or second (held-out) half, of those written later, of those written to tune on, or all; the
    halves are a matter of names alone."""
    ordered = split(GAMES.keys() - LATER.keys() - TUNING.keys())
    middle = len(ordered) // 2
    sets = {"first": ordered[:middle], "second": ordered[middle:], "later": [*LATER], "tuning": [*TUNING]}
    return sets[which] if which in sets else [*GAMES]


def split(names: Iterable[str]) -> list[str]:
    """Names in the order of their hashes; the first half is the tuning half."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
