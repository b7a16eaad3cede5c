"""Random streams that depend only on the position in the run, not on earlier draws.

Every draw in lmrl comes from a stream named by (seed, stage, step, ...). A resumed run therefore draws the same
numbers without any generator state in the checkpoint.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np


def key(*names: int | str) -> int:
    """A 128-bit integer derived from a sequence of names."""
    digest = hashlib.blake2b("\x1f".join(map(str, names)).encode(), digest_size=16)
    return int.from_bytes(digest.digest(), "little")


def stream(*names: int | str) -> np.random.Generator:
    """The random stream of that name."""
    return np.random.Generator(np.random.Philox(key=key(*names)))


def seed_everything(*names: int | str) -> None:
    """Seed Python's, numpy's and torch's global generators (dropout, user code) from the stream of that name."""
    import torch

    seed = key(*names) % 2**63
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
