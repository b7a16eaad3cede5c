"""Episodes in Parquet: one schema for all, with free-form fields as JSON text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmrl.trajectories.files import quiet_datasets
from lmrl.trajectories.readers import Row


def flat_row(row: Row) -> Row:
    """A row in the common schema of all episodes: free-form fields become JSON text."""
    texts = {name: json.dumps(row[name], default=str) for name in ("metrics", "components", "columns", "game")}
    return row | texts | _message_texts(row)


def episode_features(datasets: Any) -> dict[str, Any]:
    """The columns of flat rows, for `datasets`."""
    value, many = datasets.Value, datasets.List
    return {
        "group": value("int64"),
        "episode": value("int64"),
        "seed": value("int64"),
        "start": value("int64"),
        "player": value("string"),
        "game": value("string"),
        "prompt_messages": many(
            {name: value("string") for name in ("role", "content", "tool_calls", "tool_call_id", "name")}
        ),
        "turns": many(
            {
                "observation": value("string"),
                "action": value("string"),
                "reward": value("float64"),
                "cut": value("bool"),
                "messages": value("string"),
                "message": value("string"),
            }
        ),
        "final_observation": value("string"),
        "terminated": value("bool"),
        "reward": value("float64"),
        "metrics": value("string"),
        "components": value("string"),
        "failure": value("string"),
        "columns": value("string"),
        "tokenizer": value("string"),
        "segments": many(
            {
                "tokens": many(value("int32")),
                "turns": many(value("int32")),
                "logprobs": many(value("float64")),
                "rewards": many(value("float64")),
                "allowed": {
                    "places": many(value("int32")),
                    "sets": many(value("int32")),
                    "table": many(many(value("int32"))),
                },
            }
        ),
    }


def write_parquet(path: Path, rows: list[Row]) -> None:
    """Write rows of episodes (see rows.py) to one file."""
    datasets = quiet_datasets()
    features = datasets.Features(episode_features(datasets))
    whole = list(map(flat_row, rows))
    columns = {name: [row[name] for row in whole] for name in features}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))


def _message_texts(row: Row) -> dict[str, Any]:
    """The messages of a row, with everything but text as JSON."""

    def flat(message: dict[str, Any]) -> dict[str, str | None]:
        calls = message.get("tool_calls")
        names = ("role", "content", "tool_call_id", "name")
        return {name: message.get(name) for name in names} | {"tool_calls": json.dumps(calls) if calls else None}

    turns = [
        turn | {name: json.dumps(turn[name]) if turn.get(name) else None for name in ("messages", "message")}
        for turn in row["turns"]
    ]
    messages = row["prompt_messages"]
    return {"turns": turns, "prompt_messages": None if messages is None else list(map(flat, messages))}
