"""Games of zoo.py that were written to choose the optimizer on: like held-out ones in kind; zoo_game.py says what a game is."""

from __future__ import annotations

from zoo_game import Game


class Ferry(Game):
    """A raft on a river of 4 by 5 that drifts to either side of its course a quarter of the time; rocks end it; 1 at the pier."""

    name, turns, history = "ferry", 16, 1
    rows, columns, pier, rocks = 4, 5, (3, 4), {(1, 1), (1, 3), (2, 0), (3, 2)}
    courses = {"north": (-1, 0), "east": (0, 1), "south": (1, 0), "west": (0, -1)}

    def starts(self):
        return [(1.0, (0, 0))]

    def actions(self, state):
        return list(self.courses)

    def outcomes(self, state, action):
        names = list(self.courses)
        place = names.index(action)
        return [(p, *self._moved(state, names[(place + drift) % 4])) for p, drift in ((0.5, 0), (0.25, 1), (0.25, 3))]

    def _moved(self, state, course):
        row, column = (at + step for at, step in zip(state, self.courses[course], strict=True))
        at = min(max(row, 0), self.rows - 1), min(max(column, 0), self.columns - 1)
        return (1.0, None) if at == self.pier else (0.0, None if at in self.rocks else at)

    def observe(self, state):
        return f"row {state[0]} column {state[1]}"


class Duel(Game):
    """Draw cards of 1 to 6 up to a total of 15, or stand against a rival whose strength is seen; 1 or -1."""

    name, turns, history, most = "duel", 6, 1, 15

    def starts(self):
        return [(1 / 60, (total, rival)) for total in range(3, 13) for rival in range(1, 7)]

    def actions(self, state):
        return ["draw", "stand"]

    def outcomes(self, state, action):
        total, rival = state
        if action == "stand":
            win = min(max(0.05 + 0.07 * (total - 4) - 0.04 * (rival - 3.5), 0.02), 0.98)
            return [(win, 1.0, None), (1 - win, -1.0, None)]
        totals = [total + card for card in range(1, 7)]
        return [(1 / 6, 0.0, (one, rival)) if one <= self.most else (1 / 6, -1.0, None) for one in totals]

    def observe(self, state):
        return f"total {state[0]} rival {state[1]}"


class Market(Game):
    """Twelve goods and three towns: which town pays best for which shows only in noisy profits, 10 or -10."""

    name, turns, history, scale, towns = "market", 1, 1, 10.0, ("port", "hill", "ford")

    def starts(self):
        return [(1 / 12, good) for good in range(12)]

    def actions(self, state):
        return list(self.towns)

    def outcomes(self, state, action):
        place, best = self.towns.index(action), state % 3 if state % 4 else 0
        win = 0.45 + 0.2 * (place == best) + 0.1 * (place == 0)
        return [(win, 1.0, None), (1 - win, -1.0, None)]

    def observe(self, state):
        return f"good {state}"


class Boxes(Game):
    """A coin is in one of twelve boxes in a row; each is told to be nearer or farther than the one before; -1 per wrong box."""

    name, turns, illegal, count = "boxes", 7, -2.0, 12

    def starts(self):
        return [(1.0, (tuple(range(1, self.count + 1)), None, "open a box"))]

    def actions(self, state):
        return [str(box) for box in range(1, self.count + 1)]

    def outcomes(self, state, action):
        left, last, _ = state
        box, answers = int(action), {}
        for coin in left:
            answers.setdefault(self._answer(coin, box, last), []).append(coin)
        return [
            (len(coins) / len(left), *((0.0, None) if answer is None else (-1.0, (tuple(coins), box, answer))))
            for answer, coins in answers.items()
        ]

    def _answer(self, coin, box, last):
        if coin == box:
            return None
        if last is None:
            return "empty"
        now, before = abs(coin - box), abs(coin - last)
        return "nearer" if now < before else "farther" if now > before else "as far"

    def observe(self, state):
        return state[2]


class Lift(Game):
    """Drive a lift of eight floors to where it is called and open its door: 5 there, -5 elsewhere; -0.2 per floor."""

    name, turns, history, floors = "lift", 12, 1, 8

    def starts(self):
        return [(1 / self.floors**2, (at, to)) for at in range(self.floors) for to in range(self.floors)]

    def actions(self, state):
        return ["up", "down", "open"]

    def outcomes(self, state, action):
        at, to = state
        if action == "open":
            return [(1.0, 5.0 if at == to else -5.0, None)]
        return [(1.0, -0.2, (min(at + 1, self.floors - 1) if action == "up" else max(at - 1, 0), to))]

    def observe(self, state):
        return f"at {state[0]} to {state[1]}"


class Bids(Game):
    """An auction: bid 0 to 9 for what is worth 1 to 9, against a bid from 1 to 9; the higher bid pays and gets it."""

    name, turns, history = "bids", 1, 1

    def starts(self):
        return [(1 / 9, worth) for worth in range(1, 10)]

    def actions(self, state):
        return [str(bid) for bid in range(10)]

    def outcomes(self, state, action):
        bid = int(action)
        win = max(bid - 1, 0) / 9
        return [(p, reward, None) for p, reward in ((win, float(state - bid)), (1 - win, 0.0)) if p]

    def observe(self, state):
        return f"worth {state}"


class Keys(Game):
    """Fetch the key of a door's colour from one of three rooms: opening earns 10, but a wrong key breaks in the lock, -10."""

    name, turns, history, colours = "keys", 6, 1, ("red", "blue", "green")

    def starts(self):
        return [(1 / 3, (colour, "hall", "nothing")) for colour in self.colours]

    def actions(self, state):
        return [*(f"go {colour}" for colour in self.colours), "back", "take", "open"]

    def outcomes(self, state, action):
        door, room, key = state
        if action == "open":
            if room != "hall" or key == "nothing":
                return [(1.0, -2.0, state)]
            return [(1.0, 10.0 if key == door else -10.0, None)]
        if action == "take":
            return [(1.0, -0.5, (door, room, key if room == "hall" else room))]
        if action == "back":
            return [(1.0, -0.5, (door, "hall", key))]
        return [(1.0, -0.5, (door, action.removeprefix("go ") if room == "hall" else room, key))]

    def observe(self, state):
        return f"door {state[0]} in {state[1]} holds {state[2]}"
