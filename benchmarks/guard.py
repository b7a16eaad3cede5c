"""What the guard does about runs that are broken on purpose, on small tasks that its thresholds were not set on.

    python benchmarks/guard.py run --seeds 0,1 --out guard.jsonl [--case rate_x30]   # goes on where it stopped
    python benchmarks/guard.py table --out guard.jsonl

A cell is a recipe, a fault and a seed: a small model imitates random walks on a graph, and is then improved by PPO or
GRPO, while its episodes or weights are tampered with. Evaluation is not: it scores by the true reward. `none` is the
same run without a fault.

The table: the runs in which a detector of the fault warned, the steps from the fault until it did, and the share of the
best evaluation so far (above the start) that the final policy keeps. With a constant or reversed reward nothing can be
gained after the fault, so the best is what was reached before it.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import lmrl
from lmrl.rollouts.sampler import Sampler
from lmrl.training.display import Display
from lmrl.training.stage import Stage
from lmrl.trajectories.trajectory import Trajectory

STEPS, FROM = 100, 51
"""Length of the tampered stage, and the first step with a fault that sets in late."""
SIZES = [
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "task.nodes=12",
    "rollouts.max_new_tokens=10",
    "stages.warmup.source.episodes=300",
    "stages.warmup.source.batch_size=64",
    "stages.warmup.training.steps=100",
    "stages.warmup.evaluation.suite=null",
    "rollouts.prompts=12",
    "rollouts.samples=4",
    f"training.steps={STEPS}",
    "training.checkpoint_every=0",
    "training.threads=1",
    "evaluation.every=20",
    "evaluation.diagnostics_every=0",
]
PPO = [
    "objective={name: ppo, epochs: 2, minibatches: 2, entropy_coef: 0.01, value_warmup_steps: 3, whiten_advantages: false}"
]
GRPO = ["objective={name: grpo, epochs: 2, minibatches: 2}"]
GRAPHS = (7, 8, 9, 10, 11)
"""The graph of seed s is GRAPHS[s % 5]."""
METRIC = "optimality"


# --------------------------------------------------------------------------------------------------------------- faults
def reversed_reward(one: Trajectory, step: int) -> None:
    if step >= FROM:
        repay(one, -one.reward)


def constant_reward(one: Trajectory, step: int) -> None:
    repay(one, 1.0)


def penalised_end(one: Trajectory, step: int) -> None:
    """Take 2 from whatever ends by itself."""
    if not one.cut_turns:
        repay(one, one.reward - 2.0)


def failing_reward(one: Trajectory, step: int) -> None:
    if one.group % 3 == 0:
        one.reward, one.failure = None, "the reward failed"


def repay(one: Trajectory, reward: float) -> None:
    """Let an episode earn this, at its end."""
    for segment in one.segments:
        segment.rewards = [0.0] * len(segment.rewards)
    for turn in one.turns:
        turn.reward = 0.0
    one.reward = reward
    one.place_reward(reward)


def blown_up_values(stage: Stage, step: int) -> None:
    if step == FROM:
        with torch.no_grad():
            for parameter in stage.policy.values.parameters():
                parameter.mul_(1000.0)


@dataclass(frozen=True)
class Case:
    """A fault. episode, stage: what it does to a played episode, and to a stage before a step. changes: to the recipe.
    expected: detectors of which one has to warn. since: the step at which it sets in."""

    expected: tuple[str, ...]
    changes: tuple[str, ...] = ()
    episode: Callable[[Trajectory, int], None] | None = None
    stage: Callable[[Stage, int], None] | None = None
    since: int = 1
    methods: tuple[str, ...] = ("ppo", "grpo")


CASES = {
    "none": Case(()),
    "rate_x30": Case(("collapse", "rate_held"), ("optimizer.lr=1.5e-2",)),
    "rate_x30_free": Case(
        ("collapse", "runaway_entropy", "no_signal"),
        ("optimizer.lr=1.5e-2", "training.kl_band=null", "objective.clip=10", "objective.target_kl=null"),
    ),
    "sign_reversed": Case(("collapse",), episode=reversed_reward, since=FROM),
    "constant_reward": Case(("no_signal",), episode=constant_reward),
    "eos_penalised": Case(("endless_turns",), episode=penalised_end),
    "value_x1000": Case(("blind_critic", "collapse"), stage=blown_up_values, since=FROM, methods=("ppo",)),
    "reward_fails": Case(("many_failed",), ("task.max_failed=0.6",), episode=failing_reward),
}


# ---------------------------------------------------------------------------------------------------------------- cells
def run(case: Case, method: str, seed: int) -> dict[str, Any]:
    """Train a cell in this process; returns what it found and kept."""
    changes = [*SIZES, *(PPO if method == "ppo" else GRPO), "optimizer.lr=5e-4", *case.changes]
    changes += [f"task.graph={GRAPHS[seed % len(GRAPHS)]}", f"training.seed={seed}"]
    recipe = lmrl.load_recipe("random_walks/ppo", changes)
    play, step_of = Sampler.play, Stage._step

    def tampered(self: Sampler, starts: Any, samples: int, sampling: Any, name: tuple, **more: Any) -> list[Trajectory]:
        episodes = play(self, starts, samples, sampling, name, **more)
        if case.episode and "rollout" in name:
            for one in episodes:
                case.episode(one, name[-1])
        return episodes

    def faulty(self: Stage, step: int) -> None:
        if case.stage and self.name == "main":
            case.stage(self, step)
        step_of(self, step)

    Sampler.play, Stage._step = tampered, faulty
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            said = Console(file=io.StringIO(), width=200)
            result = lmrl.train(recipe, output=Path(scratch) / "run", display=Display(said))
            lines = [json.loads(line) for line in (Path(scratch) / "run/metrics.jsonl").read_text().splitlines()]
    finally:
        Sampler.play, Stage._step = play, step_of
    own = [line for line in lines if line["stage"] == "main"]
    spoken = {line["name"]: line["step"] for line in reversed(own) if line["kind"] == "warning"}
    scores = {line["step"]: line[METRIC]["mean"] for line in own if line["kind"] == "eval"}
    # The last score at a step is that of the policy that is left there.
    start, best, last = (
        scores[0],
        max(scores.values()),
        result.scores["PPO" if method == "ppo" else "GRPO"][METRIC]["mean"],
    )
    found = [spoken[name] - case.since + 1 for name in case.expected if name in spoken]
    return {
        "warnings": spoken,
        "found": min(found) if found else None,
        "rollbacks": sum(line["kind"] == "guard" for line in own),
        "ended": result.ended,
        "start": start,
        "best": best,
        "last": last,
        "retained": (last - start) / (best - start) if best > start else 1.0,
        "seconds": round(time.monotonic() - started),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| fault | method | found | steps until found | rolled back | ended early | share of the best retained, lowest |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for case in CASES:
        for method in ("ppo", "grpo"):
            own = [row for row in rows if (row["case"], row["method"]) == (case, method)]
            if not own:
                continue
            steps = [row["found"] for row in own if row["found"] is not None]
            found = f"{len(steps)} of {len(own)}" if CASES[case].expected else "-"
            until = f"{min(steps)}-{max(steps)}" if steps else "-"
            kept = [row["retained"] for row in own]
            back = sum(row["rollbacks"] > 0 for row in own)
            ended = sum(row["ended"] is not None for row in own)
            lines.append(
                f"| {case} | {method} | {found} | {until} | {back} | {ended} | {statistics.mean(kept):.2f}, {min(kept):.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--case", choices=list(CASES), action="append", help="only these (default: all)")
    parser.add_argument("--method", choices=("ppo", "grpo"), action="append", help="only these (default: both)")
    parser.add_argument("--out", type=Path, required=True, help="a JSON line for each cell")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if options.command == "run":
        done = {(row["case"], row["method"], row["seed"]) for row in rows}
        for name in options.case or CASES:
            for method in options.method or ("ppo", "grpo"):
                for seed in map(int, options.seeds.split(",")):
                    if method not in CASES[name].methods or (name, method, seed) in done:
                        continue
                    row = {"case": name, "method": method, "seed": seed} | run(CASES[name], method, seed)
                    rows.append(row)
                    with open(options.out, "a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(json.dumps(row), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
