"""Make the files and folders that a recipe names absolute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmrl.errors import DataError, PluginError
from lmrl.local_names import refuse_missing
from lmrl.plugins.objects import is_object
from lmrl.recipe import STAGE_PREFIX
from lmrl.recipe.document import dotted
from lmrl.recipe.steps import as_suites
from lmrl.recipe.task import as_rewards
from lmrl.shipped import shipped

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".gz")


def find_file(name: str, recipe_folder: Path, key: str) -> str:
    """Absolute path of a file that a recipe names: in the current folder, the recipe's, or that of the shipped recipes."""
    folders, path = [Path.cwd(), recipe_folder, shipped("recipes")], Path(name).expanduser()
    for folder in folders:
        if (folder / path).exists():
            return str((folder / path).resolve())
    looked = ", ".join(dict.fromkeys(str(folder) for folder in folders))
    raise DataError(f"{key}: file '{name}' does not exist (looked in {looked})")


def resolve_files(data: Any, recipe_folder: Path, place: tuple[str, ...] = ()) -> None:
    """Make the files that plain recipe data name absolute, in place, so that a run resumes from any folder.

    place: keys of the data in the recipe, if they are a stage or a part of a blend.
    """

    def at(*keys: str) -> str:
        return dotted((*place, *keys))

    def resolve(resolver: Callable[[str, Path, str], str], *keys: str) -> None:
        section = data
        for key in keys[:-1]:
            section = section.get(key) if isinstance(section, dict) else None
        name = section.get(keys[-1]) if isinstance(section, dict) else None
        if isinstance(name, str) and not is_object(name):
            section[keys[-1]] = resolver(name, recipe_folder, at(*keys))

    resolve(_model_path, "model", "path")
    resolve(_data_path, "task", "prompts", "path")
    resolve(_data_path, "task", "prompts", "shots", "path")
    resolve(_data_path, "source", "path")
    resolve(_data_path, "log", "path")
    resolve(_plugin_path, "task", "environment")
    for opponent in ("opponent", "opponent_in_evaluation"):
        resolve(_player_path, "task", opponent)
        resolve(_player_path, "task", opponent, "player")
    resolve(_plugin_path, "task", "agent")
    resolve(_data_path, "task", "data")
    resolve(_plugin_path, "objective", "name")
    resolve(_plugin_path, "source", "name")
    resolve(_plugin_path, "rollouts", "engine")
    resolve(_suite_path, "evaluation", "suite")
    evaluation: Any = data.get("evaluation") if isinstance(data, dict) else None
    others = evaluation.get("before_after") if isinstance(evaluation, dict) else None
    if isinstance(evaluation, dict) and isinstance(others, list):
        evaluation["before_after"] = as_suites(others)
        for one in evaluation["before_after"]:
            resolve_files({"evaluation": one}, recipe_folder, place)
    for keys in (("training", "listeners"), ("tracking", "trackers")):
        _resolve_items(data, keys, recipe_folder, at(*keys))
    source = data.get("source") if isinstance(data, dict) else None
    parts = source.get("parts") if isinstance(source, dict) else None
    for index, part in enumerate(parts if isinstance(parts, list) else ()):
        resolve_files(part, recipe_folder, (*place, "source", "parts", str(index)))
    task = data.get("task") if isinstance(data, dict) else None
    if isinstance(task, dict):
        _resolve_lists_of_task(task, recipe_folder, at("task"))


def _resolve_lists_of_task(task: dict[str, Any], recipe_folder: Path, key: str) -> None:
    """Make the files in lists of a recipe's `task` absolute, in place: tools, the agent's command, rewards."""
    if isinstance(task.get("tools"), list):
        task["tools"] = [
            _plugin_path(one, recipe_folder, f"{key}.tools.{index}")
            if isinstance(one, str)
            else _server_path(one, recipe_folder)
            for index, one in enumerate(task["tools"])
        ]
    if isinstance(task.get("agent_command"), list):
        task["agent_command"] = [_beside(part, recipe_folder) for part in task["agent_command"]]
    if "rewards" in task:
        task["rewards"] = as_rewards(task["rewards"])
    rewards = task.get("rewards")
    for index, reward in enumerate(rewards if isinstance(rewards, list) else ()):
        if not isinstance(reward, dict):
            continue
        function, model = reward.get("function"), reward.get("model")
        if isinstance(function, str):
            reward["function"] = _plugin_path(function, recipe_folder, f"{key}.rewards.{index}.function")
        if isinstance(model, str):
            reward["model"] = _reward_model(model, recipe_folder, f"{key}.rewards.{index}.model")
        elif isinstance(model, list):
            reward["model"] = [_reward_model(one, recipe_folder, f"{key}.rewards.{index}.model") for one in model]


def _server_path(tool: Any, recipe_folder: Path) -> Any:
    """An MCP server with the files of its command made absolute."""
    server = tool.get("mcp") if isinstance(tool, dict) else None
    if not isinstance(server, dict) or not isinstance(server.get("command"), list):
        return tool
    return tool | {"mcp": server | {"command": [_beside(part, recipe_folder) for part in server["command"]]}}


def _beside(part: Any, recipe_folder: Path) -> Any:
    """A part of a command, made absolute if it is a file in the current or the recipe's folder. Programs on PATH stay names."""
    if isinstance(part, str) and ("/" in part or "." in part):
        for place in (Path.cwd(), recipe_folder):
            if (file := place / Path(part).expanduser()).is_file():
                return str(file.absolute())
    return part


def _resolve_items(data: Any, keys: tuple[str, str], recipe_folder: Path, place: str) -> None:
    """Make absolute the files that items of a list name as code. place: the list's key in the recipe."""
    section = data.get(keys[0]) if isinstance(data, dict) else None
    items = section.get(keys[1]) if isinstance(section, dict) else None
    if not isinstance(items, list):
        return
    for index, item in enumerate(items):
        if isinstance(item, dict) and isinstance(item.get("name"), str):
            item["name"] = _plugin_path(item["name"], recipe_folder, f"{place}.{index}.name")
        elif isinstance(item, str):
            items[index] = _plugin_path(item, recipe_folder, f"{place}.{index}")


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith(DATA_SUFFIXES)


def _model_path(name: str, recipe_folder: Path, key: str) -> str:
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    for place in (Path(name), recipe_folder / name):
        if place.exists():
            return str(place.resolve())
    refuse_missing(name, key)
    return name


def _player_path(name: str, recipe_folder: Path, key: str) -> str:
    """An opponent's run or model folder; a name without `/` or `.` in it may be a scripted player."""
    path = Path(name).expanduser()
    found = (place / path for place in (Path.cwd(), recipe_folder) if (place / path).exists())
    return str(next(found, name)) if "/" in name or name.startswith((".", "~")) else name


def _reward_model(name: Any, recipe_folder: Path, key: str) -> Any:
    is_path = isinstance(name, str) and not name.startswith(STAGE_PREFIX)
    return _model_path(name, recipe_folder, key) if is_path else name


def _data_path(name: str, recipe_folder: Path, key: str) -> str:
    if _looks_local(name) or Path(name).exists() or (recipe_folder / name).exists():
        return find_file(name, recipe_folder, key)
    refuse_missing(name, key, "dataset")
    return name


def _suite_path(name: str, recipe_folder: Path, key: str) -> str:
    """A suite's file in the current or the recipe's folder; anything else is a shipped name."""
    return find_file(name, recipe_folder, key) if name.endswith((".yaml", ".yml")) else name


def _plugin_path(name: str, recipe_folder: Path, key: str) -> str:
    file, colon, attribute = name.rpartition(":")
    if colon and file.endswith(".py"):
        try:
            return f"{find_file(file, recipe_folder, key)}:{attribute}"
        except DataError as error:
            raise PluginError(str(error)) from error
    library = name.partition(":")[0]
    if colon and "/" in file and ("/" in library or "." in library):  # LIBRARY:ID takes any ID, such as an address
        raise PluginError(f"{key}: '{name}' should be file.py:name or a dotted path")
    return name
