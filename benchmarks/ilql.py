"""What ILQL costs beside plain likelihood training of the same model on the same data: time and peak memory.

    python benchmarks/ilql.py --model FOLDER --pairs PAIRS.jsonl [--rounds 2]

Each setting trains with LoRA in a process of its own, in turn, on the same episodes in the same order: likelihood; ILQL
with tied Q heads on the shared trunk (twins, their Polyak targets, V, push-down, likelihood beside them); ILQL with MLP
heads, whose last layers have an entry for every token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SETTINGS = {
    "likelihood": ["objective={name: likelihood}"],
    "ILQL, tied": [],
    "ILQL, mlp": ["objective.q_head=mlp"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal LM, for instance SmolLM2-135M-Instruct")
    parser.add_argument("--pairs", required=True, help="logged episodes, for instance chosen and rejected dialogues")
    parser.add_argument("--batch", type=int, default=8, help="episodes a step")
    parser.add_argument("--steps", type=int, default=5, help="of which the first is not counted")
    parser.add_argument("--microbatch-tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    args = parser.parse_args()

    results: dict[str, list[tuple[float, float]]] = {name: [] for name in args.settings}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.rounds):
            for name in args.settings:
                results[name].append(run(args, name, Path(scratch) / f"{name}-{number}"))
                print(name, "seconds of updates {:.1f}, peak MB {:.0f}".format(*results[name][-1]), flush=True)
    base = results[args.settings[0]]
    print(f"\n{'':12} {'time':>6} {'peak MB':>8}   (time as a multiple of {args.settings[0]}'s, median of the rounds)")
    for name, runs in results.items():
        ratio = statistics.median(own[0] / other[0] for own, other in zip(runs, base, strict=True))
        print(f"{name:12} {ratio:6.2f} {statistics.median(own[1] for own in runs):8.0f}")


def run(args: argparse.Namespace, name: str, output: Path) -> tuple[float, float]:
    """Seconds of counted updates, and peak memory in MB."""
    overrides = {
        "model.path": args.model,
        "source.path": args.pairs,
        "source.batch_size": args.batch,
        "task.prompts.holdout": 0,
        "training.steps": args.steps,
        "training.threads": args.threads,
        "training.checkpoint_every": 0,
        "training.microbatch_tokens": args.microbatch_tokens,
        "evaluation.diagnostics_every": 0,
    }
    changes = [*SETTINGS[name], *(f"{key}={value}" for key, value in overrides.items())]
    done = subprocess.run(
        [sys.executable, "-m", "lmrl", "train", "dialogues/ilql", "--output", str(output), *changes],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(args.threads)},
    )
    if done.returncode:
        sys.exit(f"{name}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    times = [line["time"] for line in lines if line["kind"] == "train"]
    return sum(time["update_s"] for time in times[1:]), times[-1]["peak_memory_mb"]


if __name__ == "__main__":
    main()
