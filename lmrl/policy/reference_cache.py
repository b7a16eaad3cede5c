"""A frozen reference's log-probabilities of logged episodes, kept on disk across runs.

One file per model, with one JSON line per episode: appending is safe, and a line torn by a kill is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from lmrl.policy.policy import Policy
from lmrl.trajectories.batch import to_batch
from lmrl.trajectories.trajectory import Trajectory

ORIGIN = ("_name_or_path", "transformers_version")
"""Entries of a configuration that say where a model comes from."""


def cache_folder() -> Path:
    """`LMRL_CACHE`, or `~/.cache/lmrl`."""
    return Path(os.environ.get("LMRL_CACHE") or Path.home() / ".cache" / "lmrl")


def model_key(policy: Policy) -> str:
    """A hash of all current weights, of the arithmetic, and of the configuration, which says what else is computed."""
    digest = hashlib.blake2b(str((policy.causal_lm.dtype, policy.autocast_dtype)).encode(), digest_size=16)
    settings = {name: value for name, value in policy.causal_lm.config.to_dict().items() if name not in ORIGIN}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in policy.model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def episode_key(trajectory: Trajectory) -> str:
    """A hash of an episode's tokens, of which of them are actions, and of what restricted ones were chosen from."""
    digest = hashlib.blake2b(digest_size=16)
    for segment in trajectory.segments:
        restricted = [sorted(segment.allowed.items())] if segment.allowed else []
        digest.update(json.dumps([segment.tokens, segment.actions, *restricted]).encode())
    return digest.hexdigest()


class ReferenceCache:
    """Sums of log-probabilities over the action tokens of episodes, by the model with this key."""

    def __init__(self, key: str):
        self.key = key
        self.path = cache_folder() / "reference" / f"{key}.jsonl"
        self.sums: dict[str, float] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                entry = json.loads(line)
                self.sums[entry["episode"]] = float(entry["logprob"])
            except (ValueError, KeyError, TypeError):
                continue

    def missing(self, trajectories: Iterable[Trajectory]) -> list[Trajectory]:
        return [one for one in trajectories if episode_key(one) not in self.sums]

    def add(self, policy: Policy, trajectories: list[Trajectory]) -> None:
        """Compute the missing episodes with the current policy."""
        if not trajectories:
            return
        logprobs = iter(policy.score(to_batch(trajectories))["logprobs"])
        found = {}
        for one in trajectories:
            segments = sum(1 for segment in one.segments if segment.actions)
            found[episode_key(one)] = sum(float(next(logprobs).double().sum()) for _ in range(segments))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"episode": key, "logprob": value}) for key, value in found.items()]
        with open(self.path, "a") as file:  # starts on a new line, even after a torn one
            file.write("".join(f"\n{line}" for line in lines))
        self.sums |= found

    def __getitem__(self, trajectory: Trajectory) -> float:
        return self.sums[episode_key(trajectory)]
