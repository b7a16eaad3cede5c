"""Episodes on disk: read lazily from any format of rows.py, written as Parquet shards or JSONL."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from lmrl.atomic_files import SCRATCH, replacing
from lmrl.errors import DataError, RunError, counted
from lmrl.trajectories.encoding import strings
from lmrl.trajectories.files import Selection, open_rows
from lmrl.trajectories.parquet import write_parquet
from lmrl.trajectories.readers import JsonLines, Malformed, Row, Rows
from lmrl.trajectories.render import Renderer
from lmrl.trajectories.rows import fingerprint, in_contexts, is_dialogue, parse, prompts_of, render, to_row
from lmrl.trajectories.trajectory import Trajectory, prompt_text, start_key

SHARD_EPISODES = 1000
UNMATCHED = "none of its prompts is held out by task.prompts.holdout, so no row is left out"
VOCABULARY_ROWS = 10_000
"""Number of rows from whose text a model built from scratch takes its vocabulary."""
PROBED = 64
"""Number of rows that show whether tokens were played in the contexts of the task."""
SHARDS = "data-*.parquet"


class DatasetFile:
    """Logged episodes on disk, in any format that rows.py reads.

    Opening reads all rows once and checks their text; an episode is read and tokenised on access. Failed episodes are
    left out, and so are those with a prompt whose keys (see Renderer.keys) include one in `without` (held out for
    evaluation).

    max_tokens: also leave out longer episodes, which requires tokenising all once. scored: keys of prompts that a suite
    scores; a note counts their episodes. positions: tokens that the model has positions for; longer episodes are left
    out. as_shown: give the actions of episodes with tokens the contexts of `renderer` and `history`, if the first PROBED
    rows say that these are others.

    skip_bad_rows: count malformed rows and write them to `bad_rows`, one JSON object per line, instead of raising
    DataError with file, line, field and what was expected.
    """

    def __init__(
        self,
        path: str,
        renderer: Renderer,
        history: int | str = "all",
        part: Selection = Selection(),
        without: Collection[str] = (),
        skip_bad_rows: bool = False,
        bad_rows: Path | None = None,
        max_tokens: int | None = None,
        scored: Collection[str] = (),
        positions: int | None = None,
        as_shown: bool = False,
    ):
        self.path, self.renderer, self.history, self.max_tokens = path, renderer, history, max_tokens
        self.positions = positions
        self.tokenizer = fingerprint(renderer.tokenizer)
        self.rows = open_rows(path, part)
        self.returns: list[float | None] = []
        self.measures: dict[str, array[Any]] = {}
        """Components and metrics by name, of the episodes that have them."""
        self.measured: dict[str, array[Any]] = {}
        """Index of the episode that each value in `measures` belongs to."""
        self.notes: list[str] = []
        self.needs_template = False
        """True if there are dialogues to render."""
        self.equal_pairs: list[int] = []
        """Numbers of the rows whose chosen and rejected are the same."""
        self.groups = array("q")
        """Group number of each episode: episodes of one prompt and start state share it, and can be compared."""
        self.draws = array("q")
        """Number of each episode's draw of a start state: one state may have been drawn several times."""
        self._index, self._parts = array("q"), array("b")
        self._heldout: list[tuple[int, int, int]] = []
        self.moves = as_shown and any(map(self._is_elsewhere, islice(self.rows.scan(), PROBED)))
        """True if the tokens were played in other contexts, and are moved to this task's."""
        self._scan(without, skip_bad_rows, bad_rows, scored)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Trajectory:
        return self._read(self._index[index], self._parts[index])

    def where(self, index: int) -> str:
        """The file and the line (or row) of an episode."""
        return self.rows.where(self._index[index])

    @property
    def has_pairs(self) -> bool:
        """True if rows are pairs of a chosen and a rejected episode."""
        return any(self._parts)

    def heldout(self, groups: int | None = None) -> list[Trajectory]:
        """The episodes of held-out prompts, of the first `groups` prompts (None: of all), numbered by prompt."""
        numbers = {key: number for number, key in enumerate(dict.fromkeys(key for *_, key in self._heldout))}
        return [
            replace(self._read(row, part), group=numbers[key])
            for row, part, key in self._heldout
            if groups is None or numbers[key] < groups
        ]

    def kept_rows(self) -> Iterator[Row]:
        """The rows of its episodes, as the file has them."""
        return (self.rows[number] for number in dict.fromkeys(self._index))

    def _read(self, row: int, part: int) -> Trajectory:
        try:
            return self._rendered(parse(self.rows[row], row, self.tokenizer)[part])
        except Malformed as error:
            raise DataError(f"{self.rows.where(row)}: {error}") from error

    def _rendered(self, episode: Trajectory) -> Trajectory:
        episode = in_contexts(episode, self.renderer, self.history) if self.moves else episode
        return render(episode, self.renderer, self.history)

    def _is_elsewhere(self, row: Row | Malformed) -> bool:
        """True if a row holds tokens that were played in other contexts than `renderer` and `history` give."""
        try:
            episodes = [] if isinstance(row, Malformed) else parse(row, 0, self.tokenizer)
        except Malformed:
            return False
        return any(in_contexts(one, self.renderer, self.history) is not one for one in episodes if one.segments)

    def _scan(
        self, without: Collection[str], skip_bad_rows: bool, bad_rows: Path | None, scored: Collection[str]
    ) -> None:
        failed, turnless, heldout, long, beyond, shared = 0, 0, 0, 0, 0, 0
        bad: list[tuple[int, str]] = []
        for number, part, row, episode in self._parsed(bad if skip_bad_rows else None):
            if episode.failure is not None:
                failed += 1
            elif not episode.turns:
                turnless += 1
            elif (length := self._length(episode)) > (self.positions or math.inf):
                beyond += 1
            elif length > (self.max_tokens or math.inf):
                long += 1
            elif without and self._is_among(without, row, episode):
                heldout += 1
                self._heldout.append((number, part, _group(row, number, episode)))
            else:
                shared += bool(scored) and self._is_among(scored, row, episode)
                self._keep(number, part, episode)
                self.groups.append(_group(row, number, episode))
                self.draws.append(hash((str(row.get("group")), episode.prompt)))
        counts = [
            (len(bad), f"malformed {self.rows.unit}", f"(see {bad_rows})" if bad_rows else ""),
            (failed, "episode", "that failed when played"),
            (turnless, "side", "of a game that ended before the side had a turn"),
            (heldout, "episode", "of held-out prompts (task.prompts.holdout)"),
            (long, "episode", f"of more than {self.max_tokens} tokens"),
            (beyond, "episode", f"of more than the {self.positions} tokens that the model has positions for"),
        ]
        if self.moves:
            self.notes.append(
                f"{self.path}: was played in other contexts than the task shows (history, chat or system): the actions' tokens "
                "are kept, and their contexts are rendered again"
            )
        self.notes += [
            f"{self.path}: left out {counted(count, one)} {which}".rstrip() for count, one, which in counts if count
        ]
        if without and not heldout:
            self.notes.append(f"{self.path}: {UNMATCHED}")
        if shared:
            self.notes.append(
                f"warning: {self.path}: the prompts of {counted(shared, 'episode')} are also in evaluation.suite, so the suite's "
                "scores flatter the policy: take them out of one of the files"
            )
        if bad and bad_rows is not None:
            report_bad_rows(self.rows, bad, bad_rows)
        if not len(self):
            reasons = "; ".join(self.notes)
            raise DataError(
                f"no episode is left to train on; {reasons}: add rows, or relax the options that leave them out"
            )

    def _parsed(self, bad: list[tuple[int, str]] | None) -> Iterator[tuple[int, int, Row, Trajectory]]:
        """Each episode with its row's number, its place in the row, and the row. bad: gets malformed rows and what is
        wrong with them (None: raise DataError)."""
        for number, row in enumerate(self.rows.scan()):
            try:
                if isinstance(row, Malformed):
                    raise row
                episodes = parse(row, number, self.tokenizer)
            except Malformed as error:
                if bad is None:
                    raise DataError(f"{self.rows.where(number)}: {error}") from error
                bad.append((number, str(error)))
                continue
            if len(episodes) == 2 and episodes[0].completion == episodes[1].completion:
                self.equal_pairs.append(number)
            for part, episode in enumerate(episodes):
                yield number, part, row, episode

    def _keep(self, number: int, part: int, episode: Trajectory) -> None:
        self._index.append(number)
        self._parts.append(part)
        self.returns.append(episode.reward)
        self.needs_template |= is_dialogue(episode) and not episode.segments
        for name, value in {**episode.components, **episode.metrics}.items():
            if value is not None:
                self.measures.setdefault(name, array("d")).append(value)
                self.measured.setdefault(name, array("q")).append(len(self) - 1)

    def _is_among(self, keys: Collection[str], row: Row, episode: Trajectory) -> bool:
        """True if one of its prompts has one of these keys."""
        stated = row.get("text" if row.get("prompt") is None else "prompt")
        prompts = [*([stated] if isinstance(stated, str) else []), *prompts_of(episode)]
        return any(not self.renderer.keys(prompt).isdisjoint(keys) for prompt in prompts)

    def _length(self, episode: Trajectory) -> int:
        """Tokens of its longest segment, or an upper bound if that is within both limits."""
        if self.max_tokens is None and (self.positions is None or self._surely_fits(episode)):
            return 0
        segments = self._rendered(episode).segments
        return max((len(segment.tokens) for segment in segments), default=0)

    def _surely_fits(self, episode: Trajectory) -> bool:
        """True if it is too short to need tokenising: a token has at least one byte."""
        if episode.segments:
            return False
        texts = strings([[turn.observation, turn.action, turn.message] for turn in episode.turns])
        size = sum(len(text.encode("utf-8", "replace")) for text in texts)
        return size + self._frame * (len(episode.turns) + 1) <= (self.positions or 0)

    @cached_property
    def _frame(self) -> int:
        """Maximum number of tokens that opening a segment and closing a turn add to the text."""
        encoder = self.renderer.encoder  # not the renderer, which would report "a" where the vocabulary lacks it
        openings = [encoder.encode(encoder.content("a"), True)]
        if self.renderer.tokenizer.chat_template:
            openings.append(self.renderer.first([{"role": "user", "content": "a"}]))
        return 2 * max(map(len, openings)) + 16


def report_bad_rows(rows: Rows, bad: list[tuple[int, str]], target: Path) -> None:
    """Write malformed rows (number and error) to a file, one JSON object per line."""
    with open(target, "w", encoding="utf-8") as file:
        for number, reason in bad:
            name, line = rows.place(number)
            file.write(_json_line({"file": name, "line": line, "reason": reason, "row": rows.text(number)}))


def dataset_texts(path: str, part: Selection = Selection()) -> list[str]:
    """Observations and actions of the first VOCABULARY_ROWS rows; DatasetFile reports malformed rows."""
    texts: list[str] = []
    for number, row in enumerate(islice(open_rows(path, part).scan(), VOCABULARY_ROWS)):
        try:
            episodes = [] if isinstance(row, Malformed) else parse(row, number)
        except Malformed:
            continue
        for episode in episodes:
            said = [text for turn in episode.turns for text in (turn.observation, turn.action) if isinstance(text, str)]
            texts += [episode.prompt, *said, prompt_text(episode.final_observation or "")]
    return texts


def _group(row: Row, number: int, episode: Trajectory) -> int:
    """A number shared by the episodes that can be compared: a pair, or those that begin alike."""
    if row.get("chosen") is not None:
        return hash(number)
    return hash(start_key(episode, row.get("group")))


# --------------------------------------------------------------------------------------------------------------- writing
class EpisodeWriter:
    """Writes episodes as they arrive: a folder of Parquet shards, or one file if `path` ends in .jsonl.

    A shard appears by one rename, so every file is complete, and no more than a shard is held in memory.
    tokenizer: its fingerprint, to write tokens as well as text. force: replace the episodes of an earlier writer.
    """

    def __init__(
        self, path: Path, tokenizer: str | None = None, shard_episodes: int = SHARD_EPISODES, force: bool = False
    ):
        check_destination(path, force)
        self.path, self.tokenizer, self.shard_episodes = path, tokenizer, shard_episodes
        self._rows: list[Row] = []
        self._shards = 0
        self._file: TextIO | None = None
        self._begun = False

    def write(self, trajectories: Sequence[Trajectory]) -> None:
        if not self._begun:  # only now, so that nothing is created or replaced if no episode can be played
            self._begin()
        rows = [to_row(trajectory, self.tokenizer) for trajectory in trajectories]
        if self._file:
            self._file.writelines(map(_json_line, rows))
            self._file.flush()
            return
        self._rows += rows
        while len(self._rows) >= self.shard_episodes:
            self._write_shard(self._rows[: self.shard_episodes])
            self._rows = self._rows[self.shard_episodes :]

    def close(self) -> None:
        if self._file:
            self._file.close()
        elif self._rows:
            self._write_shard(self._rows)
            self._rows = []

    def _begin(self) -> None:
        path, self._begun = self.path, True
        try:
            (path.parent if is_jsonl(path) else path).mkdir(parents=True, exist_ok=True)
            self._file = open(path, "w", encoding="utf-8") if is_jsonl(path) else None  # noqa: SIM115
        except OSError as error:
            raise RunError(f"{path}: cannot be written: {error.strerror}") from error
        for old in [] if self._file else [*path.glob(SHARDS), *path.glob(SCRATCH + "*")]:
            old.unlink()

    def _write_shard(self, rows: list[Row]) -> None:
        with replacing(self.path / f"data-{self._shards:05d}.parquet") as scratch:
            write_parquet(scratch, rows)
        self._shards += 1

    def __enter__(self) -> EpisodeWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()  # even after an error, the episodes so far are complete


def is_jsonl(path: Path) -> bool:
    return path.suffix == ".jsonl"


def check_destination(path: Path, force: bool = False) -> None:
    """Raise RunError if episodes cannot be written to `path` without losing something."""
    if not is_jsonl(path) and path.suffix in (".parquet", ".json", ".csv", ".gz"):
        raise RunError(f"{path}: expected a folder (for Parquet shards) or a name that ends in .jsonl")
    if is_jsonl(path) and path.is_dir() or not is_jsonl(path) and path.is_file():
        raise RunError(f"{path} is a {'folder' if path.is_dir() else 'file'}: choose another destination")
    if is_jsonl(path) and path.exists() and not force:
        raise RunError(f"{path} exists: choose another destination, or overwrite it with --force")
    if path.is_dir():
        found = {*path.iterdir()}
        if found - {*path.glob(SHARDS), *path.glob(SCRATCH + "*")}:
            raise RunError(f"{path} holds files other than episodes: choose another destination")
        if found and not force:
            raise RunError(f"{path} exists: choose another destination, or overwrite it with --force")


def write_episodes(path: Path, trajectories: Sequence[Trajectory], tokenizer: Any) -> None:
    """Write episodes with their tokens to one file, .jsonl or .parquet."""
    rows = [to_row(trajectory, fingerprint(tokenizer)) for trajectory in trajectories]
    if is_jsonl(path):
        path.write_text("".join(map(_json_line, rows)), encoding="utf-8")
    else:
        write_parquet(path, rows)


def read_episodes(path: Path, tokenizer: Any) -> list[Trajectory]:
    """All episodes of a file as they were written, token by token.

    Raises DataError if they hold tokens of another tokenizer.
    """
    import pyarrow.parquet

    # Not with `datasets`, which would leave a copy of every file in its cache.
    rows = list(JsonLines(path)) if is_jsonl(path) else pyarrow.parquet.read_table(path).to_pylist()
    own = fingerprint(tokenizer)
    if any(row["tokenizer"] != own for row in rows):
        raise DataError(f"{path}: holds tokens of another tokenizer")
    return [trajectory for row in rows for trajectory in parse(row, 0, own)]


def _json_line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"
