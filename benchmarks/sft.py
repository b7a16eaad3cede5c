"""Supervised fine-tuning side by side with trl's SFTTrainer: tokens that carry loss per second, and peak memory.

    python benchmarks/sft.py --model FOLDER --data ROWS.jsonl [--rounds 3]

Each side runs in a separate process, in turn: the same rows of prompt and completion in the same tokens, loss on completions only,
LoRA rank and targets, learning rate, threads, bfloat16 arithmetic. trl runs in several settings (padded batches; batches of
similar length; packed by its best-fit-decreasing strategy), without gradient checkpointing, and the fastest of
them is compared; `--checkpointing` switches it on for both sides. lmrl keeps the frozen weights in bfloat16, and puts at
most as many tokens through the model at once as trl packed does. ROWS may be in any format that lmrl reads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from _peers import (
    add_peer_arguments,
    assignments,
    in_turn,
    leave,
    median,
    print_table,
    seconds,
    this_script,
    train_lines,
    write_json,
)

SETTINGS = {
    "trl padded": {},
    "trl grouped": {"train_sampling_strategy": "group_by_length"},
    "trl packed": {"packing": True, "packing_strategy": "bfd"},
}
PEERS = ("lmrl", *SETTINGS)
WARM_UP = 2
"""Number of first steps that are not counted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal LM, for instance SmolLM2-135M-Instruct")
    parser.add_argument(
        "--data",
        required=True,
        help="rows of prompt and completion, or preferences, of which the chosen completion is used",
    )
    parser.add_argument("--batch", type=int, default=8, help="rows per step (trl packed: what fills as many tokens)")
    parser.add_argument("--steps", type=int, default=8, help=f"steps, of which the first {WARM_UP} are not counted")
    parser.add_argument(
        "--max-tokens", type=int, default=512, help="maximum tokens of a row, and of a block of trl packed"
    )
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--json", type=Path)
    add_peer_arguments(parser, PEERS)
    args = parser.parse_args()
    if args.peer:
        (run_lmrl if args.peer == "lmrl" else run_trl)(args)
        return

    with tempfile.TemporaryDirectory() as scratch:
        rows, tokens = same_rows(args, Path(scratch) / "rows.jsonl")

        def run(peer: str, number: int) -> dict:
            folder = Path(scratch) / f"{peer.replace(' ', '-')}-{number}"
            return this_script(peer, folder, args.threads, "--data", str(rows))

        results = in_turn(PEERS, args.rounds, run)
    print(f"\n{tokens:.0f} tokens per row")
    print_table(results, {"tokens/s": ("tokens_per_second", ".1f"), "peak MB": ("peak_mb", ".0f")})
    fastest = max(SETTINGS, key=lambda peer: median(results[peer], "tokens_per_second"))
    ratios = {
        name: [a[key] / b[key] for a, b in zip(results["lmrl"], results[fastest], strict=True)]
        for name, key in (("speed", "tokens_per_second"), ("memory", "peak_mb"))
    }
    for name, each in ratios.items():
        print(f"{name}: lmrl / {fastest} = {statistics.median(each):.2f} (rounds {min(each):.2f} to {max(each):.2f})")
    write_json(args.json, {"results": results, "fastest": fastest, "ratios": ratios})


def same_rows(args: argparse.Namespace, path: Path) -> tuple[Path, float]:
    """The first rows that fit, as text of prompt and completion, and their mean length in tokens."""
    from transformers import AutoTokenizer

    from lmrl.trajectories.files import open_rows
    from lmrl.trajectories.rows import parse

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows, lengths = [], []
    for row in open_rows(args.data):
        episode = parse(row)[0]
        prompt, completion = episode.prompt, episode.turns[0].action
        length = len(tokenizer(prompt).input_ids) + len(tokenizer(completion).input_ids) + 1
        if length <= args.max_tokens:
            rows.append({"prompt": prompt, "completion": completion})
            lengths.append(length)
        if len(rows) == args.batch * args.steps * 3:  # packed blocks take more rows
            break
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, statistics.mean(lengths)


def run_lmrl(args: argparse.Namespace) -> None:
    import lmrl

    overrides = {
        "model.path": args.model,
        "model.dtype": "bfloat16",
        "model.lora.r": args.lora_r,
        "source.path": args.data,
        "source.batch_size": args.batch,
        "task.prompts.holdout": 0,
        "task.prompts.max_tokens": args.max_tokens,
        "optimizer.lr": 1e-4,
        "training.steps": args.steps,
        "training.checkpoint_every": 0,
        "training.threads": args.threads,
        "training.precision": "bfloat16",
        "training.microbatch_tokens": packed_blocks(args) * args.max_tokens,
        "training.gradient_checkpointing": str(args.checkpointing).lower(),
    }
    lmrl.train("sft", assignments(overrides), output=args.output)
    lines = train_lines(args.output)
    report(
        args,
        [line["length"] * args.batch for line in lines],
        list(map(seconds, lines)),
        lines[-1]["time"]["peak_memory_mb"],
    )


def run_trl(args: argparse.Namespace) -> None:
    import resource
    import time

    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(args.threads)
    marks: list[float] = []
    counted: list[int] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            marks.append(time.monotonic())

        def on_step_end(self, *_, **__):
            marks[-1] = time.monotonic() - marks[-1]

    class Counting(SFTTrainer):
        def compute_loss(self, model, inputs, *more, **named):
            counted.append(int((inputs["labels"][:, 1:] != -100).sum()))
            return super().compute_loss(model, inputs, *more, **named)

    settings = SETTINGS[args.peer]
    batch = packed_blocks(args) if settings.get("packing") else args.batch
    config = SFTConfig(
        str(args.output), per_device_train_batch_size=batch, max_steps=args.steps, learning_rate=1e-4,
        max_length=args.max_tokens, bf16=True, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=args.checkpointing, completion_only_loss=True, **settings,
    )  # fmt: skip
    trainer = Counting(
        args.model, args=config, processing_class=AutoTokenizer.from_pretrained(args.model),
        train_dataset=load_dataset("json", data_files=args.data, split="train"), callbacks=[Clock()],
        peft_config=LoraConfig(r=args.lora_r, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    report(args, counted, marks, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def packed_blocks(args: argparse.Namespace) -> int:
    """The blocks of trl packed that hold as many tokens as the rows of a step."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = [json.loads(line) for line in Path(args.data).read_text().splitlines()]
    mean = statistics.mean(len(tokenizer(row["prompt"] + row["completion"]).input_ids) + 1 for row in rows)
    return max(args.batch * int(mean) // args.max_tokens, 1)


def report(args: argparse.Namespace, tokens: list[float], steps: list[float], peak_mb: float) -> None:
    """tokens: the number per step that carry loss."""
    found = {
        "tokens_per_second": sum(tokens[WARM_UP:]) / sum(steps[WARM_UP:]),
        "tokens_a_step": round(statistics.mean(tokens[WARM_UP:])),
        "step_seconds": [round(second, 2) for second in steps[WARM_UP:]],
        "peak_mb": peak_mb,
    }
    leave(args.output, found)


if __name__ == "__main__":
    main()
