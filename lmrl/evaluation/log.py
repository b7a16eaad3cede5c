"""Evaluation logs: a folder with everything that a score is computed from.

    eval.json       what is evaluated, and how: suite with its version, policy with its hash, engine, sampling, start states
    samples.jsonl   one line per episode: lmrl's row (see trajectories/rows.py), free-form fields as JSON text, and
                    prompt, completion    as text
                    began, seconds        when its part was played, and how long that took
    scores.json     every metric with its interval, once all is played

Episodes are played and written in parts. A part is written in one call and synced to disk; a part that a killed
evaluation left incomplete is cut off and played again with the same random numbers.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lmrl import distributed
from lmrl.atomic_files import write_atomically
from lmrl.errors import DataError, RunError
from lmrl.evaluation.evaluate import Evaluator
from lmrl.evaluation.identity import policy_hash, suite_version
from lmrl.evaluation.scoring import Scores, Scoring
from lmrl.evaluation.suites import Suite
from lmrl.recipe.document import Document
from lmrl.recipe.validation import validate
from lmrl.rewards.rewards import drop_failed
from lmrl.run import describe_machine
from lmrl.secrets import check_no_secrets
from lmrl.trajectories.parquet import flat_row
from lmrl.trajectories.readers import JsonLines, Malformed, Row
from lmrl.trajectories.rows import fingerprint, parse, to_row
from lmrl.trajectories.trajectory import Trajectory

HEADER_FILE, EPISODES_FILE, SCORES_FILE = "eval.json", "samples.jsonl", "scores.json"
FORMAT = 1
PART_ON_CPU, PART = 64, 256
"""Episodes of a part, which are played together: fewer if they are slow, so that a kill loses less work."""
SAME = ("suite.version", "policy.hash", "engine", "sampling", "starts", "samples", "seed", "tokenizer")
"""What a log must have in common with the evaluation that resumes it."""
NEW = ("suite", "scoring", "max_failed")
"""What the evaluation that resumes a log may change: how its episodes are scored."""


class EvalLog:
    """A log on disk, complete or not."""

    def __init__(self, folder: str | Path):
        """Raises RunError if there is none."""
        self.folder = Path(folder).expanduser()
        if not is_log(self.folder):
            raise RunError(f"{folder} is not an evaluation log: it holds no {HEADER_FILE}")
        try:
            self.header: dict[str, Any] = json.loads((self.folder / HEADER_FILE).read_text())
            if self.header["format"] > FORMAT:
                raise RunError(f"{folder} was written by a newer version of lmrl: install that to read it")
        except (ValueError, KeyError) as error:
            raise RunError(f"{self.folder / HEADER_FILE} cannot be read: {error}") from error

    @property
    def episodes(self) -> int:
        """The number of episodes once all have been played."""
        return len(self.header["starts"]) * int(self.header["samples"])

    @property
    def policy(self) -> str:
        return str(self.header["policy"]["label"])

    @property
    def suite(self) -> Suite:
        return validate(Suite, Document(self.header["suite"]["resolved"], self.folder / HEADER_FILE))

    @property
    def scoring(self) -> Scoring:
        return Scoring.read(self.header["scoring"])

    def rows(self) -> list[Row]:
        path = self.folder / EPISODES_FILE
        return list(JsonLines(path)) if path.is_file() else []

    def trajectories(self) -> list[Trajectory]:
        """All episodes as they were played, token by token, including failed ones."""
        return [self._trajectory(number, row) for number, row in enumerate(self.rows(), start=1)]

    def _trajectory(self, number: int, row: Row) -> Trajectory:
        try:
            (trajectory,) = parse(row, number, row.get("tokenizer"))
        except Malformed as error:
            raise DataError(f"{self.folder / EPISODES_FILE}, line {number}: {error}") from error
        return trajectory

    def complete(self) -> list[Trajectory]:
        """All episodes, as `trajectories`. Raises RunError if not all were played."""
        trajectories = self.trajectories()
        if len(trajectories) != self.episodes:
            raise RunError(
                f"{self.folder} holds {len(trajectories)} of {self.episodes} episodes: resume it with the command that began it"
            )
        return trajectories

    def judged(self) -> list[Trajectory]:
        """The judged episodes. Raises RunError if not all were played."""
        header = self.header
        return drop_failed(self.complete(), header["max_failed"], header["judged_by"], header["environment"])

    def scores(self) -> tuple[Scores, list[Trajectory]]:
        """Every metric with its interval, from the episodes themselves."""
        trajectories = self.judged()
        return self.scoring.report(trajectories), trajectories


def is_log(folder: Path) -> bool:
    return (folder / HEADER_FILE).is_file()


def logs_in(folder: str | Path) -> list[EvalLog]:
    """The log in a folder, or those in its subfolders, by name. Raises RunError if there is none."""
    folder = Path(folder).expanduser()
    if is_log(folder):
        return [EvalLog(folder)]
    found = [EvalLog(one) for one in sorted(folder.iterdir()) if is_log(one)] if folder.is_dir() else []
    if not found:
        raise RunError(f"{folder} is not an evaluation log: it holds no {HEADER_FILE}")
    return found


# --------------------------------------------------------------------------------------------------------------- writing
class LogWriter:
    """Appends parts of an evaluation to a log, new or resumed. Only one process may write to a log."""

    def __init__(self, folder: Path, header: dict[str, Any]):
        """Raises RunError for a log of another evaluation, and for a folder that holds something else."""
        self.folder = folder
        if folder.is_dir() and not is_log(folder) and any(one.name != ".lock" for one in folder.iterdir()):
            raise RunError(f"--log: {folder} exists and is not an evaluation log: choose another folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"--log: cannot make the folder {folder}: {error.strerror}") from error
        self._lock = open(folder / ".lock", "w")  # noqa: SIM115 - held until the evaluation ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"--log: another process is writing to {folder}") from error
        if is_log(folder):
            self.log = EvalLog(folder)
            _check_same(self.log, header)
            header = self.log.header | {key: header[key] for key in NEW}
        write_atomically(folder / HEADER_FILE, json.dumps(header, indent=2, ensure_ascii=False) + "\n")
        self.log = EvalLog(folder)
        self.part = self.log.header["part"]
        self.parts_done = self._cut()
        self._file = open(folder / EPISODES_FILE, "ab")  # noqa: SIM115

    def write(self, rows: Sequence[Row]) -> None:
        """Append a part in one call, and sync it to disk."""
        text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        self._file.write(text.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._lock.close()

    def _cut(self) -> int:
        """Cut off what follows the last complete part; return how many complete parts there are."""
        path = self.folder / EPISODES_FILE
        if not path.exists():
            return 0
        starts, samples = len(self.log.header["starts"]), self.log.header["samples"]
        bounds = {
            min(first + self.part, starts) * samples: first // self.part + 1 for first in range(0, starts, self.part)
        }
        done = size = end = count = 0
        with open(path, "rb+") as file:
            for line in file:
                end += len(line)
                if not _is_episode(line, count):
                    break
                count += 1
                if count in bounds:
                    done, size = bounds[count], end
            file.truncate(size)
            os.fsync(file.fileno())
        return done


def _is_episode(line: bytes, number: int) -> bool:
    """True for a whole line with the episode of that number."""
    try:
        return line.endswith(b"\n") and json.loads(line)["episode"] == number
    except (ValueError, KeyError, TypeError):
        return False


def _check_same(log: EvalLog, header: dict[str, Any]) -> None:
    for key in SAME:
        old, new = log.header, header
        for part in key.split("."):
            old, new = old[part], new[part]
        if old != new:
            what = f" ({old} in the log, {new} now)" if isinstance(old, str) else ""
            raise RunError(
                f"--log: {log.folder} holds another evaluation, its {key} differs{what}: choose another folder"
            )


def play_into_log(
    evaluator: Evaluator,
    folder: Path,
    policy: Mapping[str, Any],
    beta: float | None = None,
    part_episodes: int | None = None,
) -> tuple[Scores, list[Trajectory]]:
    """Play a suite, or the rest of it, part by part into a log; scores and judged episodes come from the log.

    policy: `{"name", "label", "path"}`. part_episodes: for a new log, about how many episodes are played together and
    written at once. Raises RunError for a log of another evaluation.
    """
    header = header_of(evaluator, policy, beta, part_episodes)
    with contextlib.ExitStack() as stack:
        writer = LogWriter(folder, header) if distributed.is_main() else None
        if writer:
            stack.callback(writer.close)  # after an error too, so that this process can resume the log
        done, width = distributed.broadcast((writer.parts_done, writer.part) if writer else (0, 0))
        starts = evaluator.starts()
        for first in range(done * width, len(starts), width):
            began, clock = datetime.now(UTC), time.monotonic()
            played = evaluator.play(starts[first : first + width], first, beta)
            rows = [episode_row(one, header["tokenizer"]) for one in played]
            rows = distributed.all_gather(rows)
            if writer:
                times = {"began": began.isoformat(timespec="milliseconds"), "seconds": time.monotonic() - clock}
                writer.write([row | times for row in rows])
        scores, trajectories = distributed.broadcast(EvalLog(folder).scores() if writer else ({}, []))
        if writer:
            write_scores(folder, scores)
    return scores, trajectories


def write_scores(folder: Path, scores: Scores) -> None:
    write_atomically(folder / SCORES_FILE, json.dumps(scores, indent=2) + "\n")


def episode_row(trajectory: Trajectory, tokenizer: str | None) -> Row:
    """A line of a log, without its times."""
    texts = {"prompt": trajectory.prompt, "completion": trajectory.completion}
    return texts | flat_row(to_row(trajectory, tokenizer))


def header_of(
    evaluator: Evaluator, policy: Mapping[str, Any], beta: float | None, part_episodes: int | None
) -> dict[str, Any]:
    """The log's header: what is evaluated, and how. Raises RecipeError for a suite that holds a secret."""
    suite, task = evaluator.suite, evaluator.task
    check_no_secrets(suite)
    usual = PART_ON_CPU if evaluator.policy.device.type == "cpu" else PART
    commit = getattr(getattr(evaluator.policy.causal_lm, "config", None), "_commit_hash", None)
    return {
        "format": FORMAT,
        "suite": {
            "name": evaluator.name,
            "version": suite_version(suite, task.environment),
            "resolved": suite.model_dump(mode="json"),
        },
        "policy": {**policy, "hash": policy_hash(policy["path"], commit)},
        "engine": {"name": getattr(evaluator.engine, "kind", suite.rollouts.engine), "options": suite.rollouts.options},
        "sampling": {**vars(evaluator.sampling_at(beta)), "stop": list(evaluator.sampling.stop)},
        "scoring": evaluator.scoring().to_plain(),
        "judged_by": task.judged_by,
        "max_failed": task.max_failed,
        "environment": task.environment["name"] if task.environment else None,
        "played": evaluator.played,
        "starts": evaluator.starts(),
        "samples": suite.samples,
        "seed": suite.seed,
        "part": max((part_episodes or usual) // suite.samples, 1),
        "tokenizer": fingerprint(evaluator.policy.tokenizer),
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "made_by": describe_machine(),
    }


def in_order(logs: Sequence[EvalLog]) -> Iterator[tuple[str, EvalLog]]:
    """Logs by the label of their policy; if two share a label, the folder's name makes it unique."""
    labels = [log.policy for log in logs]
    for log in logs:
        yield log.policy if labels.count(log.policy) == 1 else log.folder.name, log
