"""Objects of a Python program in place of files: functions, environments, rows and models, named `python:NAME` in
recipes.

    lmrl.train("grpo", model=model, prompts=rows, rewards=my_reward)    # recipe.yaml says function: python:my_reward

A name is valid only in this process. A run that is resumed in another one needs its objects again: repeat the call with
`resume=True`, or call `lmrl.provide(my_reward=my_reward)`.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from lmrl.errors import RecipeError

PREFIX = "python:"
PLACES = {
    ("model", "path"): "model",
    ("task", "environment"): "environment",
    ("task", "prompts", "path"): "rows",
    ("source", "path"): "rows",
}
"""Keys that take an object, besides the functions of `task.rewards`, and its kind."""

PLAIN = (str, bytes, int, float)
IN_CLASSES = (*PLAIN, staticmethod, classmethod)
NOT_DONE = ("__module__", "__qualname__", "__doc__", "__firstlineno__")
"""Attributes of a class that say nothing about what it does."""

_provided: dict[str, Any] = {}


def provide(**objects: Any) -> None:
    """Make objects known in this process by the names under which recipes and run folders ask for them,
    `python:NAME`."""
    _provided.update(objects)


def is_object(name: Any) -> bool:
    """True for the name of an object, `python:NAME`."""
    return isinstance(name, str) and name.startswith(PREFIX)


def find(name: str, key: str) -> Any:
    """The object of a name `python:NAME`. key: the recipe's key, for messages. Raises RecipeError if this process does
    not have it."""
    short = name.removeprefix(PREFIX)
    if short not in _provided:
        raise RecipeError(_missing([(key, name)]))
    return _provided[short]


def require(data: Mapping[str, Any], at_hand: Collection[str] = ()) -> None:
    """Raise RecipeError if plain recipe data name objects that this process does not have. at_hand: keys that need
    none."""
    missing = [
        (key, name)
        for key, name in _named(data)
        if name.removeprefix(PREFIX) not in _provided and not key.endswith(tuple(at_hand))
    ]
    if missing:
        raise RecipeError(_missing(list(dict.fromkeys(missing))))


def _missing(wanted: list[tuple[str, str]]) -> str:
    names = list(dict.fromkeys(name.removeprefix(PREFIX) for _, name in wanted))
    which = ", ".join(f"'{name}' ({key})" for key, name in wanted)
    return (
        f"{which}: an object of a Python program, which is not in any file: pass it again, with the call of lmrl.train that started the "
        f"run and resume=True, or with lmrl.provide({', '.join(f'{name}=...' for name in names)})"
    )


def maker(thing: Any) -> Any:
    """A function that makes an environment: a class or function unchanged; for an environment object, one that copies
    it."""
    if inspect.isclass(thing) or inspect.isroutine(thing):
        return thing
    return lambda: copy.deepcopy(thing)


# ------------------------------------------------------------------------------------------------------------------ naming
class Names:
    """Names of one recipe's objects: each object gets a single, unique name."""

    def __init__(self, taken: Mapping[str, Any] | None = None) -> None:
        self.objects: dict[str, Any] = dict(taken or {})

    def __call__(self, thing: Any) -> str:
        """The name `python:NAME` of an object, which becomes known in this process."""
        base = _name_of(thing)
        name, number = base, 1
        while name in self.objects and self.objects[name] is not thing:
            number += 1
            name = f"{base}_{number}"
        self.objects[name] = thing
        provide(**{name: thing})
        return PREFIX + name


def name_alone(thing: Any) -> str:
    """A unique name for an object that is named before its recipe is known."""
    return Names(_provided)(thing)


def _name_of(thing: Any) -> str:
    """A descriptive name of an object; for rows, one that depends on their content."""
    if isinstance(thing, tuple):  # a (model, tokenizer) pair
        return _name_of(thing[0])
    if is_rows(thing):
        return f"rows_{_fingerprint(thing)}"
    name = getattr(thing, "__name__", None) or type(thing).__name__
    return re.sub(r"\W+", "", name) or "object"


def _fingerprint(rows: Any) -> str:
    if hasattr(rows, "_fingerprint"):  # of datasets.Dataset, which may be larger than memory
        return str(rows._fingerprint)[:8]
    data = rows.to_json(orient="records") if hasattr(rows, "to_json") else json.dumps(rows, sort_keys=True, default=str)
    return hashlib.sha256(data.encode()).hexdigest()[:8]


def content_of(name: str) -> str | None:
    """A hash of what the object of a name does, the same in every process; None: this process does not have it.

    It is that of a function's or class's code, with the numbers and texts that it holds: defaults, what it has closed
    over, attributes. Other code that it calls does not count. The name of rows says their content already.
    """
    thing = _provided.get(name.removeprefix(PREFIX))
    if thing is None:
        return None
    if is_rows(thing) or is_kind(thing, "model"):  # of which the run keeps a copy
        return name
    return hashlib.sha256(repr(_traits(thing, set())).encode()).hexdigest()


def _traits(thing: Any, seen: set[int]) -> Any:
    """What an object does, as plain data. seen: ids of functions, classes and other objects that it names already."""

    def each(parts: Iterable[Any]) -> list[Any]:
        return [_traits(part, seen) for part in parts]

    if thing is None or isinstance(thing, PLAIN):
        return repr(thing)
    if isinstance(thing, tuple):
        return each(thing)
    if isinstance(thing, frozenset):  # its order differs between processes
        return sorted(map(repr, each(thing)))
    if inspect.iscode(thing):
        return [thing.co_code, thing.co_names, *each(thing.co_consts)]
    if isinstance(thing, staticmethod | classmethod):
        return each([thing.__func__])
    if inspect.ismethod(thing):
        return each([thing.__func__, thing.__self__])
    if isinstance(thing, partial):
        return each([thing.func, thing.args, *thing.keywords.values()])
    name = getattr(thing, "__qualname__", None)
    if id(thing) in seen or inspect.isclass(thing) and thing.__module__ == "builtins":
        return name
    seen.add(id(thing))
    if inspect.isfunction(thing):
        closed_over = (cell.cell_contents for cell in thing.__closure__ or ())
        return each([thing.__code__, thing.__defaults__, *(thing.__kwdefaults__ or {}).values(), *closed_over])
    held = {key: one for key, one in getattr(thing, "__dict__", {}).items() if key not in NOT_DONE}
    if inspect.isclass(thing):
        kept = {key: one for key, one in held.items() if callable(one) or isinstance(one, IN_CLASSES)}
        bases = [base for base in thing.__bases__ if base.__module__ == thing.__module__]
        return [*kept, *each([*kept.values(), *bases])]
    kept = {key: one for key, one in held.items() if isinstance(one, PLAIN)}
    return [name, *kept, *each([type(thing), *kept.values()])]


def is_rows(thing: Any) -> bool:
    """True for rows of data: a list of mappings, a datasets.Dataset, a pandas data frame."""
    if isinstance(thing, list):
        return bool(thing) and all(isinstance(row, Mapping) for row in thing)
    # Neither splits by name, which also have column names, nor a stream without a length.
    table = hasattr(thing, "column_names") and hasattr(thing, "__len__") and not isinstance(thing, Mapping)
    return table or hasattr(thing, "iterrows")


def is_kind(thing: Any, kind: str) -> bool:
    """True for an object that a key of that kind takes (see PLACES); the schema refuses anything else."""
    if kind == "rows":
        return is_rows(thing)
    if kind == "model":
        return hasattr(thing, "save_pretrained") or isinstance(thing, tuple)
    return callable(thing) or hasattr(thing, "reset")


def by_name(kind: str) -> Any:
    """A function that replaces an object of that kind by its name, and returns anything else unchanged."""
    return lambda value: name_alone(value) if is_kind(value, kind) else value


def with_names(data: Mapping[str, Any], names: Names | None = None) -> dict[str, Any]:
    """A copy of plain recipe data, with names in place of its objects."""
    names, named = names or Names(), {key: value for key, value in data.items()}
    for keys, kind in PLACES.items():
        _replace(named, keys, kind, names)
    if isinstance(task := named.get("task"), dict) and "rewards" in task:
        named["task"] = task | {"rewards": named_rewards(task["rewards"], names)}
    source = named.get("source")
    if isinstance(source, dict) and isinstance(source.get("parts"), list):
        named["source"] = source | {"parts": [_named_part(part, names) for part in source["parts"]]}
    if isinstance(stages := named.get("stages"), dict):
        named["stages"] = {
            name: with_names(stage, names) if isinstance(stage, dict) else stage for name, stage in stages.items()
        }
    return {key: _copied(value) for key, value in named.items()}


def _named_part(part: Any, names: Names) -> Any:
    """A part of source `blend`, whose task and log take objects as a recipe's do."""
    if not isinstance(part, dict):
        return part
    inner = with_names({"task": part.get("task"), "source": part.get("log")}, names)
    given = {"task": inner["task"], "log": inner["source"]}
    return part | {key: value for key, value in given.items() if value is not None}


def _replace(section: dict[str, Any], keys: tuple[str, ...], kind: str, names: Names) -> None:
    key, *rest = keys
    value = section.get(key)
    if not rest and is_kind(value, kind):
        section[key] = names(value)
    elif rest and isinstance(value, dict):
        section[key] = dict(value)
        _replace(section[key], tuple(rest), kind, names)
    elif rest == ["path"] and is_kind(value, kind):
        section[key] = {"path": names(value)}  # `prompts: rows` is short for `prompts: {path: rows}`


def named_rewards(given: Any, names: Any = name_alone) -> Any:
    """Rewards with names in place of functions; a list of them, or a single one."""
    if isinstance(given, list | tuple):
        return [named_rewards(one, names) for one in given]
    if isinstance(given, dict):
        function = given.get("function")
        return given | {"function": names(function)} if callable(function) else given
    return {"function": names(given)} if callable(given) else given


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return [_copied(one) for one in value] if isinstance(value, list) else value


def _named(data: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Keys of plain recipe data that name objects, and the names."""
    for keys in PLACES:
        value: Any = data
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if is_object(value):
            yield above + ".".join(keys), value
    task = data.get("task")
    rewards = task.get("rewards") if isinstance(task, dict) else None
    for index, reward in enumerate(rewards if isinstance(rewards, list) else ()):
        if isinstance(reward, dict) and is_object(reward.get("function")):
            yield f"{above}task.rewards.{index}.function", reward["function"]
    source = data.get("source")
    for index, part in enumerate(source.get("parts") or () if isinstance(source, dict) else ()):
        where = f"{above}source.parts.{index}."
        yield from _named({"task": part.get("task")}, where)
        path = (part.get("log") or {}).get("path")
        if isinstance(path, str) and is_object(path):
            yield f"{where}log.path", path
    for name, stage in (data.get("stages") or {}).items():
        yield from _named(stage, f"{above}stages.{name}.")
