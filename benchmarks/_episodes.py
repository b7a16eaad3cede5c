"""The modes of rollouts.py that play episodes: dialogues of several turns, slow environments, the shipped games."""

from __future__ import annotations

import argparse
import math
import random
import time
from typing import Any

from lmrl.environments import TextEnvironment

REPLIES = (
    "Interesting. Can you say the same in other words, for a reader who knows nothing about it?",
    "And what would somebody say who disagrees with this?",
    "Give me one example from daily life, please.",
    "What follows from that?",
)
SPREAD = math.sqrt(2 * math.log(20))
"""The sigma at which a log-normal distribution has the most mass above 20 times its mean: 7 in 1,000."""


class Dialogue(TextEnvironment):
    """A question, then replies that do not depend on the answers. pause: returns the seconds of a step from a random stream."""

    def __init__(self, prompts: list[Any], turns: int, pause: Any = lambda rng: 0.0):
        self.prompts, self.turns, self.pause, self.num_starts = prompts, turns, pause, len(prompts)
        self.waited = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.start, self.turn, self.waited = options["start"], 0, 0.0
        self.rng = random.Random(self.start)
        return self.prompts[self.start], {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.turn += 1
        seconds = self.pause(self.rng)
        self.waited += seconds
        time.sleep(seconds)
        return REPLIES[(self.start + self.turn) % len(REPLIES)], 0.0, self.turn == self.turns, False, {}


def log_normal(mean: float) -> Any:
    """Draws seconds with this mean and a heavy tail."""
    return lambda rng: rng.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD)


def sampler_of(args: argparse.Namespace, questions: list[str], pause: Any = lambda rng: 0.0, **options: Any):
    """A sampler of dialogues over a model's chat template, with engine `hf`."""
    from lmrl.engines.hf import HFEngine
    from lmrl.policy.load import open_policy
    from lmrl.rollouts.sampler import Sampler
    from lmrl.rollouts.task import Task
    from lmrl.trajectories.render import Renderer

    policy = open_policy(args.model, args.precision)
    engine = HFEngine(policy, args.slots)
    renderer = Renderer(policy.tokenizer, chat=bool(policy.tokenizer.chat_template))
    deterministic = options.pop("deterministic", True)
    task = Task(
        lambda: Dialogue(questions, args.turns, pause),
        renderer,
        list(range(len(questions))),
        None,
        args.turns,
        **options,
    )
    return Sampler(task, engine, policy.decode, deterministic)


def run_turns(args: argparse.Namespace, questions: list[str], anew: bool) -> dict[str, Any]:
    """Dialogues of `--turns` turns. anew: every turn of all dialogues is recomputed from its first token, as a batch."""
    from lmrl.engines.base import Sampling

    sampler = sampler_of(args, questions)
    if anew:
        sampler.engine.batch = None
    starts = list(range(len(questions)))
    sampler.play(starts[:2], 1, Sampling(2), ("warm-up",))
    first = 0 if anew else sampler.engine.batch.computed_tokens
    wall, cpu = time.monotonic(), time.process_time()
    played = sampler.play(starts, 1, Sampling(args.max_new_tokens), ("benchmark",))
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    contexts = sum(at for one in played for at in context_lengths(one.segments))
    return {
        "tokens": sum(len(segment.actions) for one in played for segment in one.segments),
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "context_tokens": contexts,
        "prefilled_tokens": contexts if anew else sampler.engine.batch.computed_tokens - first,
    }


def context_lengths(segments: list[Any]) -> list[int]:
    """Tokens before each turn."""
    found = []
    for segment in segments:
        turns = segment.turns
        found += [at for at, turn in enumerate(turns) if turn >= 0 and (at == 0 or turns[at - 1] != turn)]
    return found


def run_latency(args: argparse.Namespace, questions: list[str]) -> dict[str, float]:
    """Steps that take log-normal times, in lockstep and with overtaking, compared with the engine alone."""
    from lmrl.engines.base import Sampling

    starts, found = list(range(len(questions))), {}
    for name, mean, deterministic in (("engine", 0.0, True), ("waiting", 1.0, True), ("overtaking", 1.0, False)):
        pause = log_normal(args.mean_latency) if mean else lambda rng: 0.0
        sampler = sampler_of(args, questions, pause, workers=len(questions), deterministic=deterministic)
        sampler.play(starts[:2], 1, Sampling(2), ("warm-up",))
        began = time.monotonic()
        sampler.play(starts, 1, Sampling(args.max_new_tokens), ("benchmark",))
        found[name] = time.monotonic() - began
        found["slowest"] = max(environment.waited for environment in sampler.environments)
    bound = max(found["engine"], found["slowest"])
    return found | {"bound": bound, "share": bound / found["overtaking"], "share_waiting": bound / found["waiting"]}


def run_games(args: argparse.Namespace) -> dict[str, float]:
    """A shipped game, `--requests` concurrent episodes, with the model of its recipe: CPU seconds by part."""
    import torch

    from lmrl.engines.base import Sampling
    from lmrl.engines.hf import HFEngine
    from lmrl.policy.load import load_policy
    from lmrl.recipe.files import load_recipe
    from lmrl.rollouts.sampler import Sampler
    from lmrl.rollouts.task import build_task, starts_for, task_texts

    torch.manual_seed(0)
    recipe = load_recipe(args.game, [])
    policy = load_policy(recipe.model, texts=lambda: task_texts(recipe))
    task = build_task(recipe.task, policy.tokenizer)
    task.max_turns = min(task.max_turns, args.turns)
    sampler = Sampler(task, HFEngine(policy, args.slots), policy.decode)
    starts = starts_for(task.training, 0, args.requests, "benchmark")
    passes, steps = Clock(policy, "next_token_logits"), Clock(sampler, "_call")
    sampler.play(starts, 1, Sampling.of(recipe.rollouts), ("warm-up",))
    passes.spent = steps.spent = 0.0
    cpu = time.process_time()
    played = sampler.play(starts, 1, Sampling.of(recipe.rollouts), ("benchmark",))
    cpu = time.process_time() - cpu
    turns = sum(len(one.turns) for one in played)
    return {"turns": turns, "cpu_seconds": cpu, "passes": passes.spent, "environments": steps.spent}


class Clock:
    """CPU seconds spent in a method."""

    def __init__(self, owner: Any, name: str):
        self.spent, own = 0.0, getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return own(*args, **kwargs)
            finally:
                self.spent += time.process_time() - began

        async def timed_async(*args: Any) -> Any:  # only for calls that do not wait
            began = time.process_time()
            try:
                return await own(*args)
            finally:
                self.spent += time.process_time() - began

        setattr(owner, name, timed_async if name == "_call" else timed)
