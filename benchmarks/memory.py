"""Predicted and measured peak memory of recipes on a CPU: how far `lmrl show` is off, and where.

    python benchmarks/memory.py [--only "PPO;DPO"] [--json FILE]

Each recipe runs two steps in a separate process, one after the other, on one thread, with random llama and qwen2 models of 16 to
135 million parameters (`smol` has the size of SmolLM2-135M), so that the memory of Python and torch does not dominate, and
two shipped recipes with tiny models. Rows are random letters, one token each. Measured is
the peak resident set size that the run records, predicted is the estimate of `lmrl show` for the same recipe. A ratio of 1.2 or
0.83 means that the prediction is off by 20 %.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import string
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LLAMA = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}
LLAMA |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 16384}
QWEN = {"model_type": "qwen2", "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8}
QWEN |= {"num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 32768, "tie_word_embeddings": True}
WIDE = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
WIDE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 49152, "tie_word_embeddings": True}
SMOL = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SMOL |= {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
MODELS = {"llama": LLAMA, "qwen2": QWEN, "wide": WIDE, "smol": SMOL}
COMMON = ["training.steps=2", "training.checkpoint_every=0", "training.threads=1", "evaluation.suite=null"]
FULL = ["model.lora=null"]
PLAYED = ["prompts=PROMPTS", "rewards=REWARD:length"]
LONG_ROWS = ["grpo", "prompts=WIDEPROMPTS", "rewards=REWARD:length", *FULL]  # 500 tokens, and 200 new ones
LONG_ROWS += ["rollouts={prompts: 2, samples: 2, max_new_tokens: 200}", "training.microbatch_tokens=1024"]

RECIPES: dict[str, tuple[str | None, list[str]]] = {
    "imitation, all weights": (
        "llama",
        ["sft", "data.path=ROWS", *FULL, "source.batch_size=8", "training.microbatch_tokens=512"],
    ),
    "imitation, LoRA, bfloat16 weights": (
        "qwen2",
        ["sft", "data.path=ROWS", "source.batch_size=4", "model.dtype=bfloat16", "training.microbatch_tokens=256"],
    ),
    "imitation, LoRA": ("llama", ["sft", "data.path=ROWS", "source.batch_size=8", "training.microbatch_tokens=1024"]),
    "imitation, rows of 1,024 tokens": (
        "qwen2",
        ["sft", "data.path=LONG", *FULL, "source.batch_size=2", "training.microbatch_tokens=1024"],
    ),
    "the same, checkpointing": (
        "qwen2",
        [
            *("sft", "data.path=LONG", *FULL, "source.batch_size=2", "training.microbatch_tokens=1024"),
            "training.gradient_checkpointing=true",
        ],
    ),
    "DPO, all weights, with its reference": (
        "llama",
        ["dpo", "data.path=PAIRS", *FULL, "source.batch_size=4", "training.microbatch_tokens=512"],
    ),
    "PPO, all weights, value head": (
        "llama",
        [
            *("ppo", *PLAYED, *FULL, "rollouts={prompts: 16, max_new_tokens: 32}", "training.microbatch_tokens=512"),
            "objective.value_warmup_steps=0",
        ],
    ),
    "GRPO, LoRA, engine hf": (
        "qwen2",
        ["grpo", *PLAYED, "rollouts={prompts: 4, samples: 8, max_new_tokens: 32}", "training.microbatch_tokens=512"],
    ),
    "ILQL, values on a separate trunk": (
        "llama",
        [
            *("ilql", "data.path=REWARDED", *FULL, "objective={name: ilql, q_head: mlp, trunk: separate}"),
            *("source.batch_size=8", "training.microbatch_tokens=512"),
        ],
    ),
    "reward model, all weights": (
        "qwen2",
        ["rm", "data.path=PAIRS", *FULL, "source.batch_size=4", "training.microbatch_tokens=512"],
    ),
    "GRPO, rows of 700 tokens": ("wide", LONG_ROWS),
    "GRPO, rows of 700 tokens, checkpointing": ("wide", [*LONG_ROWS, "training.gradient_checkpointing=true"]),
    "imitation, LoRA, the size of SmolLM2-135M": (
        "smol",
        ["sft", "data.path=ROWS", "source.batch_size=2", "training.microbatch_tokens=128"],
    ),
    "DPO, LoRA, the size of SmolLM2-135M": (
        "smol",
        [
            *("dpo", "data.path=PAIRS", "source.batch_size=2", "training.microbatch_tokens=256"),
            *("evaluation.every=0", "evaluation.episodes=2"),
        ],
    ),
    "reward model, LoRA": (
        "qwen2",
        ["rm", "data.path=PAIRS", "source.batch_size=2", "training.microbatch_tokens=512", "evaluation.episodes=2"],
    ),
    "random_walks/ppo": (None, ["random_walks/ppo", "stages.warmup.training.steps=2"]),
    "maze/ilql": (
        None,
        [
            *("maze/ilql", "stages.bc.training.steps=2", "stages.filtered_bc.training.steps=2"),
            "stages.bc.evaluation.suite=null",
        ],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="only recipes whose names contain one of these texts, separated by semicolons")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--show", action="store_true", help="print the parts of each prediction, and run nothing")
    parser.add_argument("--write-models", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    words = args.only.split(";") if args.only else [""]
    chosen = [name for name in RECIPES if any(word in name for word in words)]
    if args.write_models:
        write_models(args.write_models, {RECIPES[name][0] for name in chosen})
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_rows(folder)
        call(__file__, "--write-models", folder, "--only", args.only or "")
        rows = []
        for name in chosen:
            rows.append({"recipe": name, **measure(folder, name, args.show)})
            print(json.dumps(rows[-1]), flush=True)
    if args.show:
        return
    print_rows(rows)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(folder: Path, name: str, only_predict: bool) -> dict[str, Any]:
    """The prediction for a recipe, part by part, and the measured peak of its run, in MB."""
    from lmrl.recipe.estimates import memory
    from lmrl.recipe.files import load_recipe

    model, (recipe, *overrides) = RECIPES[name]
    files = {"PROMPTS": "prompts", "ROWS": "rows", "LONG": "long", "PAIRS": "pairs", "REWARDED": "rewarded"}
    files["WIDEPROMPTS"] = "long_prompts"
    for word, file in files.items():
        overrides = [one.replace(f"={word}", f"={folder / file}.jsonl") for one in overrides]
    overrides = [one.replace("=REWARD:", f"={folder / 'reward.py'}:") for one in overrides]
    overrides = [*([f"model.path={folder / model}"] if model else []), *overrides, *COMMON]
    parts = {part: round(size) for part, size in (memory(load_recipe(recipe, overrides)) or {}).items()}
    if only_predict:
        return {"predicted": sum(parts.values()), "parts": parts}
    run = folder / name.replace(" ", "-").replace("/", "-")
    call("-m", "lmrl", "train", recipe, *overrides, "--output", run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["kind"] == "memory"][-1]
    return {
        "predicted": found["predicted_mb"],
        "measured": found["measured_mb"],
        "ratio": found["ratio"],
        "parts": parts,
    }


def call(*arguments: Any) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, arguments))}\n{done.stdout}")


def print_rows(rows: list[dict[str, Any]]) -> None:
    print("\n| recipe | predicted, MB | measured, MB | measured / predicted |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['recipe']} | {row['predicted']:,} | {row['measured']:,} | {row['ratio']:.2f} |")


# ------------------------------------------------------------------------------------------------------------------ inputs
def write_models(folder: Path, names: set[str | None]) -> None:
    from lmrl.policy.load import load_policy
    from lmrl.recipe import Model

    for name, config in MODELS.items():
        if name not in names:
            continue
        positions = {"max_position_embeddings": 2048}
        load_policy(Model(config=config | positions), texts=lambda: [string.ascii_lowercase + " "]).save(folder / name)


def write_rows(folder: Path) -> None:
    rng = random.Random(0)

    def text(tokens: int) -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=tokens))

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("prompts", [{"prompt": text(32)} for _ in range(64)])
    write("long_prompts", [{"prompt": text(500)} for _ in range(16)])
    write("rows", [{"prompt": text(32), "completion": text(95)} for _ in range(64)])
    write("long", [{"prompt": text(32), "completion": text(991)} for _ in range(16)])
    write("pairs", [{"prompt": text(32), "chosen": text(95), "rejected": text(95)} for _ in range(64)])
    write("rewarded", [{"prompt": text(32), "completion": text(95), "reward": rng.random()} for _ in range(64)])
    (folder / "reward.py").write_text(
        "def length(completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    )


if __name__ == "__main__":
    main()
