"""The cost of the loop itself: the share of a PPO step that is spent outside model code, and where.

    python benchmarks/overhead.py --model FOLDER [--engine vllm] [--steps 6] [--threads 2]
    python benchmarks/overhead.py --model FOLDER --game maze [--episodes 256] [--turns 10]

Model code is the policy's passes (without and with gradient) and the backward pass, the engine's passes (hf: logits of the
next token; vLLM: its own scheduler and sampling), the update of the weights (norm, clipping, AdamW) and the reward functions
themselves. Everything else is the loop's: sampling tokens and moving the cache (hf), sending weights (vLLM), texts, episodes,
batches, advantages, losses, statistics, files and display; checkpoints, evaluations and diagnostics, which do not run
in every step, are left out.

The library is measured from outside, by wrapping its functions. After the timed steps, one more step runs under cProfile,
which is switched off inside model code, and lists the functions that take the rest, including their calls to torch and other
compiled code; a profiler makes small functions look slower than they are. Shares are given of wall-clock and of CPU time:
if other programs keep the machine busy, trust the second.
"""

from __future__ import annotations

import argparse
import cProfile
import functools
import pstats
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _peers import add_engine_arguments, assignments, cut_prompts, engine_overrides, write_json

HERE = Path(__file__).resolve().parent
SHOWN = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal LM, for instance SmolLM2-135M-Instruct")
    parser.add_argument("--prompts", default=str(HERE.parent / "recipes" / "sentiment" / "prompts.jsonl"))
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--batch", type=int, default=32, help="prompts per step, with one completion each")
    parser.add_argument("--microbatch", type=int, default=8)
    parser.add_argument("--game", help="a shipped environment instead of prompts")
    parser.add_argument("--episodes", type=int, default=256, help="concurrent episodes per step (with --game)")
    parser.add_argument("--turns", type=int, default=10, help="turns per episode, at most (with --game)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="the first is not counted, the last one is profiled")
    parser.add_argument("--json", type=Path)
    add_engine_arguments(parser)
    args = parser.parse_args()
    if args.steps < 3:
        parser.error("--steps: at least 3, one not counted, one measured, one profiled")

    meter = Meter(profiled=args.steps)
    wrap_library(meter, args.engine)
    with tempfile.TemporaryDirectory() as scratch:
        train(args, Path(scratch))
    report(args, meter)


# ------------------------------------------------------------------------------------------------------------ measurement
class Meter:
    """Clocks of whole steps and of the parts that are model code. A part inside another one is not counted twice."""

    def __init__(self, profiled: int):
        """profiled: the step, counted from 1, that runs under the profiler and whose time does not count."""
        self.profiled, self.step = profiled, 0
        self.profiler = cProfile.Profile(builtins=False)  # with builtins, a pause would corrupt its stack
        self.inside = False
        self.whole = [0.0, 0.0]
        self.parts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        """Wall-clock and CPU seconds over all counted steps, by name."""

    @property
    def counts(self) -> bool:
        return 1 < self.step < self.profiled

    def part(self, name: str, function: Callable) -> Callable:
        """`function`, with its time counted as model code."""

        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            if self.inside or self.step == 0:
                return function(*args, **kwargs)
            profiling = self.step == self.profiled
            if profiling:
                sys.setprofile(None)  # `Profile.disable` would clear the profiler's stack as well
            self.inside, started = True, now()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False
                if self.counts:
                    add(self.parts[name], started)
                if profiling:
                    self.profiler.enable(builtins=False)

        return metered

    def steps(self, function: Callable) -> Callable:
        """The loop's function that takes one step."""

        @functools.wraps(function)
        def metered(stage: Any, step: int) -> Any:
            self.step, started = step, now()
            if step == self.profiled:
                self.profiler.enable(builtins=False)
            try:
                return function(stage, step)
            finally:
                if step == self.profiled:
                    self.profiler.disable()
                if self.counts:
                    add(self.whole, started)
                self.step = 0

        return metered


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def add(sums: list[float], started: tuple[float, float]) -> None:
    for index, (before, after) in enumerate(zip(started, now(), strict=True)):
        sums[index] += after - before


def wrap_library(meter: Meter, engine: str) -> None:
    """Put clocks around the library's functions."""
    import lmrl.rollouts.task
    from lmrl.policy.policy import Policy
    from lmrl.training.parallel.strategy import Strategy
    from lmrl.training.stage import Stage

    Stage._step = meter.steps(Stage._step)
    Policy.forward = meter.part("forward passes", Policy.forward)
    Strategy.backward = meter.part("backward passes", Strategy.backward)
    Strategy.step = meter.part("update of the weights", Strategy.step)
    Policy.next_token_logits = meter.part("sampling passes", Policy.next_token_logits)
    if engine == "vllm":
        from lmrl.engines.vllm import VLLMEngine

        start = VLLMEngine._start

        def start_metered(self: VLLMEngine) -> Any:
            llm = start(self)
            llm.llm_engine.step = meter.part("sampling passes", llm.llm_engine.step)
            return llm

        VLLMEngine._start = start_metered
    load = lmrl.rollouts.task.load_rewards

    def load_metered(*args: Any, **kwargs: Any) -> Any:
        rewards = load(*args, **kwargs)
        for reward in rewards:
            reward.call = meter.part("reward functions", reward.call)
        return rewards

    lmrl.rollouts.task.load_rewards = load_metered


def train(args: argparse.Namespace, scratch: Path) -> None:
    import lmrl

    shared = {
        "model.path": args.model,
        "objective.value_warmup_steps": 0,
        "training.steps": args.steps,
        "training.checkpoint_every": 0,
        "training.threads": args.threads,
        "evaluation.suite": "null",
        "evaluation.diagnostics_every": 0,  # would run in the last step
        **engine_overrides(args),
    }
    if args.game:
        recipe = {
            "task": {"environment": args.game, "max_turns": args.turns},
            "rollouts": {"prompts": args.episodes, "max_new_tokens": 8},
            "objective": {"name": "ppo"},
        }
        lmrl.train(recipe, assignments(shared), output=scratch / "run")
        return
    overrides = {
        "task.prompts.path": cut_prompts(args.model, args.prompts, args.prompt_tokens, scratch / "prompts.jsonl"),
        "rollouts.prompts": args.batch,
        "rollouts.max_new_tokens": args.new_tokens,
        "training.microbatch_tokens": args.microbatch * (args.prompt_tokens + args.new_tokens),
    }
    lmrl.train("sentiment/ppo", assignments(shared | overrides), output=scratch / "run")


# ----------------------------------------------------------------------------------------------------------------- report
def report(args: argparse.Namespace, meter: Meter) -> None:
    counted = args.steps - 2
    rest = [whole - sum(times[clock] for times in meter.parts.values()) for clock, whole in enumerate(meter.whole)]
    print(f"\n{'':22}{'wall s':>9}{'':9}{'CPU s':>9}   a step (of {counted}, lmrl {args.engine})")
    for name, times in [*meter.parts.items(), ("outside of model code", rest), ("whole step", meter.whole)]:
        first, second = (
            f"{spent / counted:9.3f}{spent / whole:9.2%}" for spent, whole in zip(times, meter.whole, strict=True)
        )
        print(f"{name:22}{first}{second}")
    functions = largest(meter.profiler)
    profiled = sum(spent for _, spent, _ in functions)
    print(f"\nOutside of model code, by function, in a profiled step ({profiled:.3f} s):")
    for name, spent, calls in functions[:SHOWN]:
        print(f"{spent:10.3f} s{spent / profiled:8.1%}{calls:8} calls  {name}")
    found = {"engine": args.engine, "steps": counted, "whole": meter.whole, "parts": dict(meter.parts), "rest": rest}
    write_json(args.json, found | {"functions": functions})


def largest(profiler: cProfile.Profile) -> list[tuple[str, float, int]]:
    """Functions with their own seconds and calls, the largest first; without the timing wrappers, which contain the model's time."""
    found = []
    for (file, line, name), (_, calls, own, *_) in pstats.Stats(profiler).stats.items():
        if file == __file__:
            continue
        where = Path(file)
        place = "/".join(where.parts[-3:]) if where.is_absolute() else file
        found.append((f"{name}  {place}:{line}", own, calls))
    return sorted(found, key=lambda one: -one[1])


if __name__ == "__main__":
    main()
