"""Draw the learning curve of a run on random walks from its metrics.jsonl, as in the README.

python benchmarks/learning_curve.py runs/ppo docs/images/learning_curve.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

INK, PPO, BC = "#37474f", "#4527a0", "#00897b"


def read(run: Path) -> tuple[list[dict], dict[str, dict]]:
    """A run's metrics lines, and its final table by row."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return lines, json.loads((run / "results.json").read_text())


def curve(lines: list[dict], stage: str, metric: str) -> tuple[list[int], list[float]]:
    """Steps of a stage, and the metric at each."""
    found = [line for line in lines if line["stage"] == stage and line["kind"] == "train"]
    return [line["step"] for line in found], [line[metric] for line in found]


def evaluations(lines: list[dict], stage: str, metric: str) -> list[tuple[int, float, float, float]]:
    """Step, mean, and the ends of the 95 % interval of each evaluation of a stage."""
    found = [line for line in lines if line["stage"] == stage and line["kind"] == "eval"]
    return [(line["step"], line[metric]["mean"], *line[metric]["ci95"]) for line in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run of random_walks/ppo")
    parser.add_argument("svg", type=Path, help="file to write")
    arguments = parser.parse_args()
    draw(*read(arguments.run), arguments.svg)


def draw(lines: list[dict], results: dict[str, dict], target: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "lmrl", "font.size": 10, "axes.edgecolor": INK, "text.color": INK}
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    length = curve(lines, "warmup", "reward")[0][-1]
    steps, rewards = curve(lines, "main", "reward")
    axes.plot([step + length for step in steps], rewards, color=PPO, lw=1.2, label="PPO, episodes of the step")
    for stage, offset, color, name in (("warmup", 0, BC, "BC"), ("main", length, PPO, "PPO")):
        points = evaluations(lines, stage, "optimality")
        x = [offset + step for step, *_ in points]
        means = [mean for _, mean, _, _ in points]
        bars = [[mean - low for _, mean, low, _ in points], [high - mean for _, mean, _, high in points]]
        axes.errorbar(x, means, bars, fmt="o-", ms=4, lw=1, color=color, capsize=3, label=f"{name}, evaluation (95 %)")
    axes.axhline(results["data"]["optimality"]["mean"], color=INK, ls=":", lw=1, label="data (random walks)")
    axes.axhline(results["optimum"]["optimality"]["mean"], color=INK, ls="--", lw=1, label="optimum")
    axes.axvline(length, color="#b0bec5", lw=1)
    axes.set(xlabel="step (imitation, then PPO)", ylabel="optimality", ylim=(-0.03, 1.06), xlim=(0, length + steps[-1]))
    axes.legend(fontsize=8, loc="center left", frameon=False, bbox_to_anchor=(0.03, 0.66))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
