"""Is the number of ones in a row of bits even or odd?"""

from lmrl import TextEnvironment


class Parity(TextEnvironment):
    """One turn: the observation is `1 0 1 1`, and the right one of `odd` and `even` earns 1."""

    players = ("random", "optimal")
    metric_limits = {"return": (0, 1)}

    def __init__(self, bits: int = 3):
        self.num_starts, self.bits = 2**bits, bits

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(self.num_starts))
        self.number = (options or {}).get("start", drawn)
        return self._shown(self.number), {}

    def step(self, action):
        return "", float(action.strip() == self._answer()), True, False, {}

    def act(self, player, rng):
        return self._answer() if player == "optimal" else str(rng.choice(["even", "odd"]))

    def texts(self):
        return [*map(self._shown, range(self.num_starts)), "even", "odd"]

    def _shown(self, number):
        return " ".join(f"{number:0{self.bits}b}")

    def _answer(self):
        return "odd" if self.number.bit_count() % 2 else "even"
