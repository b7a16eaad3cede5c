"""How many prompts pairing saves, and how often equal policies are declared different, by `lmrl compare`'s p-values.

    python benchmarks/compare.py [--trials 4000] [--output FILE]

Simulated scores of two policies on the same prompts, of variance 1 and correlation .3, .6 and .8. `needed` is the
number of prompts with which a difference of 0.25 has a p-value below 0.05 in 80 % of comparisons, searched for by
simulation: paired, and unpaired (Welch's t-test of the same two samples). Their ratio should be 1 - correlation, within
10 %. `estimate` is the median of the number that `lmrl compare` estimates from 100 prompts. `false positives` are
p-values below 0.05 for equal policies, which should be 4 to 6 %: with 40 prompts, and with 40 prompts of 4 samples each
that share the prompt's difficulty.

A second table has scores that are not normal, without limits: how often the interval of the difference misses it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lmrl.evaluation.paired import gap_limits, prompts_needed
from lmrl.evaluation.statistics import p_value, summarize
from lmrl.evaluation.t_distribution import upper_tail
from lmrl.seeding import stream

CORRELATIONS = (0.3, 0.6, 0.8)
EFFECT, POWER, LEVEL = 0.25, 0.8, 0.05
FEW, SAMPLES = 40, 4
"""Prompts, and samples per prompt, for counting false positives."""
SEEN = 100
"""Number of prompts from which the needed number is estimated."""
WITHIN = 0.1
WRONG = 0.04, 0.06

Pair = tuple[np.ndarray, np.ndarray]
Test = Callable[[np.ndarray, np.ndarray], float]


def scores(rng: np.random.Generator, prompts: int, correlation: float, effect: float = 0.0) -> Pair:
    """Scores of two policies on the same prompts."""
    shared = math.sqrt(correlation) * rng.standard_normal(prompts)
    one, other = (shared + math.sqrt(1 - correlation) * rng.standard_normal(prompts) for _ in range(2))
    return one, other + effect


def paired(one: np.ndarray, other: np.ndarray) -> float:
    return p_value(other - one, limits=gap_limits(None, (0.5,)))


def welch(one: np.ndarray, other: np.ndarray) -> float:
    """Welch's t-test, which treats the two samples as independent."""
    count = len(one)
    parts = one.var(ddof=1) / count, other.var(ddof=1) / count
    df = sum(parts) ** 2 * (count - 1) / sum(part**2 for part in parts)
    return 2 * upper_tail(abs(other.mean() - one.mean()) / math.sqrt(sum(parts)), df)


def power(test: Test, prompts: int, correlation: float, trials: int) -> float:
    """Share of trials in which a difference of EFFECT is found. Unpaired samples are drawn independently."""
    rng, found = stream("compare", test.__name__, prompts, str(correlation)), 0
    for _ in range(trials):
        found += test(*scores(rng, prompts, correlation if test is paired else 0.0, EFFECT)) < LEVEL
    return found / trials


def needed(test: Test, correlation: float, trials: int) -> int:
    """The fewest prompts with that power, by bisection."""
    low, high = 8, 1000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(test, middle, correlation, trials) >= POWER else (middle, high)
    return high


def estimated(correlation: float, trials: int) -> float:
    """Median of the needed prompts as estimated from SEEN prompts with a difference of about EFFECT."""
    rng = stream("compare", "estimate", str(correlation))
    pairs = (scores(rng, SEEN, correlation, EFFECT) for _ in range(trials))
    return float(np.median([prompts_needed(other - one, range(SEEN)) for one, other in pairs]))


def false_positives(correlation: float, samples: int, trials: int) -> float:
    """Share of comparisons of equal policies with a p-value below LEVEL; all samples of a prompt share half of the
    variance that the two policies do not."""
    rng, clusters, wrong = stream("compare", "equal", str(correlation), samples), np.repeat(np.arange(FEW), samples), 0
    for _ in range(trials):
        one, other = scores(rng, FEW, correlation)
        gaps = np.repeat(other - one, samples)
        if samples > 1:
            gaps = (gaps + math.sqrt(2 * (1 - correlation)) * rng.standard_normal(len(gaps))) / math.sqrt(2)
        wrong += p_value(gaps, clusters.tolist(), limits=gap_limits(None, (0.5,))) < LEVEL
    return wrong / trials


def binary_false_positives(correlation: float, trials: int) -> float:
    """The same for successes (0 or 1) at a rate of 1/2: 1 for a normal score above 0."""
    rng, wrong = stream("compare", "binary", str(correlation)), 0
    for _ in range(trials):
        one, other = ((side > 0).astype(float) for side in scores(rng, 2 * FEW, correlation))
        wrong += p_value(other - one, limits=(-1.0, 1.0)) < LEVEL
    return wrong / trials


def log_normal(rng: np.random.Generator, prompts: int) -> Pair:
    return rng.lognormal(size=prompts), rng.lognormal(size=prompts)


def log_normal_by_prompt(rng: np.random.Generator, prompts: int) -> Pair:
    """Prompts share four fifths of the logarithms' variance."""
    shared = rng.standard_normal(prompts)
    one, other = (np.exp(shared + 0.5 * rng.standard_normal(prompts)) for _ in range(2))
    return one, other


def failures(rng: np.random.Generator, prompts: int, share: float) -> np.ndarray:
    """Normal scores, of which this share is 10 lower."""
    return rng.standard_normal(prompts) - 10 * (rng.random(prompts) < share)


SKEWED: dict[str, tuple[Callable[[np.random.Generator, int], Pair], float]] = {
    "log-normal": (log_normal, 0.0),
    "log-normal, prompts share 4/5 of the variance": (log_normal_by_prompt, 0.0),
    "both fail on 5 % of prompts": (
        lambda rng, prompts: (failures(rng, prompts, 0.05), failures(rng, prompts, 0.05)),
        0.0,
    ),
    "one fails on 10 % of prompts": (
        lambda rng, prompts: (failures(rng, prompts, 0), failures(rng, prompts, 0.1)),
        -1.0,
    ),
}
"""Scores that are not normal, and the true difference."""
SIZES = (20, 50, 200)
"""Prompts of these comparisons."""


def miss_rate(name: str, prompts: int, trials: int) -> float:
    """Share of comparisons whose interval does not contain the true difference."""
    draw, true = SKEWED[name]
    rng, wrong = stream("compare", name, prompts), 0
    for _ in range(trials):
        one, other = draw(rng, prompts)
        low, high = summarize(other - one, paired=True)["ci95"]
        wrong += not low <= true <= high
    return wrong / trials


def row(correlation: float, trials: int) -> tuple[str, list[str]]:
    """A line of the table, and the targets that it misses."""
    with_pairs, without = (needed(test, correlation, trials) for test in (paired, welch))
    ratio = with_pairs / without
    wrong = [false_positives(correlation, samples, trials) for samples in (1, SAMPLES)]
    wrong.append(binary_false_positives(correlation, trials))
    misses = [] if abs(ratio / (1 - correlation) - 1) <= WITHIN else [f"correlation {correlation}: ratio {ratio:.3f}"]
    misses += [
        f"correlation {correlation}: false positives {share:.3f}"
        for share in wrong
        if not WRONG[0] <= share <= WRONG[1]
    ]
    cells = [f"{correlation}", f"{without}", f"{with_pairs}", f"{ratio:.2f}", f"{1 - correlation:.2f}"]
    cells += [f"{estimated(correlation, trials):.0f}", *(f"{100 * share:.1f} %" for share in wrong)]
    return "| " + " | ".join(cells) + " |", misses


HEADS = (
    "correlation",
    "needed unpaired",
    "needed paired",
    "ratio",
    "1 - correlation",
    "estimate",
    f"false positives, {FEW} prompts",
    f"{FEW} x {SAMPLES} samples",
    f"0/1, {2 * FEW} prompts",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4000)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    began, misses = time.monotonic(), []
    lines = ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
    for correlation in CORRELATIONS:
        line, missed = row(correlation, arguments.trials)
        lines.append(line)
        misses += missed
        print(line, flush=True)
    lines += [
        "",
        "| scores | " + " | ".join(f"{size} prompts" for size in SIZES) + " |",
        "|" + "---|" * (len(SIZES) + 1),
    ]
    for name in SKEWED:
        shares = [f"{100 * miss_rate(name, size, arguments.trials):.1f} %" for size in SIZES]
        lines.append(f"| {name} | " + " | ".join(shares) + " |")
        print(lines[-1], flush=True)
    print(f"{time.monotonic() - began:.0f} s; " + ("; ".join(misses) if misses else "all targets met"))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
