"""What ILQL costs compared with plain likelihood training of the same model on the same data: time and peak memory.

    python benchmarks/ilql.py --model FOLDER --pairs PAIRS.jsonl [--rounds 2]

Each setting trains with LoRA in a separate process, in turn, on the same episodes in the same order: likelihood; ILQL
with tied Q heads on the shared trunk (twins, their Polyak targets, V, push-down and the likelihood term); ILQL with MLP
heads, whose last layers have an output for every token.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from _peers import assignments, in_turn, lmrl_train, median

SETTINGS = {
    "likelihood": ["objective={name: likelihood}"],
    "ILQL, tied": [],
    "ILQL, mlp": ["objective.q_head=mlp"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal LM, for instance SmolLM2-135M-Instruct")
    parser.add_argument("--pairs", required=True, help="logged episodes, for instance chosen and rejected dialogues")
    parser.add_argument("--batch", type=int, default=8, help="episodes per step")
    parser.add_argument("--steps", type=int, default=5, help="steps, of which the first is not counted")
    parser.add_argument("--microbatch-tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        results = in_turn(
            args.settings, args.rounds, lambda name, number: run(args, name, Path(scratch) / f"{name}-{number}")
        )
    base = results[args.settings[0]]
    print(f"\n{'':12} {'time':>6} {'peak MB':>8}   (time as a multiple of {args.settings[0]}'s, median of the rounds)")
    for name, runs in results.items():
        ratio = statistics.median(own["seconds"] / other["seconds"] for own, other in zip(runs, base, strict=True))
        print(f"{name:12} {ratio:6.2f} {median(runs, 'peak_mb'):8.0f}")


def run(args: argparse.Namespace, name: str, output: Path) -> dict:
    """Seconds of counted updates, and peak memory."""
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
    lines = lmrl_train("dialogues/ilql", [*SETTINGS[name], *assignments(overrides)], output, args.threads)
    spent = sum(line["time"]["update_s"] for line in lines[1:])
    return {"seconds": round(spent, 3), "peak_mb": lines[-1]["time"]["peak_memory_mb"]}


if __name__ == "__main__":
    main()
