"""Metrics of several samples of a prompt: pass@k, maj@k and best@k.

All are expected values for k samples, estimated from the n >= k that were drawn as the mean over all subsets of k,
which is unbiased and varies less than the value of one subset.

    pass@4          share of prompts that at least one of 4 samples solves (Chen et al., arXiv 2107.03374)
    maj@4           the score of the answer that most of 4 samples give (Wang et al., arXiv 2203.11171)
    best@4          the score of the sample with the highest reward of 4
    best@4/NAME     that sample's NAME; likewise pass@4/NAME and maj@4/NAME
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

from lmrl.errors import RecipeError
from lmrl.evaluation.statistics import are_binary, is_tie
from lmrl.seeding import stream

FINAL = re.compile(r"####\s*(.+)|\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
"""How a final answer is marked in GSM8K and MATH, there with up to two levels of braces inside."""
FORM = re.compile(r"(pass|maj|best)@([1-9][0-9]*)(?:/(.+))?")
MOST_SUBSETS = 2000
"""For maj@k, which has no closed form: if there are more subsets than this, this many are drawn, the same every
time."""


@dataclass(frozen=True)
class SeveralSamples:
    """A metric of `count` samples. metric: the metric of single samples that it combines (None: the reward or
    return)."""

    name: str
    kind: str
    count: int
    metric: str | None

    def __call__(
        self, rewards: Sequence[float | None], values: Sequence[float | None], completions: Sequence[str]
    ) -> float | None:
        """Its value for the judged samples of one prompt; None if fewer than `count` have a value.

        rewards: for choosing the best (None: not judged). values: of the metric. Raises RecipeError for pass@k of a value that is not 0 or
        1.
        """
        rows = [row for row, value in enumerate(values) if value is not None]
        if len(rows) < self.count:
            return None
        scored = [value for value in values if value is not None]
        if self.kind == "best":
            known = [reward for reward in (rewards[row] for row in rows) if reward is not None]
            return best_at(self.count, known, scored) if len(known) == len(scored) else None
        if self.kind == "maj":
            return majority_at(self.count, [answer_of(completions[row]) for row in rows], scored)
        if other := next((value for value in scored if not are_binary([value])), None):
            raise RecipeError(
                f"metrics: '{self.name}' counts scores of 0 and 1, but there is {other:g}: name such a one, pass@{self.count}/NAME"
            )
        return pass_at(self.count, len(scored), round(sum(scored)))


@lru_cache
def several_samples(name: str) -> SeveralSamples | None:
    """The metric of that name; None for a metric of single samples."""
    match = FORM.fullmatch(name)
    return SeveralSamples(name, match[1], int(match[2]), match[3]) if match else None


def pass_at(k: int, n: int, right: int) -> float:
    """Share of the subsets of k of n samples that hold one of the `right` ones."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def best_at(k: int, rewards: Sequence[float], values: Sequence[float]) -> float:
    """Mean over subsets of k: the value of the sample with the highest reward; of equally high ones, their mean."""
    order = sorted(range(len(rewards)), key=rewards.__getitem__)
    subsets, total, first = math.comb(len(order), k), 0.0, 0
    while first < len(order):
        last = first
        while last < len(order) and is_tie(rewards[order[last]], rewards[order[first]]):
            last += 1
        share = (math.comb(last, k) - math.comb(first, k)) / subsets  # subsets whose highest reward is this one
        total += share * math.fsum(values[row] for row in order[first:last]) / (last - first)
        first = last
    return total


def majority_at(k: int, answers: Sequence[str], values: Sequence[float]) -> float:
    """Mean over subsets of k: the value of the most frequent answer; of equally frequent ones, the mean of theirs."""
    count = len(answers)
    if math.comb(count, k) <= MOST_SUBSETS:
        subsets: Iterable[Sequence[int]] = combinations(range(count), k)
    else:
        rng = stream("maj", count, k)
        subsets = (rng.choice(count, k, replace=False).tolist() for _ in range(MOST_SUBSETS))
    found = [_majority([answers[row] for row in rows], [values[row] for row in rows]) for rows in subsets]
    return math.fsum(found) / len(found)


def _majority(answers: Sequence[str], values: Sequence[float]) -> float:
    counts = Counter(answers)
    most = max(counts.values())
    of_answer: dict[str, list[float]] = {}
    for answer, value in zip(answers, values, strict=True):
        if counts[answer] == most:
            of_answer.setdefault(answer, []).append(value)
    means = [math.fsum(given) / len(given) for given in of_answer.values()]
    return math.fsum(means) / len(means)


def answer_of(completion: str) -> str:
    r"""The answer that a completion votes for: the text after its last `####` or in its last `\boxed{}`, else all of
    it; white space, case and a final full stop are ignored."""
    marked = [one or other for one, other in FINAL.findall(completion)]
    return " ".join((marked[-1] if marked else completion).split()).rstrip(".").casefold()
