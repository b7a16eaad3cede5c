"""Batches: trajectories flattened into the tensors that an objective computes on.

Every per-action quantity is a flat tensor over action tokens, so that objectives need neither masks nor padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from functools import partial

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from lmrl import distributed
from lmrl.accelerators import to_device
from lmrl.trajectories.allowed import Allowed, AllowedTokens, shifted
from lmrl.trajectories.trajectory import CONTEXT, TOKENS, Segment, Trajectory

VECTORS = "vectors"
"""Field with the actions themselves, (A, dimensions), if they are not tokens."""


@dataclass
class Sequence:
    """One segment. `states` are the positions that predict the `targets`: both have one entry per action token,
    (A,)."""

    tokens: torch.Tensor
    states: torch.Tensor
    targets: torch.Tensor
    fields: dict[str, torch.Tensor] = field(default_factory=dict)
    """Per action token, shape (A,): advantages, returns, old log-probabilities and the like."""
    chain: int | None = None
    """Sequences of one chain (see chain.py) stay together, in order."""
    branches: torch.Tensor | None = None
    """Branch of each token of a packed sequence (see shared.py): 0 for the shared beginning, n for its nth
    continuation, (T,)."""
    zero_gradient: bool = False
    """True if its gradient is exactly zero: it is counted in the loss and skipped in the forward pass."""
    allowed: dict[int, AllowedTokens] = field(default_factory=dict)
    """The tokens that each action was chosen from, by its index (0 to A - 1); missing ones had the whole vocabulary."""
    kind: str = TOKENS
    """What the actions are (see `Segment.kind`)."""

    def drop_last_action(self) -> None:
        """Remove the last action, such as a pseudo-action whose value is known by now."""
        self.states, self.targets = self.states[:-1], self.targets[:-1]
        self.fields = {name: values[:-1] for name, values in self.fields.items()}
        self.allowed.pop(len(self.targets), None)

    @property
    def positions(self) -> torch.Tensor:
        """Position of each token, within its own continuation if there are several, (T,)."""
        places = torch.arange(self.tokens.numel())
        if self.branches is None:
            return places
        starts = torch.ones_like(self.branches, dtype=torch.bool)
        starts[1:] = self.branches[1:] != self.branches[:-1]
        begins = torch.where(starts, places, 0).cummax(0).values
        return places - begins + torch.where(self.branches > 0, (self.branches == 0).sum(), 0)


@dataclass
class Packing:
    """The layout of sequences end to end in one row, as attention needs it: within each part, queries see the keys up
    to themselves. A part is a sequence, or one continuation of several that share a beginning, with the beginning among
    its keys."""

    query_ends: torch.Tensor
    """Cumulative ends of the parts' queries, starting with 0, int32."""
    key_ends: torch.Tensor
    longest_query: int
    longest_key: int
    key_tokens: torch.Tensor | None
    """The index in the row of each key's token; None: in order."""

    @classmethod
    def of(cls, sequences: list[Sequence]) -> Packing:
        queries, keys, tokens, first = [], [], [], 0
        for sequence in sequences:
            size = sequence.tokens.numel()
            own = torch.zeros(size, dtype=torch.long) if sequence.branches is None else sequence.branches
            parts = own.unique_consecutive(return_counts=True)[1].tolist()
            shared = torch.arange(first, first + parts[0])
            begins = first
            for part in parts:
                before = shared[
                    : begins - first
                ]  # the whole beginning, except for the part that is the beginning itself
                queries.append(part)
                keys.append(len(before) + part)
                tokens += [before, torch.arange(begins, begins + part)]
                begins += part
            first += size
        plain = queries == keys
        ends = [torch.tensor([0, *sizes]).cumsum(0).int() for sizes in (queries, keys)]
        return cls(ends[0], ends[1], max(queries), max(keys), None if plain else torch.cat(tokens))


@dataclass
class Microbatch:
    """Sequences for one pass, each in its own row and padded on the right, or all in one row end to end (`packing`).

    Suffixes: B rows, T tokens, N action tokens in all.
    """

    tokens_BT: torch.Tensor
    mask_BT: torch.Tensor
    rows_N: torch.Tensor
    cols_N: torch.Tensor
    targets_N: torch.Tensor
    fields: dict[str, torch.Tensor]
    indices: list[int]
    """Indices of these sequences in the batch."""
    lengths: list[int]
    """Action tokens of each sequence."""
    branches_BT: torch.Tensor | None = None
    """If sequences share a beginning: the continuation that each token belongs to; -1 for padding."""
    positions_BT: torch.Tensor | None = None
    """Position of each token, if it differs from its column."""
    packing: Packing | None = None
    allowed: Allowed | None = None
    """What restricted actions were chosen from; None if none is restricted."""
    kind: str = TOKENS

    @property
    def shape(self) -> tuple[int, int]:
        """Number of sequences, and tokens of the longest; approximate if some share a beginning."""
        return len(self.indices), self.packing.longest_key if self.packing else self.tokens_BT.shape[1]

    def to(self, device: torch.device) -> Microbatch:
        """Move to a device, with copies that overlap other work on an accelerator."""
        moved = partial(to_device, device=device)
        for name in ("tokens_BT", "mask_BT", "rows_N", "cols_N", "targets_N"):
            setattr(self, name, moved(getattr(self, name)))
        if self.branches_BT is not None:
            self.branches_BT = moved(self.branches_BT)
        if self.positions_BT is not None:
            self.positions_BT = moved(self.positions_BT)
        if (packing := self.packing) is not None:
            packing.query_ends, packing.key_ends = moved(packing.query_ends), moved(packing.key_ends)
            packing.key_tokens = None if packing.key_tokens is None else moved(packing.key_tokens)
        if (allowed := self.allowed) is not None:
            self.allowed = Allowed(*(moved(getattr(allowed, part.name)) for part in dataclass_fields(allowed)))
        self.fields = {name: moved(value) for name, value in self.fields.items()}
        return self


@dataclass
class Batch:
    sequences: list[Sequence]
    stats: dict[str, float] = field(default_factory=dict)
    """Metrics that `prepare` measured over the whole batch."""

    @property
    def num_actions(self) -> int:
        return sum(self.lengths)

    def set(self, name: str, values_N: torch.Tensor) -> None:
        """Store a quantity of the action tokens, (N,) in the batch's order, split over the sequences."""
        for sequence, part in zip(self.sequences, values_N.split(self.lengths), strict=True):
            sequence.fields[name] = part

    def get(self, name: str) -> torch.Tensor:
        """A quantity of the action tokens, (N,) in the batch's order."""
        parts = [sequence.fields[name] for sequence in self.sequences]
        return torch.cat(parts) if parts else torch.zeros(0)

    @property
    def fields(self) -> dict[str, torch.Tensor]:
        """All quantities of the action tokens, (N,) each in the batch's order."""
        return {name: self.get(name) for name in (self.sequences[0].fields if self.sequences else ())}

    @property
    def lengths(self) -> list[int]:
        """Action tokens of each sequence."""
        return [sequence.targets.numel() for sequence in self.sequences]

    def split_by_gradient(self) -> tuple[Batch, Batch]:
        """The sequences with a gradient, and those without. If none has one, the first is returned as active, so that
        an update always has a pass."""
        zero_gradient = [sequence for sequence in self.sequences if sequence.zero_gradient]
        active = [sequence for sequence in self.sequences if not sequence.zero_gradient]
        return (Batch(active), Batch(zero_gradient)) if active else (Batch(zero_gradient[:1]), Batch(zero_gradient[1:]))

    def minibatches(self, rng: np.random.Generator, count: int) -> Iterator[Batch]:
        """Split at random into `count` parts with nearly equally many chains (fewer parts if there are fewer chains).

        Each of several processes splits its own batch, into as many parts as the others.
        """
        chains = self.chains()
        order = rng.permutation(len(chains))
        for part in np.array_split(order, min(count, distributed.all_max(len(order)))):
            yield Batch([self.sequences[index] for chain in part for index in chains[chain]])

    def chains(self) -> list[list[int]]:
        """Indices of the sequences that stay together; a sequence without a chain is a group by itself."""
        chains: list[list[int]] = []
        for index, sequence in enumerate(self.sequences):
            if chains and sequence.chain is not None and sequence.chain == self.sequences[index - 1].chain:
                chains[-1].append(index)
            else:
                chains.append([index])
        return chains

    def microbatches(self, max_tokens: int, pad_id: int, packed: bool = False) -> list[Microbatch]:
        """Sort by length and cut where the size, with padding, would exceed `max_tokens`; a long chain may be a
        microbatch by itself.

        packed: sequences end to end, without padding.
        """
        sizes = [sequence.tokens.numel() for sequence in self.sequences]

        def width(chain: list[int]) -> int:
            return max(sizes[index] for index in chain)

        parts: list[list[int]] = []
        size = widest = 0
        for chain in sorted(self.chains(), key=width):
            widest, own = max(widest, width(chain)), sum(sizes[index] for index in chain)
            larger = size + own if packed else widest * (len(parts[-1]) + len(chain)) if parts else 0
            if parts and larger <= max_tokens:
                parts[-1] += chain
                size += own
            else:
                parts.append(list(chain))
                widest, size = width(chain), own
        return [self.collate(part, pad_id, packed) for part in parts]

    def collate(self, indices: list[int], pad_id: int, packed: bool = False) -> Microbatch:
        """One microbatch of these sequences. Raises ValueError if their actions are of different kinds."""
        chosen = [self.sequences[index] for index in indices]
        kinds = {sequence.kind for sequence in chosen}
        if len(kinds) > 1:
            raise ValueError(f"a batch has actions of one kind, not of several: {', '.join(sorted(kinds))}")
        lengths = [sequence.targets.numel() for sequence in chosen]
        sizes = [sequence.tokens.numel() for sequence in chosen]
        rows_N = torch.repeat_interleave(torch.arange(len(chosen)), torch.tensor(lengths))
        cols_N = torch.cat([sequence.states for sequence in chosen])
        branches = positions = None
        if any(sequence.branches is not None for sequence in chosen):
            own = [torch.zeros_like(one.tokens) if one.branches is None else one.branches for one in chosen]
            branches = torch.cat(own)[None] if packed else pad_sequence(own, batch_first=True, padding_value=-1)
        if packed or branches is not None:
            places = [sequence.positions for sequence in chosen]
            positions = torch.cat(places)[None] if packed else pad_sequence(places, batch_first=True)
        if packed:
            tokens = torch.cat([sequence.tokens for sequence in chosen])[None]
            mask = torch.ones_like(tokens)
            starts = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
            rows_N, cols_N = torch.zeros_like(rows_N), cols_N + starts[rows_N]
        else:
            tokens = pad_sequence([sequence.tokens for sequence in chosen], batch_first=True, padding_value=pad_id)
            mask = (torch.arange(tokens.shape[1]) < torch.tensor(sizes)[:, None]).long()
        return Microbatch(
            tokens_BT=tokens,
            mask_BT=mask,
            rows_N=rows_N,
            cols_N=cols_N,
            targets_N=torch.cat([sequence.targets for sequence in chosen]),
            fields={name: torch.cat([sequence.fields[name] for sequence in chosen]) for name in chosen[0].fields},
            indices=indices,
            lengths=lengths,
            branches_BT=branches,
            positions_BT=positions,
            packing=Packing.of(chosen) if packed else None,
            allowed=Allowed.of(shifted([sequence.allowed for sequence in chosen], lengths)),
            kind=kinds.pop(),
        )


def to_sequence(segment: Segment, bootstrap: bool = False) -> Sequence:
    """Flatten a segment; with `bootstrap`, a last pseudo-action asks for the value of the state after its last token.

    Raises ValueError if the segment begins with an action token: nothing could predict it.
    """
    if segment.turns and segment.turns[0] != CONTEXT:
        raise ValueError("a segment begins with an action token; it needs context before it")
    tokens = torch.tensor(segment.tokens, dtype=torch.long)
    places = segment.actions
    actions = torch.tensor(places, dtype=torch.long)
    states, targets = actions - 1, tokens[actions]
    if bootstrap:
        states = torch.cat([states, torch.tensor([len(tokens) - 1])])
        targets = torch.cat([targets, torch.zeros(1, dtype=torch.long)])
    sequence = Sequence(tokens, states, targets, kind=segment.kind)
    if segment.allowed:
        numbers = {place: number for number, place in enumerate(places)}
        sequence.allowed = {numbers[place]: allowed for place, allowed in segment.allowed.items()}
    if segment.vectors:
        vectors = [segment.vectors[place] for place in places]
        vectors += [(0.0,) * len(vectors[0])] if bootstrap else []
        sequence.fields[VECTORS] = torch.tensor(vectors)
    return sequence


def to_batch(trajectories: list[Trajectory]) -> Batch:
    """One sequence per segment that holds actions, in order."""
    return Batch(
        [to_sequence(segment) for trajectory in trajectories for segment in trajectory.segments if segment.actions]
    )


def contexts_batch(contexts: Iterable[list[int]]) -> Batch:
    """Contexts to be continued, as sequences without actions."""
    none = torch.zeros(0, dtype=torch.long)
    return Batch([Sequence(torch.tensor(tokens, dtype=torch.long), none, none) for tokens in contexts])
