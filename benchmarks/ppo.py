"""PPO side by side with trl 1.12.0, the last release that has it: samples per second and peak memory.

    python benchmarks/ppo.py --model FOLDER --trl-python OTHER_ENV/bin/python [--prompts FILE] [--rounds 3]

Both run the same job in a process of their own, in turn (lmrl, trl, lmrl, trl, ...): the same model, prompts, prompt and
completion lengths, batch, microbatch, LoRA rank and targets, epochs, reward and threads. trl runs with bfloat16 weights, its fastest
setting on a CPU, unless --trl-dtype says otherwise; `ppo_trl.py` lists what its environment needs. lmrl's policy keeps
a frozen bfloat16 base with float32 adapters and a value head on the same trunk; trl trains a second whole network as
its value function, and measures the divergence from the reference, as does lmrl here.
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

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal LM, for instance SmolLM2-135M-Instruct")
    parser.add_argument("--trl-python", required=True, help="interpreter of an environment with trl 1.12.0")
    parser.add_argument("--prompts", default=str(HERE.parent / "recipes" / "sentiment" / "prompts.jsonl"))
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--microbatch", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of which the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trl-dtype", default="bfloat16", choices=("bfloat16", "float32", "autocast"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    results: dict[str, list[dict]] = {"lmrl": [], "trl": []}
    with tempfile.TemporaryDirectory() as scratch:
        prompts = same_prompts(args, Path(scratch) / "prompts.jsonl")
        for number in range(args.rounds):
            for peer, run in (("lmrl", run_lmrl), ("trl", run_trl)):
                results[peer].append(run(args, prompts, Path(scratch) / f"{peer}-{number}"))
                print(peer, json.dumps(results[peer][-1]), flush=True)
    rows = {peer: summarize(runs) for peer, runs in results.items()}
    print(f"\n{'':6} {'samples/s':>10} {'step s':>8} {'peak MB':>8}   (median of {args.rounds} rounds)")
    for peer, row in rows.items():
        print(f"{peer:6} {row['samples_per_second']:10.2f} {row['step_seconds']:8.2f} {row['peak_mb']:8.0f}")
    speed = [
        a["samples_per_second"] / b["samples_per_second"] for a, b in zip(results["lmrl"], results["trl"], strict=True)
    ]
    memory = [a["peak_mb"] / b["peak_mb"] for a, b in zip(results["lmrl"], results["trl"], strict=True)]
    for name, ratios in (("speed", speed), ("memory", memory)):
        print(f"{name}: lmrl / trl = {statistics.median(ratios):.2f} (rounds {min(ratios):.2f} to {max(ratios):.2f})")
    if args.json:
        args.json.write_text(json.dumps({"results": results, "speed": speed, "memory": memory}, indent=2) + "\n")


def same_prompts(args: argparse.Namespace, path: Path) -> Path:
    """Prompts of at most `--prompt-tokens` tokens, cut once for both."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with open(args.prompts) as lines, open(path, "w") as out:
        for line in lines:
            ids = tokenizer(json.loads(line)["prompt"]).input_ids[: args.prompt_tokens]
            out.write(json.dumps({"prompt": tokenizer.decode(ids)}) + "\n")
    return path


def run_lmrl(args: argparse.Namespace, prompts: Path, output: Path) -> dict:
    overrides = {
        "model.path": args.model,
        "model.lora.r": args.lora_r,
        "task.prompts.path": prompts,
        "rollouts.prompts": args.batch,
        "rollouts.max_new_tokens": args.new_tokens,
        "objective.epochs": args.epochs,
        "objective.value_warmup_steps": 0,
        "training.steps": args.steps,
        "training.checkpoint_every": 0,
        "training.threads": args.threads,
        "training.microbatch_tokens": args.microbatch * (args.prompt_tokens + args.new_tokens),
        "evaluation.suite": "null",
    }
    command = [sys.executable, "-m", "lmrl", "train", "sentiment/ppo", "--output", str(output)]
    execute([*command, *(f"{key}={value}" for key, value in overrides.items())], args)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    times = [line["time"] for line in lines if line["kind"] == "train"]
    steps = [time["source_s"] + time["update_s"] for time in times[1:]]
    return {
        "step_seconds": [round(step, 2) for step in steps],
        "rollout_seconds": [round(time["source_s"], 2) for time in times[1:]],
        "samples_per_second": args.batch / statistics.median(steps),
        "peak_mb": times[-1]["peak_memory_mb"],
    }


def run_trl(args: argparse.Namespace, prompts: Path, output: Path) -> dict:
    output.mkdir()
    names = ("prompt_tokens", "new_tokens", "batch", "microbatch", "epochs", "lora_r", "threads", "steps")
    command = [args.trl_python, str(HERE / "ppo_trl.py"), "--model", args.model, "--prompts", str(prompts)]
    command += [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    execute([*command, "--dtype", args.trl_dtype, "--json", str(output / "report.json")], args)
    report = json.loads((output / "report.json").read_text())
    return {
        "step_seconds": report["step_seconds"],
        "rollout_seconds": report["rollout_seconds"],
        "samples_per_second": args.batch / statistics.median(report["step_seconds"]),
        "peak_mb": report["peak_rss_mb"],
    }


def execute(command: list[str], args: argparse.Namespace) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")


def summarize(runs: list[dict]) -> dict[str, float]:
    return {
        "samples_per_second": statistics.median(run["samples_per_second"] for run in runs),
        "step_seconds": statistics.median(second for run in runs for second in run["step_seconds"]),
        "peak_mb": statistics.median(run["peak_mb"] for run in runs),
    }


if __name__ == "__main__":
    main()
