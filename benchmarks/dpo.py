"""DPO side by side with trl's DPOTrainer: pairs per second and peak memory.

    python benchmarks/dpo.py --model FOLDER --pairs PAIRS.jsonl [--rounds 3]

Both run the same job in separate processes, in turn: the same pairs in the same order and tokens, pairs per batch and
microbatch, LoRA rank and targets, learning rate, threads, bfloat16 arithmetic and gradient checkpointing. trl runs at its defaults (float32
weights under bfloat16 autocast, checkpointing on); lmrl keeps the frozen weights in bfloat16. `--no-checkpointing`
switches it off on both sides.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from _peers import (
    add_peer_arguments,
    assignments,
    in_turn,
    leave,
    print_ratios,
    print_table,
    seconds,
    this_script,
    train_lines,
    write_json,
)

PEERS = ("lmrl", "trl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal LM, for instance SmolLM2-135M-Instruct")
    parser.add_argument("--pairs", required=True, help="JSONL with chosen and rejected texts, as Anthropic's HH-RLHF")
    parser.add_argument("--batch", type=int, default=4, help="pairs per step, and the maximum per microbatch")
    parser.add_argument("--steps", type=int, default=8, help="steps, of which the first two are not counted")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--json", type=Path)
    add_peer_arguments(parser, PEERS)
    args = parser.parse_args()
    if args.peer:
        (run_lmrl if args.peer == "lmrl" else run_trl)(args)
        return

    with tempfile.TemporaryDirectory() as scratch:
        pairs = same_pairs(args, Path(scratch) / "pairs.jsonl")

        def run(peer: str, number: int) -> dict:
            return this_script(peer, Path(scratch) / f"{peer}-{number}", args.threads, "--pairs", str(pairs))

        results = in_turn(PEERS, args.rounds, run)
    print_table(results, {"pairs/s": ("pairs_per_second", ".3f"), "peak MB": ("peak_mb", ".0f")})
    ratios = print_ratios(results, {"speed": "pairs_per_second", "memory": "peak_mb"})
    write_json(args.json, {"results": results, "ratios": ratios})


def same_pairs(args: argparse.Namespace, path: Path) -> Path:
    """The first pairs that fit, with the prompt separated, so that both sides split the text in the same place."""
    from transformers import AutoTokenizer

    from lmrl.trajectories.rows import parse

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = []
    with open(args.pairs) as lines:
        for line in lines:
            chosen, rejected = parse(json.loads(line))
            prompt, texts = chosen.prompt, (chosen.turns[0].action, rejected.turns[0].action)
            if max(len(tokenizer(prompt + text).input_ids) for text in texts) < args.max_tokens:
                rows.append({"prompt": prompt, "chosen": texts[0], "rejected": texts[1]})
            if len(rows) == args.batch * args.steps:
                break
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_lmrl(args: argparse.Namespace) -> None:
    import lmrl

    overrides = {
        "model.path": args.model,
        "model.lora.r": args.lora_r,
        "source.path": args.pairs,
        "source.batch_size": args.batch,
        "source.max_tokens": "null",
        "task.prompts.holdout": 0,
        "training.steps": args.steps,
        "training.checkpoint_every": 0,
        "training.threads": args.threads,
        "training.microbatch_tokens": args.batch * args.max_tokens,
        "training.gradient_checkpointing": str(not args.no_checkpointing).lower(),
        "evaluation.every": 0,
    }
    run = args.output
    lmrl.train("dialogues/dpo", assignments(overrides), output=run)
    lines = train_lines(run)
    report(args, list(map(seconds, lines)), lines[-1]["time"]["peak_memory_mb"])


def run_trl(args: argparse.Namespace) -> None:
    import resource
    import time

    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(args.threads)
    marks = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            marks.append(time.monotonic())

        def on_step_end(self, *_, **__):
            marks[-1] = time.monotonic() - marks[-1]

    config = DPOConfig(
        str(args.output), per_device_train_batch_size=args.batch, max_steps=args.steps, learning_rate=1e-4, max_length=None,
        report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
        **({"gradient_checkpointing": False} if args.no_checkpointing else {}),
    )  # fmt: skip
    trainer = DPOTrainer(
        args.model, args=config, processing_class=AutoTokenizer.from_pretrained(args.model),
        train_dataset=load_dataset("json", data_files=args.pairs, split="train"), callbacks=[Clock()],
        peft_config=LoraConfig(r=args.lora_r, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    report(args, marks, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def report(args: argparse.Namespace, steps: list[float], peak_mb: float) -> None:
    counted = steps[2:]
    found = {
        "pairs_per_second": args.batch * len(counted) / sum(counted),
        "step_seconds": [round(second, 2) for second in counted],
        "peak_mb": peak_mb,
    }
    leave(args.output, found)


if __name__ == "__main__":
    main()
