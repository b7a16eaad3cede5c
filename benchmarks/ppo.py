"""PPO side by side with trl 1.12.0, the last release that has it: samples per second and peak memory.

    python benchmarks/ppo.py --model FOLDER --trl-python OTHER_ENV/bin/python [--engine vllm] [--rounds 3]

Both run the same job in separate processes, in turn (lmrl, trl, lmrl, trl, ...): the same model, prompts, prompt and
completion lengths, batch, microbatch, LoRA rank and targets, epochs, reward and threads. trl runs with bfloat16 weights, its fastest
setting on a CPU, unless --trl-dtype says otherwise; `ppo_trl.py` lists what its environment needs. lmrl's policy keeps
a frozen bfloat16 base with float32 adapters and a value head on the same trunk; trl trains a second whole network as
its value function. Both measure the divergence from the reference. With `--engine vllm`, vLLM samples on lmrl's side; its
memory is counted, and weight syncs are part of the rollout.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from _peers import (
    ONLINE,
    add_engine_arguments,
    assignments,
    cut_prompts,
    engine_overrides,
    execute,
    in_turn,
    lmrl_train,
    online_report,
    print_ratios,
    print_table,
    seconds,
    write_json,
)

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
    parser.add_argument("--steps", type=int, default=4, help="steps, of which the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trl-dtype", default="bfloat16", choices=("bfloat16", "float32", "autocast"))
    parser.add_argument("--json", type=Path)
    add_engine_arguments(parser)
    args = parser.parse_args()

    peers = {f"lmrl {args.engine}": run_lmrl, "trl": run_trl}
    with tempfile.TemporaryDirectory() as scratch:
        prompts = cut_prompts(args.model, args.prompts, args.prompt_tokens, Path(scratch) / "prompts.jsonl")
        results = in_turn(
            peers, args.rounds, lambda peer, number: peers[peer](args, prompts, Path(scratch) / f"{peer}-{number}")
        )
    print_table(results, ONLINE)
    ratios = print_ratios(results, {"speed": "samples_per_second", "memory": "peak_mb"})
    write_json(args.json, {"results": results, "ratios": ratios})


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
        **engine_overrides(args),
    }
    lines = lmrl_train("sentiment/ppo", assignments(overrides), output, args.threads)
    counted = lines[1:]
    rollouts = [line["time"]["source_s"] for line in counted]
    return online_report(args.batch, list(map(seconds, counted)), rollouts, lines[-1]["time"]["peak_memory_mb"])


def run_trl(args: argparse.Namespace, prompts: Path, output: Path) -> dict:
    output.mkdir()
    names = ("prompt_tokens", "new_tokens", "batch", "microbatch", "epochs", "lora_r", "threads", "steps")
    command = [args.trl_python, str(HERE / "ppo_trl.py"), "--model", args.model, "--prompts", str(prompts)]
    command += [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    execute([*command, "--dtype", args.trl_dtype, "--json", str(output / "report.json")], args.threads)
    report = json.loads((output / "report.json").read_text())
    return online_report(args.batch, report["step_seconds"], report["rollout_seconds"], report["peak_rss_mb"])


if __name__ == "__main__":
    main()
