"""A spike: continuous actions through lmrl's own objectives and updater. A policy whose actions are points, and a game for it to play.

Only the policy and the play are here; PPO, GRPO, batches, the updater and the value head are those of the library.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from lmrl.policy.heads import HeadsSpec
from lmrl.policy.load import load_policy
from lmrl.policy.passes import ForwardRequest, Outputs
from lmrl.policy.policy import Policy
from lmrl.recipe import Model
from lmrl.trajectories.batch import VECTORS, Batch, Microbatch, contexts_batch
from lmrl.trajectories.trajectory import Segment, Trajectory, Turn
from tests.conftest import TINY_LLAMA

KIND = "gaussian"
TARGETS = {"a": (1.0, 0.0), "b": (-1.0, 0.5), "c": (0.0, -1.0)}
TURNS = 2
TINY = TINY_LLAMA | {"num_hidden_layers": 1}


class GaussianPolicy(Policy):
    """A language model reads the observations; a linear head on its hidden states gives the mean of a normal distribution."""

    def __init__(self, model: nn.Module, tokenizer: Any, dimensions: int = 2):
        super().__init__(model, tokenizer, HeadsSpec())
        self.mean = nn.Linear(self.vocabulary.shape[1], dimensions)
        self.log_std = nn.Parameter(torch.full((dimensions,), -1.0))
        nn.init.zeros_(self.mean.weight)
        nn.init.zeros_(self.mean.bias)
        self.packs = self.shares_prompts = False

    def forward(
        self, batch: Microbatch, request: ForwardRequest = ForwardRequest(), reference: bool = False
    ) -> Outputs:
        assert batch.kind == KIND and not reference
        hidden_ND = self._hidden(batch)
        outputs = Outputs(values=self.values.value(hidden_ND)[0] if request.values else None)
        if request.logprobs:
            normal = torch.distributions.Normal(self.mean(hidden_ND), self.log_std.exp())
            outputs.logprobs = normal.log_prob(batch.fields[VECTORS]).sum(-1)
            outputs.entropy = normal.entropy().sum(-1)
        return outputs

    @torch.no_grad()
    def act(self, contexts: list[list[int]], rng: np.random.Generator) -> list[tuple[tuple[float, ...], float]]:
        """An action after each context, and its log-probability."""
        batch = contexts_batch(contexts)
        for sequence, tokens in zip(batch.sequences, contexts, strict=True):
            sequence.states, sequence.targets = torch.tensor([len(tokens) - 1]), torch.zeros(1, dtype=torch.long)
        mean_BK = self.mean(self._hidden(Batch(batch.sequences).collate(list(range(len(contexts))), 0)))
        noise_BK = torch.from_numpy(rng.standard_normal(mean_BK.shape)).float()
        action_BK = mean_BK + self.log_std.exp() * noise_BK
        logprob_B = (-0.5 * noise_BK**2 - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        return [(tuple(one), own) for one, own in zip(action_BK.tolist(), logprob_B.tolist(), strict=True)]

    def _hidden(self, batch: Microbatch) -> torch.Tensor:
        return self.causal_lm.model(input_ids=batch.tokens_BT).last_hidden_state[batch.rows_N, batch.cols_N]


def new_policy() -> GaussianPolicy:
    torch.manual_seed(0)
    plain = load_policy(Model(config=dict(TINY)), texts=lambda: ["abcx"])
    return GaussianPolicy(plain.model, plain.tokenizer)


def play(policy: GaussianPolicy, groups: int, samples: int, rng: np.random.Generator, cut: bool) -> list[Trajectory]:
    """Reach a target: named by a letter, approached by two moves; each move earns by how much nearer it comes.

    cut: episodes end by a limit, so that the value of their last state counts.
    """
    names = [list(TARGETS)[group % len(TARGETS)] for group in range(groups) for _ in range(samples)]
    opening = {name: policy.tokenizer(name).input_ids for name in TARGETS}
    trajectories = [
        Trajectory([Segment()], name, "", terminated=not cut, group=number // samples, episode=number)
        for number, name in enumerate(names)
    ]
    places = np.zeros((len(names), 2))
    for turn in range(TURNS):
        for one, name in zip(trajectories, names, strict=True):
            one.segments[0].observe(opening[name])
        moves = policy.act([one.segments[0].tokens for one in trajectories], rng)
        for number, (one, name, (move, logprob)) in enumerate(zip(trajectories, names, moves, strict=True)):
            before = np.linalg.norm(places[number] - TARGETS[name])
            places[number] += move
            earned = before - np.linalg.norm(places[number] - TARGETS[name])
            one.segments[0].act_vector(KIND, move, logprob, turn)
            one.turns.append(Turn(name, str(move)))
            one.place_reward(float(earned), turn)
            one.reward += float(earned)
    if cut:
        for one, name in zip(trajectories, names, strict=True):
            one.segments[0].observe(opening[name])
    return trajectories
