"""Runs killed by SIGKILL at random moments and resumed until they finish equal an uninterrupted run to the bit.

    python benchmarks/kill.py --method ppo --kills 20 --seed 0 --out kill.jsonl [--seconds 170]   # resumes where it stopped
    python benchmarks/kill.py --method eval --kills 10 --out kill.jsonl      # the same for evaluation logs
    python benchmarks/kill.py --table --out kill.jsonl

A method's tiny run first finishes without interruption. Then it is started again in another folder, killed at a random moment of the
whole run, including start-up and the writing of checkpoints (every step), resumed, killed again, and so on until it finishes; then its
metrics, samples, results and final weights are compared, and the next run begins, until the number of kills is reached. Processes are
forked from one that has imported lmrl, so that kills hit the run and not the seconds of imports, in which nothing happens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import forking
from tests.conftest import TINY_LLAMA
from tests.launcher import launch, start
from tests.runs import assert_same_run

TINY = TINY_LLAMA | {"num_hidden_layers": 1}
COMMON: dict[str, Any] = {
    "model": {"config": TINY},
    "rollouts": {"prompts": 4, "samples": 4, "max_new_tokens": 8},
    "training": {"steps": 8, "checkpoint_every": 1, "threads": 1, "seed": 3},
    "evaluation": {"every": 3, "episodes": 2, "diagnostics_every": 3},
}
WALKS = {"environment": "random_walks", "nodes": 8}
PAIRS = {"source": {"name": "dataset", "path": "pairs.jsonl", "batch_size": 4}}
ONLINE = COMMON | {
    "task": WALKS,
    "stages": {
        "warmup": {
            "source": {"name": "dataset", "player": "random", "episodes": 30, "batch_size": 8},
            "objective": {"name": "likelihood"},
            "training": {"steps": 4},
        }
    },
}
METHODS: dict[str, dict[str, Any]] = {
    "ppo": ONLINE | {"objective": {"name": "ppo", "kl_coef": 0.1, "kl_target": 1.0}},
    "grpo": ONLINE | {"objective": {"name": "grpo", "kl_coef": 0.1}},
    "ilql": COMMON
    | {
        "task": WALKS,
        "source": {"name": "dataset", "player": "random", "episodes": 40, "batch_size": 8},
        "objective": {"name": "ilql", "q_head": "tied", "polyak": 0.1},
    },
    "dpo": COMMON | PAIRS | {"task": {"prompts": {"holdout": 0.2}}, "objective": {"name": "dpo"}},
    "reward_model": COMMON | PAIRS | {"objective": {"name": "reward_model", "holdout": 0.2, "max_length": 32}},
}
EVAL = "eval"
"""Not a method: an evaluation with a log (docs/evaluation.md), killed and resumed in the same way."""
KINDS = [*METHODS, EVAL]
WEIGHTS = {"ppo": 2, "grpo": 2}
"""Minimum number of files of final weights (else one)."""


def write_pairs(path: Path) -> None:
    rng = random.Random(0)
    texts = [["".join(rng.choices(letters, k=3)) for letters in ("aeiou", "bcdfg")] for _ in range(40)]
    rows = [{"prompt": f"{number}: ", "chosen": a, "rejected": b} for number, (a, b) in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_evaluation(folder: Path) -> None:
    """A model, and a suite of 24 episodes that are scored slowly enough to be killed midway."""
    if (folder / "model").exists():
        return
    from tests.conftest import save_tiny_model

    save_tiny_model(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(12)))
    (folder / "judge.py").write_text(
        "import time\n\n\ndef length(completions, **columns):\n    time.sleep(0.05)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    (folder / "suite.yaml").write_text(
        "task:\n  prompts: {path: prompts.jsonl}\n  rewards: [judge.py:length]\n"
        "rollouts: {max_new_tokens: 8}\nsamples: 2\nmetrics: [reward, best@2]\n"
    )


def prepared(method: str, folder: Path) -> None:
    """Write the input files of a method's runs."""
    if method == EVAL:
        write_evaluation(folder)
        return
    write_pairs(folder / "pairs.jsonl")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(METHODS[method]))


def command(method: str, folder: Path, target: Path) -> list[str]:
    """The arguments of lmrl that start a run in `target`, or resume it."""
    if method == EVAL:
        suite = str(folder / "suite.yaml")
        return ["eval", str(folder / "model"), "--suite", suite, "--log", str(target), "--log-every", "4"]
    return ["train", str(folder / "recipe.yaml"), "--output", str(target), "--resume"]


def assert_same(method: str, whole: Path, torn: Path) -> None:
    """Raise AssertionError if a run that was killed differs from the uninterrupted one."""
    if method != EVAL:
        assert_same_run(whole, torn, WEIGHTS.get(method, 1))
        return
    assert (whole / "scores.json").read_bytes() == (torn / "scores.json").read_bytes()
    assert episodes_of(whole) == episodes_of(torn)


def episodes_of(log: Path) -> list[dict[str, Any]]:
    """The lines of an evaluation log, without the times at which they were played."""
    rows = [json.loads(line) for line in (log / "samples.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in ("began", "seconds")} for row in rows]


def kill_runs(method: str, kills: int, seed: int, first: int, until: float, folder: Path):
    """Yield a line for every run that was killed and compared. first: number of the first run."""
    prepared(method, folder)
    whole = folder / "whole"
    for name in ("warm", "whole"):  # the first one imports the modules that only this method needs
        began = time.monotonic()
        begin = [one for one in command(method, folder, folder / name) if one != "--resume"]
        done = launch(*begin)
        if done.returncode != 0:
            sys.exit(f"the uninterrupted run failed: {done.stderr}")
        length = time.monotonic() - began
    number = first
    while kills > 0 and time.monotonic() < until:
        rng, torn, moments = random.Random(f"{method} {seed} {number}"), folder / f"torn-{number}", []
        while True:
            run = start(*command(method, folder, torn))
            if kills > 0:
                moment = rng.uniform(0, length)
                time.sleep(moment)
                with contextlib.suppress(ProcessLookupError):  # it has finished already
                    run.kill()
            _, said = run.communicate()
            if run.returncode == 0:
                break
            if run.returncode != -signal.SIGKILL:
                sys.exit(f"{method}, run {number}, after kills at {moments}: {said}")
            kills -= 1
            moments.append(round(moment, 3))
        if moments:
            try:
                assert_same(method, whole, torn)
            except AssertionError:
                kept = shutil.copytree(
                    folder, Path(tempfile.gettempdir()) / f"kill-{method}-{seed}-{number}", dirs_exist_ok=True
                )
                sys.exit(
                    f"{method}, run {number}, killed at {moments}: it differs from the uninterrupted run; both are in {kept}"
                )
            yield {"method": method, "seed": seed, "run": number, "seconds": round(length, 2), "kills": moments}
        number += 1


def table(lines: list[dict[str, Any]]) -> str:
    rows = [["method", "kills", "runs", "seconds per run", "equal to the bit"], ["---"] * 5]
    for method in KINDS:
        own = [line for line in lines if line["method"] == method]
        if own:
            lengths = [line["seconds"] for line in own]
            count = sum(len(line["kills"]) for line in own)
            rows.append(
                [method, str(count), str(len(own)), f"{min(lengths)} to {max(lengths)}", f"{len(own)} of {len(own)}"]
            )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=KINDS, action="append", help="repeatable (default: all)")
    parser.add_argument("--kills", type=int, default=20, help="kills per method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("kill.jsonl"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after this many seconds")
    parser.add_argument("--table", action="store_true", help="only print the results so far")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    until = time.monotonic() + args.seconds
    forking.IMPORTS.append("lmrl.training.reward_model")
    for method in [] if args.table else args.method or KINDS:
        own = [line for line in lines if (line["method"], line["seed"]) == (method, args.seed)]
        missing = args.kills - sum(len(line["kills"]) for line in own)
        if missing <= 0 or time.monotonic() > until:
            continue
        first = max((line["run"] + 1 for line in own), default=0)
        with tempfile.TemporaryDirectory(prefix="lmrl-kill-") as folder:
            for line in kill_runs(method, missing, args.seed, first, until, Path(folder)):
                lines.append(line)
                with open(args.out, "a") as file:
                    file.write(json.dumps(line) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
