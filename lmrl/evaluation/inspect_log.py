"""Evaluation logs in the format of inspect_ai (its JSON, version 2), for `inspect view` and its data frames.

Written without the inspect_ai package, which lmrl does not need; a test reads the files with the package's own reader.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from lmrl.atomic_files import write_atomically
from lmrl.errors import RunError
from lmrl.evaluation.contenders import folder_name
from lmrl.evaluation.log import EvalLog, in_order, logs_in
from lmrl.evaluation.scoring import Scores, named_values
from lmrl.trajectories.readers import Row
from lmrl.trajectories.trajectory import Trajectory, as_messages

VERSION = 2
TARGETS = ("target", "answer", "solution")
"""Columns that may hold the target answer; the first one present is taken."""


def export_inspect(log: str | Path, folder: Path) -> list[Path]:
    """Write a log, or all logs in a folder, as files that inspect_ai opens; returns their names.

    Raises RunError if a log is incomplete, or `folder` is a file.
    """
    if folder.is_file():
        raise RunError(f"--inspect: {folder} is a file, name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for label, one in in_order(logs_in(log)):
        path = folder / file_name(one, label)
        write_atomically(path, json.dumps(inspect_log(one), ensure_ascii=False, indent=1) + "\n")
        written.append(path)
    return written


def file_name(log: EvalLog, label: str) -> str:
    """A name by which inspect_ai finds the file in its folder: TIME_TASK_MODEL_ID.json."""
    suite = log.header["suite"]
    parts = (log.header["begun"].replace(":", "-"), Path(suite["name"]).name, label, suite["version"])
    return "_".join(folder_name(part).replace("_", "-") for part in parts) + ".json"


def inspect_log(log: EvalLog) -> dict[str, Any]:
    """A complete log as inspect_ai's EvalLog, as plain data."""
    header, rows, trajectories = log.header, log.rows(), log.trajectories()
    scores, _ = log.scores()
    model = f"lmrl/{header['policy']['name']}"
    samples = [_sample(row, one, header["samples"], model) for row, one in zip(rows, trajectories, strict=True)]
    failed = sum("error" in sample for sample in samples)
    used = _summed(sample["model_usage"] for sample in samples)
    return {
        "version": VERSION,
        "status": "success",
        "eval": {
            "eval_id": folder_name(f"{header['suite']['version']}-{header['policy']['hash']}"),
            "created": header["begun"],
            "task": header["suite"]["name"],
            "task_id": header["suite"]["version"],
            "task_version": header["suite"]["version"],
            "dataset": {"name": header["suite"]["name"], "samples": len(header["starts"])},
            "model": model,
            "model_args": {"path": header["policy"]["path"], "hash": header["policy"]["hash"], **header["sampling"]},
            "config": {"epochs": header["samples"]},
            "packages": {name: version for name, version in header["made_by"]["packages"].items() if version},
            "metadata": {"suite": header["suite"]["resolved"], "engine": header["engine"], "seed": header["seed"]},
        },
        "plan": {"name": "lmrl"},
        "results": {
            "total_samples": len(samples),
            "completed_samples": len(samples) - failed,
            "scores": _results(scores),
        },
        "stats": {"started_at": rows[0]["began"], "completed_at": _ended(rows[-1]), "model_usage": used},
        "samples": samples,
    }


def _sample(row: Row, trajectory: Trajectory, samples: int, model: str) -> dict[str, Any]:
    messages = list(dialogue(trajectory))
    said = next((one for one in reversed(messages) if one["role"] == "assistant"), None)
    cut = bool(trajectory.turns) and len(trajectory.turns) - 1 in trajectory.cut_turns
    choices = [{"message": said, "stop_reason": "max_tokens" if cut else "stop"}] if said else []
    sampled = [(one, place) for one in trajectory.segments for place in one.actions]
    context = sum(len(one.tokens) for one in trajectory.segments) - len(sampled)
    usage = {"input_tokens": context, "output_tokens": len(sampled), "total_tokens": context + len(sampled)}
    sample = {
        "id": trajectory.group + 1,
        "epoch": trajectory.episode % samples + 1,
        "input": trajectory.messages or trajectory.prompt,
        "target": target(trajectory.columns),
        "messages": messages,
        "output": {"model": model, "choices": choices},
        "scores": {
            name: {"value": value, "answer": trajectory.completion}
            for name, value in named_values(trajectory)
            if value is not None
        },
        "metadata": {
            "columns": trajectory.columns,
            "start": trajectory.start,
            "seed": trajectory.seed,
            "tokens": [one.tokens[place] for one, place in sampled],
            "logprobs": [one.logprobs[place] for one, place in sampled],
        },
        "model_usage": {model: usage},
        "started_at": row["began"],
        "completed_at": _ended(row),
        "total_time": row["seconds"],
    }
    if trajectory.failure is not None:
        sample["error"] = {"message": trajectory.failure, "traceback": "", "traceback_ansi": ""}
    return sample


def target(columns: Mapping[str, Any]) -> str | list[str]:
    """The target answer, or several of them; "" if there is none."""
    found = next((columns[name] for name in TARGETS if columns.get(name) is not None), "")
    return [str(one) for one in found] if isinstance(found, list) else str(found)


def dialogue(trajectory: Trajectory) -> Iterator[dict[str, Any]]:
    """The episode as a dialogue; tool calls in inspect_ai's form."""
    for turn in trajectory.turns:
        yield from map(_message, as_messages(turn.observation) if turn.observation else ())
        yield _message(turn.message or {"role": "assistant", "content": turn.action})


def _message(message: dict[str, Any]) -> dict[str, Any]:
    role = "system" if message["role"] == "developer" else message["role"]
    plain = {"role": role, "content": message["content"]}
    if role == "tool":
        plain |= {"tool_call_id": message.get("tool_call_id"), "function": message.get("name")}
    calls = [
        {
            "id": call.get("id", str(number)),
            "type": "function",
            "function": call["function"]["name"],
            "arguments": call["function"]["arguments"],
        }
        for number, call in enumerate(message.get("tool_calls") or ())
    ]
    return plain | ({"tool_calls": calls} if calls else {})


def _results(scores: Scores) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "scorer": name,
            "scored_samples": score["n"],
            "metrics": {
                metric: {"name": metric, "value": value}
                for metric, value in zip(
                    ("mean", "ci95_low", "ci95_high"), (score["mean"], *score["ci95"]), strict=True
                )
            },
            "metadata": {"clusters": score["clusters"], "holds_for": score["holds_for"]},
        }
        for name, score in scores.items()
    ]


def _summed(usages: Iterator[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = {}
    for usage in usages:
        for model, counts in usage.items():
            own = total.setdefault(model, dict.fromkeys(counts, 0))
            for name, count in counts.items():
                own[name] += count
    return total


def _ended(row: Row) -> str:
    return (datetime.fromisoformat(row["began"]) + timedelta(seconds=row["seconds"])).isoformat(timespec="milliseconds")
