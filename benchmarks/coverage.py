"""How often the 95 % intervals of `lmrl.evaluation.statistics.summarize` contain the true mean, and how wide they are.

    python benchmarks/coverage.py [--trials 4000] [--output FILE]

Simulated evaluations of 20 prompts x 32 samples, 50 x 8 and 64 x 1, whose intra-cluster correlation (ICC) is 0 to
0.8: normal values, 0/1 values (beta-binomial), exponential ones, 0/1 values of fixed prompts, and of prompts
of which 5 % always succeed and the others hardly ever. Prints a Markdown table: coverage, the share of trials
whose interval lies below or above the true mean, and mean width over that of an oracle, mean +- 1.96 true standard
errors. `events` is n p (1 - p) over the design effect 1 + (m - 1) ICC: about the effective number of the rarer outcome.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmrl.evaluation.statistics import UNLIMITED, summarize
from lmrl.seeding import stream

OFTEN, RARELY = (0.05, 1.0), 0.002
"""For two kinds of prompts: the share of one kind and its success rate, and the rate of the other."""
DESIGNS = ((20, 32), (50, 8), (64, 1))
CORRELATIONS = (0.0, 0.2, 0.5, 0.8)
RATES = (0.01, 0.05, 0.2, 0.5, 0.8, 0.99)
TARGET = 0.93, 0.97, 1.15
"""Minimum coverage; maximum coverage if there are enough events; maximum width relative to the oracle's."""
EVENTS = 7.0
"""With fewer events, values cannot distinguish the rate from one several times as far from 0 or 1. The oracle knows the rate."""


@dataclass(frozen=True)
class Setting:
    """G clusters of m values. kind: `normal`, `exponential`, `0/1`, `0/1, same prompts`, or `0/1, two kinds`."""

    kind: str
    clusters: int
    samples: int
    correlation: float
    rate: float = 0.5

    @property
    def fixed(self) -> bool:
        return self.kind.endswith("same prompts")

    @property
    def binary(self) -> bool:
        return self.kind.startswith("0/1")

    @property
    def design_effect(self) -> float:
        return 1.0 if self.fixed else 1 + (self.samples - 1) * self.correlation

    @property
    def events(self) -> float:
        """Effective number of the rarer outcome."""
        return self.clusters * self.samples * self.rate * (1 - self.rate) / self.design_effect


def settings() -> Iterator[Setting]:
    for clusters, samples in DESIGNS:
        correlations = CORRELATIONS if samples > 1 else (0.0,)
        for kind in ("normal", "exponential"):
            for correlation in correlations:
                yield Setting(kind, clusters, samples, correlation)
        for correlation in correlations:
            for rate in RATES:
                yield Setting("0/1", clusters, samples, correlation, rate)
        if samples > 1:
            for rate in RATES:
                yield Setting("0/1, same prompts", clusters, samples, 0.5, rate)
            yield two_kinds(clusters, samples)


def two_kinds(clusters: int, samples: int) -> Setting:
    (share, high), low = OFTEN, RARELY
    rate = share * high + (1 - share) * low
    correlation = share * (1 - share) * (high - low) ** 2 / (rate * (1 - rate))
    return Setting("0/1, two kinds", clusters, samples, correlation, rate)


def draw(setting: Setting, rng: np.random.Generator) -> tuple[np.ndarray, float, float]:
    """Values of a trial (clusters x samples), the true mean, and the true standard error of their mean."""
    shape, correlation = (setting.clusters, setting.samples), setting.correlation
    total = setting.clusters * setting.samples
    if not setting.binary:
        noise = rng.standard_normal if setting.kind == "normal" else (lambda size: rng.standard_exponential(size) - 1)
        values = math.sqrt(correlation) * noise((shape[0], 1)) + math.sqrt(1 - correlation) * noise(shape)
        return values, 0.0, math.sqrt(setting.design_effect / total)
    rates = np.full((shape[0], 1), setting.rate)
    if setting.kind.endswith("two kinds"):
        rates = np.where(rng.random((shape[0], 1)) < OFTEN[0], OFTEN[1], RARELY)
    elif correlation:
        scale = (1 - correlation) / correlation
        rates = rng.beta(setting.rate * scale, (1 - setting.rate) * scale, (shape[0], 1))
    values = (rng.random(shape) < rates).astype(float)
    if setting.fixed:
        return values, float(rates.mean()), math.sqrt(float((rates * (1 - rates)).sum()) * setting.samples) / total
    return values, setting.rate, math.sqrt(setting.rate * (1 - setting.rate) * setting.design_effect / total)


@dataclass(frozen=True)
class Measured:
    coverage: float
    below: float
    """Share of intervals that lie entirely below the true mean."""
    above: float
    width: float
    """Mean width over the oracle's."""


def measure(setting: Setting, trials: int) -> Measured:
    rng = stream("coverage", str(setting))
    rows = np.repeat(np.arange(setting.clusters), setting.samples).tolist()
    limits = None if setting.binary else UNLIMITED
    found = np.empty((trials, 4))
    for trial in range(trials):
        values, mean, error = draw(setting, rng)
        found[trial] = *summarize(values.ravel(), rows, limits, setting.fixed)["ci95"], mean, error
    low, high, mean, error = found.T
    below, above = float((high < mean).mean()), float((low > mean).mean())
    return Measured(1 - below - above, below, above, float((high - low).mean() / (2 * 1.96 * error.mean())))


def misses(setting: Setting, found: Measured) -> list[str]:
    """The targets that a setting misses, and whether for lack of events."""
    lowest, highest, widest = TARGET
    missed = [f"coverage below {lowest}"] if found.coverage < lowest else []
    if found.coverage > highest:
        missed.append(f"coverage above {highest}")
    if found.width > widest:
        missed.append(f"width above {widest}")
    if missed and setting.binary and setting.events < EVENTS:
        missed.append("few events")
    return missed


def table(rows: list[tuple[Setting, Measured]]) -> str:
    lines = [
        "| values | prompts x samples | ICC | p | events | coverage | below | above | width / oracle | misses |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one, found in rows:
        rate, events = (f"{one.rate:.3g}", f"{one.events:.1f}") if one.binary else ("", "")
        lines.append(
            f"| {one.kind} | {one.clusters} x {one.samples} | {one.correlation:.3g} | {rate} | {events} | "
            f"{found.coverage:.3f} | {found.below:.3f} | {found.above:.3f} | {found.width:.2f} | "
            f"{', '.join(misses(one, found))} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4000)
    parser.add_argument("--output", type=Path, help="Also write the table to this file")
    options = parser.parse_args()
    begun = time.perf_counter()
    text = table([(setting, measure(setting, options.trials)) for setting in settings()])
    print(text, end="")
    print(f"{options.trials} trials a row, {time.perf_counter() - begun:.0f} s")
    if options.output is not None:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
