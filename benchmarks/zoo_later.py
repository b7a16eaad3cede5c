"""Games of zoo.py that were written after all settings had been chosen; zoo_game.py says what a game is."""

from __future__ import annotations

from zoo_game import Game


class Wager(Game):
    """A card from 1 to 12: leave it, or take it, which wins or loses 1, the higher the likelier; the average card loses."""

    name, turns, history = "wager", 1, 1

    def starts(self):
        return [(1 / 12, card) for card in range(1, 13)]

    def actions(self, state):
        return ["leave", "take"]

    def outcomes(self, state, action):
        if action == "leave":
            return [(1.0, 0.0, None)]
        win = state / 16
        return [(win, 1.0, None), (1 - win, -1.0, None)]

    def observe(self, state):
        return f"card {state}"


class Dive(Game):
    """Six depths, one after the other: a dive costs 2 and may find a pearl worth 5, but only from depth 5 on, the deeper the likelier."""

    name, turns, history = "dive", 6, 1

    def starts(self):
        return [(1 / 9, depth) for depth in range(9)]

    def actions(self, state):
        return ["wait", "dive"]

    def outcomes(self, state, action):
        if action == "wait":
            return [(p, 0.0, depth) for p, depth in self.starts()]
        pearl = state / 12 if state > 4 else 0.0
        found = [(pearl, 3.0), (1 - pearl, -2.0)]
        return [(p * chance, reward, depth) for p, depth in self.starts() for chance, reward in found if chance]

    def observe(self, state):
        return f"depth {state}"


class Press(Game):
    """Press your luck: roll to add 1 to 8 to the total, where more than 12 loses; keeping it wins or loses 1, by its size."""

    name, turns, history, most, sides = "press", 6, 1, 12, 8

    def starts(self):
        return [(1 / 9, total) for total in range(2, 11)]

    def actions(self, state):
        return ["keep", "roll"]

    def outcomes(self, state, action):
        if action == "keep":
            win = 0.2 + 0.06 * (state - 2)
            return [(win, 1.0, None), (1 - win, -1.0, None)]
        totals = [state + die for die in range(1, self.sides + 1)]
        return [
            (1 / self.sides, 0.0, total) if total <= self.most else (1 / self.sides, -1.0, None) for total in totals
        ]

    def observe(self, state):
        return f"total {state}"
