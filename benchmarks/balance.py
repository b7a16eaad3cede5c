"""How long processes wait for the slowest in an update, with and without balancing sequences by cost.

    python benchmarks/balance.py [--texts FILE.jsonl[.gz] --prompt question --completion answer] [--ranks 2 4 8]

A simulation: no model runs. A step draws episodes, whose lengths are those of the texts (characters / 4), or log-normal
without --texts (prompts of 200 tokens, completions of a median of 400, cut at 4,096). Their cost is that of a pass of
Qwen2.5-1.5B, including attention's quadratic term. `before`: each rank takes a slice of the step and cuts it into minibatches by
number. `after`: as `lmrl.trajectories.balance` deals them. Both are sums over minibatches of the largest rank's cost, divided
by a lower bound that no balancing can beat: the mean over ranks, or the longest episode if that is more.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lmrl.policy.costs import PassCost
from lmrl.trajectories.balance import assign, loads_of, split

QWEN = PassCost(token=2 * 1.31e9, action=2 * 151936 * 1536, pair=2 * 28 * 1536)
Draw = Callable[[np.random.Generator, int], list[tuple[int, int]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--prompt", default="prompt", help="field of the texts (a dot selects a nested field)")
    parser.add_argument("--completion", default="completion")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--episodes", type=int, nargs="+", default=[128, 512], help="a step")
    parser.add_argument("--minibatches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()

    draw = log_normal if args.texts is None else of_texts(args.texts, args.prompt, args.completion)
    print(f"{'ranks':>6}{'episodes':>10}{'minibatches':>13}{'before':>9}{'after':>8}{'worst step':>12}{'moved':>8}")
    for ranks in args.ranks:
        for episodes in args.episodes:
            for minibatches in args.minibatches:
                rows = [step(draw, seed, ranks, episodes, minibatches) for seed in range(args.steps)]
                before, after, moved = np.mean(rows, axis=0)
                worst = max(row[1] for row in rows)
                print(f"{ranks:6}{episodes:10}{minibatches:13}{before:9.3f}{after:8.3f}{worst:12.3f}{moved:8.0%}")


def step(draw: Draw, seed: int, ranks: int, episodes: int, minibatches: int) -> tuple[float, float, float]:
    """Cost before and after, relative to the lower bound, and the share of episodes that move."""
    rng = np.random.default_rng(seed)
    costs = [
        QWEN.token * (prompt + completion) + QWEN.action * completion + QWEN.pair * float(prompt + completion) ** 2
        for prompt, completion in draw(rng, episodes)
    ]
    homes = [item * ranks // episodes for item in range(episodes)]
    apart = [
        np.array_split(rng.permutation(np.flatnonzero(np.equal(homes, rank))), minibatches) for rank in range(ranks)
    ]
    before = sum(max(sum(costs[item] for item in own[number]) for own in apart) for number in range(minibatches))
    after = bound = moved = 0.0
    for part in split(costs, minibatches, rng):
        own, at = [costs[item] for item in part], [homes[item] for item in part]
        chosen = assign(own, at, ranks)
        after += max(loads_of(own, chosen, ranks))
        bound += max(sum(own) / ranks, max(own))
        moved += float(np.sum(np.not_equal(chosen, at)))
    return before / bound, after / bound, moved / episodes


def log_normal(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    return [(200, min(int(length), 4096)) for length in rng.lognormal(6.0, 0.9, count)]


def of_texts(path: Path, prompt: str, completion: str) -> Draw:
    """Lengths in the file, a prompt's and a completion's, drawn at random."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    lengths = [tuple(max(len(text_of(row, name)) // 4, 1) for name in (prompt, completion)) for row in rows]
    return lambda rng, count: [lengths[at] for at in rng.integers(len(lengths), size=count)]


def text_of(row: Any, name: str) -> str:
    """A field's text; for messages, the text of all of them."""
    for key in name.split("."):
        row = row[key]
    return row if isinstance(row, str) else json.dumps(row)


if __name__ == "__main__":
    main()
