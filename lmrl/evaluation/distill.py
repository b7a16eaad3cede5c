"""Fitting one plain model to a policy that Q values guide, so that anything can decode it at full speed.

A copy of the policy's language model, the student, learns the guided distribution: KL(guided || student) over the whole
vocabulary, the support mask included, on logged states, on states of the guided policy, and on states that the student
itself visits (DAgger: Ross et al., arXiv 1011.0686). The last ones matter: a student trained only on the log does not
know what to do after its own mistakes.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from lmrl.accelerators import default_device, default_precision
from lmrl.engines.base import Sampling, guidance_of
from lmrl.engines.hf import HFEngine
from lmrl.errors import ModelError, RunError
from lmrl.policy.export import plain_model
from lmrl.policy.heads import guide
from lmrl.policy.language_model import float32
from lmrl.policy.load import open_policy
from lmrl.policy.passes import Guidance
from lmrl.policy.policy import Policy
from lmrl.recipe import MAIN_STAGE, PromptTask, Recipe
from lmrl.recipe.blend import BlendSource
from lmrl.recipe.files import stages_of
from lmrl.recipe.rates import default_rates
from lmrl.recipe.source import DatasetOptions
from lmrl.rollouts.collect import draw_starts
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import Task, build_task
from lmrl.run_folders import read_recipe
from lmrl.seeding import seed_everything, stream
from lmrl.sources.dataset import Dataset, build_dataset
from lmrl.trajectories.batch import Batch, Microbatch, Sequence, to_batch
from lmrl.trajectories.trajectory import Trajectory

STEPS = 2000
"""Default maximum number of updates."""
ROUND = 100
"""Updates between two collections of the student's own states."""
EPISODES = 64
"""Episodes of each collection."""
WARMUP = 20
"""Updates of learning-rate warmup; then the rate decays to 0 at the maximum number of updates."""
CLOSE = 0.01
"""KL to the guided policy, in nats per token of that policy's episodes, at which a student is done: about one token in
a hundred then differs."""
NUMBERS = 2**25
"""Maximum elements of a table of states by vocabulary."""
FLOOR = -1e4
"""Replaces the logarithm of 0 where it is multiplied by 0."""


@dataclass(frozen=True)
class Fit:
    """How a distillation went: its updates, and the student's final KL from the guided policy, in nats per token."""

    steps: int
    kl: float


class States:
    """The states that the student is trained on: half of every batch from the log, half from played episodes."""

    def __init__(self, logs: List[Dataset], episodes: int, longest: int, name: tuple[int | str, ...]):
        """episodes: logged episodes per update. longest: maximum states per sequence in an update."""
        self.logs, self.episodes, self.longest, self.name = list(logs), episodes, longest, name
        self.played: list[Sequence] = []

    def add(self, sequences: List[Sequence]) -> None:
        self.played += sequences

    def batch(self, step: int) -> Batch:
        """The states of an update, counted from 0."""
        rng = stream(*self.name, "states", step)
        logged: list[Sequence] = []
        if self.logs:
            turn, log = divmod(step, len(self.logs))
            logged = to_batch(self.logs[log].take(turn * self.episodes, self.episodes)).sequences
        chosen = rng.integers(len(self.played), size=len(logged) or self.episodes)
        return Batch([thinned(one, self.longest, rng) for one in [*logged, *(self.played[row] for row in chosen)]])


def thinned(sequence: Sequence, longest: int, rng: np.random.Generator) -> Sequence:
    """The sequence with `longest` of its states drawn at random, if it has more."""
    if len(sequence.states) <= longest:
        return sequence
    kept = torch.from_numpy(rng.choice(len(sequence.states), longest, replace=False))
    return Sequence(sequence.tokens, sequence.states[kept], sequence.targets[kept])


class Distillation:
    """A guided policy, and the student that becomes it."""

    def __init__(self, path: Path, run: Path, beta: float, dtype: str = "float32", trust_remote_code: bool = False):
        """path: a checkpoint of the run. dtype: the precision that the policy is scored in. Raises ModelError for a
        policy without Q."""
        stage = _stage_of(path, run)
        self.recipe = stages_of(read_recipe(run))[stage]
        self.name = (self.recipe.training.seed, stage, "distill")
        seed_everything(*self.name)
        device = default_device()
        self.teacher = open_policy(str(path), dtype, trust_remote_code).to(device).eval()
        guidance = guidance_of(self.teacher, Sampling(beta=beta, support=self.recipe.rollouts.support))
        if guidance is None:
            raise ModelError(
                "--distill fits a model to a policy that is guided by Q values, and this one is not: leave it out"
            )
        self.guidance: Guidance = guidance
        self.student = _student(path, trust_remote_code).to(device).eval()
        self.task = _task(self.recipe, self.student)
        self.tokens = self.recipe.training.microbatch_tokens
        longest = max(NUMBERS // len(self.student.vocabulary), 1)
        source = self.recipe.source
        episodes = getattr(source, "batch_size", self.recipe.rollouts.prompts)
        self.states = States(_logs(self.recipe, self.task, self.student, stage), episodes, longest, self.name)

    def fit(
        self,
        steps: int = STEPS,
        good: Callable[[Policy], bool] = lambda student: True,
        report: Callable[[str], None] = lambda line: None,
    ) -> Fit:
        """Train the student until it is CLOSE to the guided policy and `good`, for at most `steps` updates.

        good: True if the student scores well enough; called only once it is close. report: called with a line on every
        round.
        """
        parameters = list(self.student.parameters())
        rate = default_rates(self._all_weights(), *self.student.size).lr
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        self.states.add(to_batch(self.play(self.teacher, 0)).sequences)
        kl = float("inf")
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min((step + 1) / WARMUP, 1.0) * (1 - step / steps)
            self._update(self.states.batch(step), optimizer, parameters)
            done = step + 1
            if done % ROUND and done != steps:
                continue
            visited = to_batch(self.play(self.student, done))
            kl = self.divergence(visited)
            report(f"update {done} of at most {steps}: {kl:.4f} nats per token from the guided policy")
            if kl <= CLOSE and good(self.student):
                return Fit(done, kl)
            self.states.add(visited.sequences)
        return Fit(steps, kl)

    def play(self, policy: Policy, number: int) -> list[Trajectory]:
        """Episodes of the guided policy, or of the student, from random start states of the task."""
        rollouts = self.recipe.rollouts
        engine = HFEngine(policy, rollouts.slots, rollouts.cache_tokens)
        sampler = Sampler(self.task, engine, policy.decode, rollouts.deterministic)
        name = (*self.name, "play", number)
        sampling = replace(Sampling.of(rollouts), beta=self.guidance.beta, support=self.guidance.support)
        try:
            played = sampler.play(draw_starts(self.task, EPISODES, name), 1, sampling, name)
        finally:
            engine.close()
        return [one for one in played if one.failure is None and one.num_actions]

    def divergence(self, batch: Batch) -> float:
        """KL(guided || student), mean over the states of a batch, in nats."""
        with torch.no_grad():
            rng = stream(*self.name, "divergence")
            few = Batch([thinned(one, self.states.longest, rng) for one in batch.sequences])
            total = sum(float(self._kl(micro)) for micro in self._microbatches(few))
        return total / max(few.num_actions, 1)

    def _update(self, batch: Batch, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
        for micro in self._microbatches(batch):
            (self._kl(micro) / batch.num_actions).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def _microbatches(self, batch: Batch) -> list[Microbatch]:
        tokens = min(self.tokens, self.states.longest)
        device = self.student.device
        return [micro.to(device) for micro in batch.microbatches(tokens, self.student.pad_id)]

    def _kl(self, micro: Microbatch) -> torch.Tensor:
        """KL(guided || student), sum over the states of a microbatch, with gradient into the student."""
        states = self.teacher.states(micro)
        assert states.q_NV is not None  # a guided policy has them
        guided_NV = guide(states.logits_NV, states.q_NV, self.guidance.beta, self.guidance.support).log_softmax(-1)
        student_NV = self.student.logits(micro).float().log_softmax(-1)
        return (guided_NV.exp() * (guided_NV.clamp(min=FLOOR) - student_NV)).sum()

    def _all_weights(self) -> Recipe:
        """The recipe with all weights trained, as those of the student are."""
        return self.recipe.model_copy(update={"model": self.recipe.model.model_copy(update={"lora": None})})


def _student(path: Path, trust_remote_code: bool) -> Policy:
    """A copy of the policy's language model to be trained: adapters merged, without quantization and heads."""
    opened = open_policy(str(path), trust_remote_code=trust_remote_code)
    student = Policy(float32(plain_model(opened)).requires_grad_(True), opened.tokenizer)
    if default_precision(default_device()) == "bfloat16":
        student.autocast_dtype = torch.bfloat16
    return student


def _task(recipe: Recipe, policy: Policy) -> Task:
    """The stage's task without its rewards, which would only cost time."""
    section = recipe.task
    if section is None:
        raise RunError("--distill plays the run's own task, but the run has none: leave it out")
    task = build_task(
        section.model_copy(update={"rewards": []}) if isinstance(section, PromptTask) else section, policy.tokenizer
    )
    task.positions = policy.max_length
    return task


def _logs(recipe: Recipe, task: Task, policy: Policy, stage: str) -> list[Dataset]:
    """The logged episodes that the stage learned from, log by log."""
    source, seed = recipe.source, recipe.training.seed
    if isinstance(source, DatasetOptions):
        return [build_dataset(source, task, seed, stage)]
    if not isinstance(source, BlendSource):
        return []
    found = []
    for part in source.parts:
        if part.log is not None:
            own = task if part.task is None else build_task(part.task, policy.tokenizer)
            found.append(build_dataset(part.log, own, seed, part.name))
    return found


def _stage_of(checkpoint: Path, run: Path) -> str:
    """The stage that a run's checkpoint belongs to."""
    parts = checkpoint.resolve().relative_to(run.resolve()).parts
    return parts[1] if len(parts) > 1 and parts[0] == "stages" else MAIN_STAGE
