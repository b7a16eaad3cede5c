"""Completing a batch of prompts over a cache of rows that all end at the same column, or of one row.

For models that `slot_batch.py` does not support: those with sliding windows, with a recurrent state instead of
attention, or with attention that needs its own mask. Every turn is computed anew, and requests that come later wait for
the batch to end. Within a batch, rows are decoded together, and a row that has ended gives its place to the next
prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch

from lmrl.engines.base import Completion, Keys, Sampling, guidance_of
from lmrl.engines.prefixes import WORTHWHILE, shared_beginning
from lmrl.engines.sample_token import restrict, sample_token
from lmrl.engines.slot_queue import REFILL
from lmrl.engines.token_trie import TokenTrie
from lmrl.policy.cache import Cache
from lmrl.seeding import stream
from lmrl.trajectories.allowed import AllowedTokens

if TYPE_CHECKING:
    from lmrl.engines.hf import HFEngine


@dataclass
class _Rows:
    """Running rows. Arrays of shape (R,) or (R, max_new_tokens), one entry per row, in the order of the cache."""

    index_R: np.ndarray
    """Which prompt."""
    length_R: np.ndarray
    """Tokens so far, including the prompt's."""
    count_R: np.ndarray
    """Tokens sampled so far."""
    uniforms_RT: np.ndarray
    tokens_RT: np.ndarray
    logprobs_RT: np.ndarray
    node_R: np.ndarray
    """The node of each in the trie of completions that it may choose from (None: all)."""

    def __len__(self) -> int:
        return len(self.index_R)

    def select(self, rows: np.ndarray) -> _Rows:
        return _Rows(*(getattr(self, field.name)[rows] for field in fields(self)))

    def joined(self, others: _Rows) -> _Rows:
        names = [field.name for field in fields(self)]
        return _Rows(*(np.concatenate([getattr(self, name), getattr(others, name)]) for name in names))


class Wave:
    """Completes a list of prompts. The order of events depends only on prompts, sampling, keys and weights."""

    def __init__(
        self,
        engine: HFEngine,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        keys: Keys,
        allowed: Sequence[TokenTrie | None] | None = None,
    ):
        """allowed: the completions of each prompt to choose from (None: any)."""
        self.engine, self.policy = engine, engine.policy
        self.prompts, self.sampling, self.keys = prompts, sampling, keys
        self.allowed = allowed or [None] * len(prompts)
        self.chosen_from: dict[int, list[AllowedTokens | None]] = {}
        """For each restricted prompt, what its tokens so far were chosen from."""
        # Longest first: neighbours have similar lengths, equal prompts are adjacent, and a lack of memory shows at
        # once.
        self.waiting = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), prompts[index], -index))
        self.done: dict[int, Completion] = {}
        self.eos = np.array(sorted(self.policy.eos_ids), dtype=np.int64)
        self.guidance = guidance_of(self.policy, sampling)
        self.cache = self.policy.new_cache(self.guidance)
        self.rows = self._new_rows([])
        self._compute_beginning()

    def run(self) -> list[Completion]:
        while self.waiting or len(self.rows):
            self.engine.check()
            if self.due():
                self.admit()
            else:
                self.decode()
        return [self.done[index] for index in range(len(self.prompts))]

    def due(self) -> bool:
        """True if waiting prompts should join now: enough places are free, or no row is running."""
        if not self.waiting or not len(self.rows):
            return bool(self.waiting)
        places = self._places()
        return places - len(self.rows) >= max(1, min(len(self.waiting), places // REFILL))

    def admit(self) -> None:
        """Compute the next waiting prompts and sample their first tokens; those that have not ended join the others."""
        found: dict[tuple[int, ...], int] = {}  # distinct prompts, in order of appearance
        chosen: list[tuple[int, int]] = []
        free = self._places() - len(self.rows)
        while self.waiting and len(chosen) < free:
            prompt = tuple(self.prompts[self.waiting[-1]])
            width = len(next(iter(found), prompt)) - self.shared
            if prompt not in found and (len(found) + 1) * width > max(self.policy.microbatch_tokens, width):
                break
            chosen.append((self.waiting.pop(), found.setdefault(prompt, len(found))))
        cache, logits_UV = self._prefill(list(found))
        rows, source_R = self._new_rows([index for index, _ in chosen]), torch.tensor([row for _, row in chosen])
        going = self._take(rows, logits_UV[source_R.to(logits_UV.device)])
        if not len(going):
            return
        self.rows = self.rows.joined(rows.select(going))
        if not self.cache.takes_rows:
            self.cache = cache
            return
        self._expect()
        self.cache.join(cache, source_R[going].to(self.policy.device))
        self._fit()

    def decode(self) -> None:
        """One more token for each running row."""
        rows, device = self.rows, self.policy.device
        latest = rows.tokens_RT[np.arange(len(rows)), rows.count_R - 1]
        length_R = torch.from_numpy(rows.length_R).to(device)
        width = int(rows.length_R.max())
        logits_RV = self.policy.next_token_logits(
            self.cache,
            self.guidance,
            input_ids=torch.from_numpy(latest).to(device)[:, None],
            attention_mask=_left_padded(length_R, width),
            position_ids=length_R[:, None] - 1,
        )
        going = self._take(rows, logits_RV)
        if len(going) == len(rows):
            return
        # Rows beyond the new end move into the places that became free; all others stay where they are.
        count = len(going)
        holes, sources = np.setdiff1d(np.arange(count), going), going[going >= count]
        order = np.arange(count)
        order[holes] = sources
        self.rows = rows.select(order)
        if self.cache.takes_rows:
            self.cache.move(*(torch.from_numpy(part).to(device) for part in (sources, holes)))
            self._fit()
            self._expect()

    def _expect(self) -> None:
        """Let the cache allocate for the running rows and those that can still join them."""
        self.cache.expect(min(self._places(), len(self.rows) + len(self.waiting)))

    def _fit(self) -> None:
        """Let the cache hold only the running rows, in the columns that the longest needs before its latest token."""
        self.cache.trim(len(self.rows), int(self.rows.length_R.max(initial=1)) - 1)

    def _prefill(self, prompts: list[tuple[int, ...]]) -> tuple[Cache, torch.Tensor]:
        """A cache of distinct prompts (longest first), and the logits (U, V) after each."""
        shared, width, device = self.shared, len(prompts[0]) - self.shared, self.policy.device
        tokens_UT = torch.full((len(prompts), width), self.policy.pad_id)
        for row, prompt in enumerate(prompts):
            tokens_UT[row, width - len(prompt) + shared :] = torch.tensor(prompt[shared:])
        length_U = torch.tensor([len(prompt) for prompt in prompts])
        mask_UT = torch.cat([torch.ones(len(prompts), shared).long(), _left_padded(length_U - shared, width)], 1)
        positions_UT = (mask_UT.cumsum(1) - 1).clamp(min=0)[:, shared:]
        cache = self.policy.new_cache(self.guidance)
        if self.beginning is not None:
            cache.join(self.beginning, torch.zeros(len(prompts), dtype=torch.long, device=device))
        logits_UV = self.policy.next_token_logits(
            cache,
            self.guidance,
            input_ids=tokens_UT.to(device),
            attention_mask=mask_UT.to(device),
            position_ids=positions_UT.to(device),
        )
        if self.beginning is not None:  # move it from before the padding to after it
            cache.insert(self.beginning, (shared + width - length_U).to(device))
        return cache, logits_UV

    def _compute_beginning(self) -> None:
        """Compute the `shared` tokens that all prompts begin with, if they are worth a pass."""
        self.shared = shared_beginning(self.prompts)
        if self.shared < WORTHWHILE or not self.cache.takes_gaps:
            self.shared, self.beginning = 0, None
            return
        self.beginning = self.policy.new_cache(self.guidance)
        tokens_1T = torch.tensor([self.prompts[0][: self.shared]], device=self.policy.device)
        positions_1T = torch.arange(self.shared, device=self.policy.device)[None]
        self.policy.next_token_logits(
            self.beginning,
            self.guidance,
            input_ids=tokens_1T,
            attention_mask=torch.ones_like(tokens_1T),
            position_ids=positions_1T,
        )

    def _take(self, rows: _Rows, logits_RV: torch.Tensor) -> np.ndarray:
        """Sample a token for each row, and close those that have ended; returns which rows go on."""
        if logits_RV.device.type == "mps":  # has no float64, which sampling needs
            logits_RV = logits_RV.cpu()
        every = np.arange(len(rows))
        uniforms_R = rows.uniforms_RT[every, rows.count_R]
        sets: list[AllowedTokens | None] = [None if node is None else node.allowed for node in rows.node_R]
        logits_RV = restrict(logits_RV.float(), sets)
        tokens_R, logprobs_R = (part.cpu().numpy() for part in sample_token(logits_RV, self.sampling, uniforms_R))
        rows.tokens_RT[every, rows.count_R], rows.logprobs_RT[every, rows.count_R] = tokens_R, logprobs_R
        rows.count_R += 1
        rows.length_R += 1
        if self.engine.heard is not None:
            self.engine.heard(tokens_R.tolist())
        eos_R = np.isin(tokens_R, self.eos)
        free_R = np.array([node is None for node in rows.node_R], dtype=bool)
        for row in np.flatnonzero(~free_R):
            self.chosen_from.setdefault(int(rows.index_R[row]), []).append(sets[row])
            rows.node_R[row] = rows.node_R[row].children[int(tokens_R[row])]
            eos_R[row] = rows.node_R[row].complete
        stop_R = np.zeros_like(eos_R)
        if self.sampling.stop:
            own = [rows.tokens_RT[row, : rows.count_R[row]] for row in every]
            stop_R = np.array([self.engine.stopped(tokens, self.sampling.stop) for tokens in own]) & ~eos_R & free_R
        full_R = rows.count_R == self.sampling.max_new_tokens
        for row in np.flatnonzero(eos_R | stop_R | full_R):
            count = rows.count_R[row]
            self.done[int(rows.index_R[row])] = Completion(
                rows.tokens_RT[row, :count].tolist(),
                rows.logprobs_RT[row, :count].tolist(),
                "eos" if eos_R[row] else "stop" if stop_R[row] else "length",
                allowed=self.chosen_from.pop(int(rows.index_R[row]), []),
            )
        return np.flatnonzero(~(eos_R | stop_R | full_R))

    def _places(self) -> int:
        """Maximum rows while the next waiting prompt runs: the longest decides, because all are padded to it."""
        if not self.cache.takes_rows:
            return 1
        prompt_R = self.rows.length_R - self.rows.count_R
        longest = max(int(prompt_R.max(initial=0)), len(self.prompts[self.waiting[-1]]) if self.waiting else 0)
        return self.engine.places(longest + self.sampling.max_new_tokens)

    def _new_rows(self, indices: list[int]) -> _Rows:
        shape = (len(indices), self.sampling.max_new_tokens)
        nodes = np.full(len(indices), None, dtype=object)
        for place, index in enumerate(indices):
            trie = self.allowed[index]
            nodes[place] = None if trie is None else trie.root
        uniforms = [stream(*self.keys[index]).random(shape[1]) for index in indices]
        return _Rows(
            index_R=np.array(indices, dtype=np.int64),
            length_R=np.array([len(self.prompts[index]) for index in indices], dtype=np.int64),
            count_R=np.zeros(shape[0], dtype=np.int64),
            uniforms_RT=np.stack(uniforms) if uniforms else np.zeros(shape),
            tokens_RT=np.zeros(shape, dtype=np.int64),
            logprobs_RT=np.zeros(shape, dtype=np.float32),
            node_R=nodes,
        )


def _left_padded(length_B: torch.Tensor, width: int) -> torch.Tensor:
    """The mask (B, width) of rows of these lengths that all end at the last column."""
    return (torch.arange(width, device=length_B.device) >= width - length_B[:, None]).long()
