"""The games of zoo.py that are gymnasium's, from its own tables and rules; the numbers of its actions get words."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache

from zoo_game import Game, State


class Table(Game):
    """A game of gymnasium's, by its own table of transitions; the numbers of its actions get words."""

    history = 1
    words: tuple[str, ...]
    columns: int
    first: tuple[int, ...]
    """Start states, equally likely."""

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
