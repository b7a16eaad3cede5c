"""Scoring with vLLM side by side: `lmrl eval` with a log, and bare vLLM, on the same prompts with the same reward.

    python benchmarks/scoring.py --model FOLDER [--requests 1000] [--rounds 2]

Each side runs in a separate process, in turn: the prompts of rollouts.py, rendered with the model's chat template,
sampled at temperature 1, and the number of words as the reward. Timed is everything from the loaded engine to the mean
reward: lmrl also writes a log of every sample with its tokens and log-probabilities, and computes intervals.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from _peers import add_peer_arguments, in_turn, leave, print_ratios, print_table, this_script
from rollouts import build_vllm, environment, question, requests

PEERS = ("lmrl", "vllm")


def words(completions: list, **_) -> list[float]:
    """The reward: the number of words."""
    texts = (one if isinstance(one, str) else one[-1]["content"] for one in completions)
    return [float(len(text.split())) for text in texts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal LM, for instance SmolLM2-135M-Instruct")
    parser.add_argument("--precision", default="bfloat16", help="of the weights; float32 if the CPU lacks bfloat16")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=64, help="sequences at a time")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    add_peer_arguments(parser, PEERS)
    args = parser.parse_args()
    args.samples = 1
    if args.peer:
        leave(args.output, run_lmrl(args) if args.peer == "lmrl" else run_vllm(args))
        return
    with tempfile.TemporaryDirectory() as scratch:
        results = in_turn(
            PEERS,
            args.rounds,
            lambda peer, number: this_script(
                peer, Path(scratch) / f"{peer}-{number}", args.threads, environment=environment()
            ),
        )
    print_table(results, {"tokens/s": ("tokens_per_second", ".1f"), "words": ("reward", ".2f")})
    print_ratios(results, {"tokens/s": "tokens_per_second"})


def report(tokens: int, started: float, reward: float) -> dict[str, float]:
    seconds = time.monotonic() - started
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds, "reward": reward}


def run_lmrl(args: argparse.Namespace) -> dict[str, float]:
    import lmrl
    from lmrl.engines.vllm import VLLMEngine

    folder, loaded = args.output.with_suffix(""), []
    folder.mkdir()
    prompts, log = folder / "prompts.jsonl", folder / "log"
    rows = [{"prompt": [{"role": "user", "content": question(number)}]} for number in range(args.requests)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = {
        "task": {"prompts": {"path": str(prompts), "max_tokens": 512}, "rewards": [{"function": f"{__file__}:words"}]},
        "rollouts": {
            "engine": "vllm",
            "max_new_tokens": args.max_new_tokens,
            "slots": args.slots,
            "vllm": {"max_model_len": 1024, "dtype": args.precision},
        },
        "metrics": ["reward", "length"],
    }
    (folder / "suite.json").write_text(json.dumps(suite))
    start = VLLMEngine._start

    def start_noted(self: VLLMEngine):
        found = start(self)
        loaded.append(time.monotonic())
        return found

    VLLMEngine._start = start_noted
    metrics = lmrl.evaluate(args.model, suite=folder / "suite.json", log=log).metrics
    return report(round(metrics["length"]["mean"] * args.requests), loaded[0], metrics["reward"]["mean"])


def run_vllm(args: argparse.Namespace) -> dict[str, float]:
    from transformers import AutoTokenizer

    prompts = requests(args)
    complete, close = build_vllm(args)
    started = time.monotonic()
    completions = complete(prompts, args.max_new_tokens)
    texts = AutoTokenizer.from_pretrained(args.model).batch_decode(completions, skip_special_tokens=True)
    found = report(sum(map(len, completions)), started, statistics.mean(words(texts)))
    close()
    return found


if __name__ == "__main__":
    main()
