"""Shared code of the scripts: each side runs in a separate process, in turn with the others, and is reported the same way.

Ratios are between two runs of the same round, because the speed of a shared machine changes from minute to minute.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Results = dict[str, list[dict[str, Any]]]
"""The results of each round, by peer."""


# -------------------------------------------------------------------------------------------------------------- processes
def execute(command: Sequence[str], threads: int, environment: Mapping[str, str] = {}) -> None:
    """Run a command with so many OpenMP threads; if it fails, show the end of its output and exit."""
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)} | dict(environment)
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")


def in_turn(peers: Iterable[str], rounds: int, run: Callable[[str, int], dict]) -> Results:
    """`run(peer, round)` for every peer of a round, then for the next round; prints each result as it arrives."""
    results: Results = {peer: [] for peer in peers}
    for number in range(rounds):
        for peer, runs in results.items():
            runs.append(run(peer, number))
            print(peer, json.dumps(runs[-1]), flush=True)
    return results


def add_peer_arguments(parser: argparse.ArgumentParser, peers: Sequence[str]) -> None:
    """The arguments with which a script calls itself as one peer."""
    parser.add_argument("--peer", choices=peers, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)


def this_script(
    peer: str, output: Path, threads: int, *arguments: str, environment: Mapping[str, str] = {}
) -> dict[str, Any]:
    """Call this script again, as one peer in a separate process; returns the result that it writes with `leave`."""
    command = [sys.executable, sys.argv[0], *sys.argv[1:], *arguments, "--peer", peer, "--output", str(output)]
    execute(command, threads, environment)
    return json.loads(output.with_suffix(".json").read_text())


def leave(output: Path, found: dict[str, Any]) -> None:
    output.with_suffix(".json").write_text(json.dumps(found))


# ------------------------------------------------------------------------------------------------------------------- lmrl
def assignments(overrides: Mapping[str, Any]) -> list[str]:
    """Overrides as `KEY=VALUE`, which the command line and `lmrl.train` take."""
    return [f"{key}={value}" for key, value in overrides.items()]


def lmrl_train(recipe: str, changes: Sequence[str], output: Path, threads: int, processes: int = 1) -> list[dict]:
    """Train with the command line; returns the lines of the steps in metrics.jsonl."""
    command = [sys.executable, "-m", "lmrl", "train", recipe, "--output", str(output), *changes]
    execute([*command, *(["--processes", str(processes)] if processes > 1 else [])], threads)
    return train_lines(output)


def train_lines(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train" and line["stage"] == "main"]


def seconds(line: dict[str, Any]) -> float:
    """Seconds of a whole step: the rollout with its rewards, and the updates."""
    return line["time"]["source_s"] + line["time"]["update_s"]


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", default="hf", choices=("hf", "vllm"), help="lmrl's engine")
    parser.add_argument("--vllm-memory", type=float, default=0.25, help="GiB of vLLM's KV cache")


def engine_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """vLLM gets as many positions and as much memory as the job needs, because its memory is counted."""
    if args.engine == "hf":
        return {}
    return {
        "rollouts.engine": args.engine,
        "rollouts.vllm.memory": args.vllm_memory,
        "rollouts.vllm.max_model_len": 2 * args.prompt_tokens + args.new_tokens,  # cut texts may have more tokens
    }


def cut_prompts(model: str, prompts: str | Path, tokens: int, path: Path) -> Path:
    """The first tokens of each prompt as texts, cut once for all peers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with open(prompts) as lines, open(path, "w") as out:
        for line in lines:
            ids = tokenizer(json.loads(line)["prompt"]).input_ids[:tokens]
            out.write(json.dumps({"prompt": tokenizer.decode(ids)}) + "\n")
    return path


# ---------------------------------------------------------------------------------------------------------------- reports
def online_report(samples: int, steps: Sequence[float], rollouts: Sequence[float], peak_mb: float) -> dict[str, Any]:
    """The cost of online training: seconds of each counted step, and of its rollout with the rewards."""
    updates = [step - rollout for step, rollout in zip(steps, rollouts, strict=True)]
    return {
        "samples_per_second": samples / statistics.median(steps),
        "step_seconds": [round(one, 2) for one in steps],
        "rollout_seconds": [round(one, 2) for one in rollouts],
        "update_seconds": [round(one, 2) for one in updates],
        "peak_mb": peak_mb,
    }


ONLINE = {
    "samples/s": ("samples_per_second", ".2f"),
    "step s": ("step_seconds", ".2f"),
    "rollout s": ("rollout_seconds", ".2f"),
    "update s": ("update_seconds", ".2f"),
    "peak MB": ("peak_mb", ".0f"),
}
"""Columns of a table of online reports: their key and format."""


def median(runs: Sequence[dict[str, Any]], key: str) -> float:
    """Median over all rounds; if a round has a list, over all its entries."""
    values = [run[key] for run in runs]
    return statistics.median(one for value in values for one in (value if isinstance(value, list) else [value]))


def print_table(results: Results, columns: Mapping[str, tuple[str, str]]) -> None:
    width = max(map(len, results))
    rounds = max(map(len, results.values()))
    print(f"\n{'':{width}} " + " ".join(f"{name:>11}" for name in columns) + f"   (median of {rounds} rounds)")
    for peer, runs in results.items():
        cells = (format(median(runs, key), shape) for key, shape in columns.values())
        print(f"{peer:{width}} " + " ".join(f"{cell:>11}" for cell in cells))


def ratios(results: Results, key: str) -> list[float]:
    """The ratio of the first peer's value to the second's, in each round."""
    first, second = list(results.values())[:2]
    return [a[key] / b[key] for a, b in zip(first, second, strict=True)]


def print_ratios(results: Results, keys: Mapping[str, str]) -> dict[str, list[float]]:
    """Print ratios of the reports' values, and return them. keys: of the reports, by the name to print."""
    found = {name: ratios(results, key) for name, key in keys.items()}
    first, second = list(results)[:2]
    for name, each in found.items():
        print(f"{name}: {first} / {second} = {statistics.median(each):.2f} (rounds {min(each):.2f} to {max(each):.2f})")
    return found


def write_json(path: Path | None, found: Any) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=2) + "\n")
