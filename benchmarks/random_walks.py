"""Does `random_walks/ppo` learn? Several graphs and seeds, one run each, and the intervals over runs.

    python benchmarks/random_walks.py --output FOLDER [--graphs 1000 1001 1002 1003 1004] [--seeds 0 1 2] [--jobs 2]

Each run uses one thread and takes about two minutes; `--jobs` of them go on at a time. Finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lmrl.evaluation.statistics import summarize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--graphs", type=int, nargs="+", default=[1000, 1001, 1002, 1003, 1004])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE for every run")
    args = parser.parse_args()

    def run(job: tuple[int, int]) -> dict:
        graph, seed = job
        folder = args.output / f"g{graph}-s{seed}"
        command = [sys.executable, "-m", "lmrl", "train", "random_walks/ppo", f"task.graph={graph}"]
        command += [f"training.seed={seed}", *args.overrides, "--output", str(folder), "--resume"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr}")
        rows = json.loads((folder / "results.json").read_text())
        means = {label: row["optimality"]["mean"] for label, row in rows.items()}
        print(
            f"graph {graph} seed {seed}: " + "  ".join(f"{label} {mean:.3f}" for label, mean in means.items()),
            flush=True,
        )
        return means

    jobs = [(graph, seed) for graph in args.graphs for seed in args.seeds]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(run, jobs))
    print(f"\noptimality over {len(jobs)} runs, mean [95 % interval], lowest run")
    for label in results[0]:
        values = [result[label] for result in results]
        summary = summarize(values)
        low, high = summary["ci95"]
        print(f"{label:8} {summary['mean']:.3f} [{low:.3f}, {high:.3f}]  {min(values):.3f}")


if __name__ == "__main__":
    main()
