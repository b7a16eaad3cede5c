"""GRPO side by side with trl 1.16's GRPOTrainer: samples per second, where the time goes, and peak memory.

    python benchmarks/grpo.py --model FOLDER [--engine vllm] [--rounds 3]

Both run the same job in separate processes, in turn: the same model, prompts, group size, new tokens, LoRA rank and
targets, sequences per microbatch, one update per step, the same reward function (VADER), learning rate, loss (mean over each
completion's tokens, rewards standardised in the group, no divergence), threads, and gradient checkpointing on neither side
(`--gradient-checkpointing`: on both). trl samples with transformers' `generate`, all completions of a step at once, with
bfloat16 weights, which on a CPU were its fastest setting in PPO; --trl-dtype tries the others. lmrl keeps a frozen
bfloat16 base with float32 adapters. A rollout's time includes the reward's.

What differs: each side draws prompts in its own order (a step takes the whole file if it has no more prompts) and with its
own random numbers, so lengths only agree on average, and the table shows their mean. lmrl's updates compute the prompt that
a group's samples share once. With `--engine vllm`, lmrl also corrects for the sampler; vLLM's memory is counted, and
weight syncs are part of the rollout.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from _peers import (
    ONLINE,
    add_engine_arguments,
    add_peer_arguments,
    assignments,
    cut_prompts,
    engine_overrides,
    in_turn,
    leave,
    online_report,
    print_ratios,
    print_table,
    seconds,
    this_script,
    train_lines,
    write_json,
)

HERE = Path(__file__).resolve().parent
LEARNING_RATE = 1e-4
PEERS = ("lmrl hf", "lmrl vllm", "trl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal LM, for instance SmolLM2-135M-Instruct")
    parser.add_argument("--prompts", default=str(HERE.parent / "recipes" / "sentiment" / "prompts.jsonl"))
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--groups", type=int, default=8, help="prompts per step")
    parser.add_argument("--samples", type=int, default=8, help="completions per prompt")
    parser.add_argument("--microbatch", type=int, default=16, help="maximum sequences per microbatch")
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="steps, of which the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--trl-dtype", default="bfloat16", choices=("bfloat16", "float32", "autocast"))
    parser.add_argument("--json", type=Path)
    add_engine_arguments(parser)
    add_peer_arguments(parser, PEERS)
    args = parser.parse_args()
    if args.groups * args.samples % args.microbatch:
        parser.error("--microbatch: trl takes only a divisor of --groups x --samples")
    if args.peer:
        (run_trl if args.peer == "trl" else run_lmrl)(args)
        return

    with tempfile.TemporaryDirectory() as scratch:
        prompts = cut_prompts(args.model, args.prompts, args.prompt_tokens, Path(scratch) / "prompts.jsonl")

        def run(peer: str, number: int) -> dict:
            output = Path(scratch) / f"{peer.replace(' ', '-')}-{number}"
            return this_script(peer, output, args.threads, "--prompts", str(prompts))

        results = in_turn((f"lmrl {args.engine}", "trl"), args.rounds, run)
    print_table(results, ONLINE | {"tokens each": ("mean_tokens", ".1f")})
    ratios = print_ratios(results, {"speed": "samples_per_second", "memory": "peak_mb"})
    write_json(args.json, {"results": results, "ratios": ratios})


def run_lmrl(args: argparse.Namespace) -> None:
    import lmrl

    overrides = {
        "model.path": args.model,
        "model.lora.r": args.lora_r,
        "task.prompts.path": args.prompts,
        "task.prompts.max_tokens": 2 * args.prompt_tokens,
        "task.prompts.holdout": 0,
        "task.rewards": "[{function: lmrl.reward_models.sentiment.sentiment}]",
        "rollouts.prompts": args.groups,
        "rollouts.samples": args.samples,
        "rollouts.max_new_tokens": args.new_tokens,
        "rollouts.stop": "[]",
        "optimizer.lr": LEARNING_RATE,
        "optimizer.warmup_steps": 0,
        "training.steps": args.steps,
        "training.checkpoint_every": 0,
        "training.threads": args.threads,
        "training.microbatch_tokens": args.microbatch * (args.prompt_tokens + args.new_tokens),
        "training.gradient_checkpointing": str(args.gradient_checkpointing).lower(),
        "evaluation.suite": "null",
        **engine_overrides(args),
    }
    lmrl.train("arithmetic/grpo", assignments(overrides), output=args.output)
    lines = train_lines(args.output)
    report(
        args,
        list(map(seconds, lines)),
        [line["time"]["source_s"] for line in lines],
        [line["length"] for line in lines],
        lines[-1]["time"]["peak_memory_mb"],
    )


def run_trl(args: argparse.Namespace) -> None:
    import resource
    import time

    import torch
    from datasets import load_dataset
    from lmrl.reward_models.sentiment import sentiment
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(args.threads)
    steps, rollouts, lengths = [], [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            steps.append(time.monotonic())

        def on_step_end(self, *_, **__):
            steps[-1] = time.monotonic() - steps[-1]

    class Trainer(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            started = time.monotonic()
            found = super()._generate_and_score_completions(inputs)
            rollouts.append(time.monotonic() - started)
            lengths.append(float(found["completion_mask"].sum(1).float().mean()))
            return found

    config = GRPOConfig(
        str(args.output), per_device_train_batch_size=args.microbatch,
        gradient_accumulation_steps=args.groups * args.samples // args.microbatch, max_steps=args.steps,
        num_generations=args.samples, max_completion_length=args.new_tokens, temperature=1.0, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", loss_type="grpo", beta=0.0, bf16=args.trl_dtype == "autocast", use_vllm=False,
        gradient_checkpointing=args.gradient_checkpointing, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False,
        model_init_kwargs={"dtype": "bfloat16" if args.trl_dtype == "bfloat16" else "float32"},
    )  # fmt: skip
    trainer = Trainer(
        args.model, reward_funcs=sentiment, args=config,
        processing_class=AutoTokenizer.from_pretrained(args.model, padding_side="left"),
        train_dataset=load_dataset("json", data_files=args.prompts, split="train"), callbacks=[Clock()],
        peft_config=LoraConfig(r=args.lora_r, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    report(args, steps, rollouts, lengths, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def report(
    args: argparse.Namespace, steps: list[float], rollouts: list[float], lengths: list[float], peak_mb: float
) -> None:
    if not len(steps) == len(rollouts) == len(lengths) == args.steps:
        raise SystemExit(f"{args.peer}: {len(rollouts)} rollouts in {len(steps)} of {args.steps} steps")
    found = online_report(args.groups * args.samples, steps[1:], rollouts[1:], peak_mb)
    leave(args.output, found | {"mean_tokens": round(statistics.mean(lengths[1:]), 2)})


if __name__ == "__main__":
    main()
