"""Recipes and suites on disk: finding them, overriding them, and saying in one line what is wrong and where."""

from __future__ import annotations

import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError

from lmrl import registry
from lmrl.errors import DataError, PluginError, RecipeError, did_you_mean
from lmrl.local_names import refuse_missing
from lmrl.recipe import CHOICES, MAIN_STAGE, REWARD_MODEL, STAGE_PREFIX, EpisodeLimits, Recipe, Reward
from lmrl.recipe.methods import check_arguments, spelled_out, take_arguments
from lmrl.recipe.suggestions import suggest
from lmrl.recipe.task import as_rewards
from lmrl.secrets import check_no_secrets
from lmrl.shipped import LAUNCHES, shipped, shipped_file, shipped_names

Keys = tuple[str | int, ...]
Schema = TypeVar("Schema", bound=BaseModel)
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".gz")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-4` as a string; people mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass
class Document:
    """Plain data read from YAML, with the place each key was written at."""

    data: dict[str, Any]
    path: Path | None = None
    places: dict[Keys, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """For the user, once all is found to be right."""

    @property
    def folder(self) -> Path:
        """The folder that relative files are named from."""
        return Path.cwd() if self.path is None else self.path.parent

    def place(self, keys: Keys) -> str:
        """Where a key, what is below it, or its nearest written parent stands."""
        below = [place for known, place in self.places.items() if known[: len(keys)] == keys]
        if keys and keys not in self.places and below:
            return below[0]
        for end in range(len(keys), 0, -1):
            if keys[:end] in self.places:
                return self.places[keys[:end]]
        return str(self.path) if self.path else "the recipe"


# --------------------------------------------------------------------------------------------------------------- finding
def find_launch(name: str) -> Path:
    """A configuration file of accelerate by path, or by name among those beside the shipped recipes."""
    if Path(name).is_file():
        return Path(name)
    folder = shipped("recipes") / LAUNCHES
    names = [path.stem for path in folder.glob("*.yaml")]
    if name in names:
        return folder / f"{name}.yaml"
    raise RecipeError(f"--accelerate: there is no file '{name}'{did_you_mean(name, names)}")


def find_yaml(name: str | Path, kind: str) -> Path:
    """A recipe or suite by path first, then by name among the shipped ones."""
    noun = {"recipes": "recipe", "eval": "suite"}[kind]
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise RecipeError(f"'{name}' is a folder, and no {noun}: name a {noun}'s file")
    if path.suffix in (".yaml", ".yml"):
        raise RecipeError(f"{noun} file '{name}' does not exist")
    names = shipped_names(kind)
    if path.as_posix() in names:
        return shipped_file(kind, path.as_posix())
    if kind == "eval" and str(name) in registry.names("suite"):
        return Path(registry.load("suite", str(name), "suite"))
    names = [*names, *(registry.names("suite") if kind == "eval" else ())]
    raise RecipeError(f"no {noun} called '{name}'{did_you_mean(str(name), names)}")


def is_suite(name: str) -> bool:
    """True if a name or file is a suite: it has a task, and neither a model nor an objective, which every recipe has."""
    path = Path(name)
    if path.is_file():
        keys = read_yaml(path).data.keys()
        return "task" in keys and not keys & {"model", "objective"}
    return name in {*shipped_names("eval"), *registry.names("suite")} - {*shipped_names("recipes")}


def find_file(name: str, beside: Path, key: str) -> str:
    """Absolute path of a file that a recipe names: from the current folder, the recipe's, or the shipped recipes'."""
    folders = [Path.cwd(), beside, shipped("recipes")]
    for folder in folders:
        if (folder / name).exists():
            return str((folder / name).resolve())
    looked = ", ".join(dict.fromkeys(str(folder) for folder in folders))
    raise DataError(f"{key}: file '{name}' does not exist (looked in {looked})")


# --------------------------------------------------------------------------------------------------------------- reading
def read_yaml(path: Path) -> Document:
    """Read a YAML mapping; duplicate keys and syntax errors name their line."""
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=_Loader)
        _check_size(root, str(path))
        data = yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise RecipeError(f"{path}: is nested too deeply to be a recipe") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none, an integer of too many digits
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise RecipeError(f"{path}{line}: not valid YAML: {reason}") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    document = Document({}, path)
    if root is None:
        return document
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(
            f"{path}: holds a {type(root).__name__.removesuffix('Node').lower()}, but a recipe is a mapping of keys to values"
        )
    _note_places(root, (), document)
    document.data = data
    return document


MAX_VALUES = 100_000
"""A recipe with more values, aliases written out, is none."""


def _check_size(root: yaml.Node | None, where: str) -> None:
    """Refuse YAML whose aliases lead back to themselves, or write out to more values than any recipe has."""
    sizes: dict[int, int | None] = {}

    def size(node: yaml.Node) -> int:
        known = sizes.get(id(node), 0)
        if known is None:
            raise RecipeError(f"{where}, line {node.start_mark.line + 1}: refers to itself by an alias")
        if known:
            return known
        sizes[id(node)] = None
        inner = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value
        total = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(map(size, inner)))
        if total > MAX_VALUES:
            raise RecipeError(
                f"{where}, line {node.start_mark.line + 1}: has more than {MAX_VALUES} values when its aliases are "
                "written out"
            )
        sizes[id(node)] = total
        return total

    if root is not None:
        size(root)


def _note_places(node: yaml.Node, keys: Keys, document: Document) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*keys, key.value)
            place = f"{document.path}, line {key.start_mark.line + 1}"
            if here in document.places:
                raise RecipeError(f"key '{dotted(here)}' stands twice ({document.places[here]} and {place}): keep one")
            document.places[here] = place
            _note_places(value, here, document)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            document.places[(*keys, index)] = f"{document.path}, line {value.start_mark.line + 1}"
            _note_places(value, (*keys, index), document)


def dotted(keys: Keys) -> str:
    return ".".join(str(key) for key in keys)


def apply_override(document: Document, override: str) -> None:
    """Apply `a.b.c=value`; the value is read as YAML. A list is reached into by index: `task.rewards.0.weight=2`."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise RecipeError(f"override '{override}' is not of the form key=value, for instance training.steps=50")
    try:
        _check_size(yaml.compose(text, Loader=_Loader), f"override '{override[:60]}'")
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(f"override '{override[:200]}': the value is not valid YAML") from error
    keys: Keys = tuple(int(part) if part.isdigit() else part for part in name.split("."))
    _check_stage(document.data, keys, override)
    target: Any = document.data
    for depth, key in enumerate(keys[:-1]):
        target = _child(target, key, keys[: depth + 1], override)
    last = keys[-1]
    section = keys[-2] if len(keys) > 1 else None
    if section in CHOICES and last == CHOICES[section][0] and target.get(last) != value:
        _keep_shared(section, target, override, document.notes)
    _put(target, last, value, keys, override)
    document.places[keys] = f"override {override}"


def _check_stage(data: dict[str, Any], keys: Keys, override: str) -> None:
    """An override changes stages that there are; a new one is written as a whole: `stages.NAME={...}`."""
    stages = data.get("stages") or {}
    if keys[0] != "stages" or len(keys) < 3 or not isinstance(stages, dict) or str(keys[1]) in map(str, stages):
        return
    if keys[1] == MAIN_STAGE:
        raise RecipeError(
            f"override '{override}': stages.{MAIN_STAGE} is what the top-level keys describe: set {dotted(keys[2:])}"
        )
    raise RecipeError(
        f"override '{override}': the recipe has no stage '{keys[1]}'{did_you_mean(str(keys[1]), map(str, stages))}"
        f"{' ' if stages else '; '}a new one is written as a whole: stages.{keys[1]}={{...}}"
    )


def _keep_shared(section: str, given: dict[str, Any], override: str, notes: list[str]) -> None:
    """Leave out the keys that another task, source or objective cannot have, and say which; what holds for any task stays."""
    shared = EpisodeLimits.model_fields if section == "task" and "environment" in given else ()
    lost = [key for key in given if key not in shared and key != CHOICES[section][0]]
    for key in [*lost, CHOICES[section][0]]:
        given.pop(key, None)
    if lost:
        left = ", ".join(f"{section}.{key}" for key in lost)
        notes.append(f"override {override} leaves out {left} of the recipe, which may not go with it")


def _child(target: Any, key: str | int, keys: Keys, override: str) -> Any:
    if isinstance(target, list):
        if not isinstance(key, int) or key >= len(target):
            raise RecipeError(f"override '{override}': the list has no item '{dotted(keys)}' (it has {len(target)})")
    elif target.get(key) is None:
        target[key] = {}
    if not isinstance(target[key], dict | list):
        raise RecipeError(f"override '{override}': '{dotted(keys)}' holds a single value and has no keys below it")
    return target[key]


def _put(target: Any, key: str | int, value: Any, keys: Keys, override: str) -> None:
    if not isinstance(target, list):
        target[key] = value
    elif isinstance(key, int) and key < len(target):
        target[key] = value
    else:
        raise RecipeError(f"override '{override}': the list has no item '{dotted(keys)}' (it has {len(target)})")


# ------------------------------------------------------------------------------------------------------------ validating
def validate(schema: type[Schema], document: Document, prefix: Keys = ()) -> Schema:
    """Check plain data against a schema; the first mistake becomes one line with its key, place and nearest name."""
    try:
        valid = schema.model_validate(document.data)
    except ValidationError as error:
        mistakes = error.errors()
        more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
        raise RecipeError(_explain(schema, document, mistakes[0], prefix) + more) from error
    while document.notes:
        print(f"lmrl: note: {document.notes.pop(0)}", file=sys.stderr)
    return valid


def _explain(schema: type[BaseModel], document: Document, mistake: Mapping[str, Any], prefix: Keys) -> str:
    keys: Keys = tuple(key for key in mistake["loc"] if not str(key).startswith("<"))
    place = document.place(prefix + keys)
    name = dotted(prefix + keys)
    kind = mistake["type"]
    if kind == "extra_forbidden":
        parent = _schema_at(schema, document.data, keys[:-1])
        valid = list(parent.model_fields) if parent else []
        hint = suggest(str(keys[-1]), valid, _sections(schema, document.data), dotted(keys[:-1]))
        if prefix:
            hint = hint.replace("mean '", f"mean '{dotted(prefix)}.")
        return f"unknown key '{name}' ({place}){hint}"
    if kind == "missing":
        return f"missing key '{name}' ({place})"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        choice = str(keys[-1])
        key, _, classes = CHOICES[choice]
        given = mistake["input"].get(key) if isinstance(mistake["input"], dict) else mistake["input"]
        valid = [tag.strip("<>") for tag in classes if tag not in ("<custom>", "<prompts>")]
        which = typing.cast(registry.Kind, choice if key == "name" else "environment")
        valid += [name for name in registry.names(which) if name not in valid]
        place = document.place((*prefix, *keys, key))
        if given is None:
            return f"missing key '{name}.{key}' ({place}){did_you_mean('', valid)}"
        return f"'{name}.{key}' names no known {keys[-1]}: '{given}' ({place}){did_you_mean(str(given), valid)}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        section = _schema_at(schema, document.data | {keys[0]: None}, keys[:1]) if len(keys) == 1 else None
        example = f", for instance {name}.{next(iter(section.model_fields))}=..." if section else ""
        return f"wrong value for '{name}' ({place}): expected keys with values{example}, got {_shown(mistake['input'])}"
    message = mistake["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{name + ': ' if name else ''}{message} ({place})"
    return f"wrong value for '{name}' ({place}): {message[0].lower()}{message[1:]}, got {_shown(mistake['input'])}"


def _shown(value: Any) -> str:
    """A wrong value, as short as a line has room for."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _sections(schema: Any, data: Any, above: Keys = ()) -> dict[str, list[str]]:
    """The keys of every section that `data` has or could have, by its dotted name ('' for the top level)."""
    section = _schema_at(schema, data, above)
    if section is None or len(above) > 2:
        return {}
    found = {dotted(above): list(section.model_fields)}
    for name in section.model_fields:
        found |= _sections(schema, data, (*above, name))
    return found


def _schema_at(schema: Any, data: Any, keys: Keys) -> type[BaseModel] | None:
    """The section class that describes `data` at `keys`, or None where it is free-form."""
    for key in keys:
        if isinstance(schema, type) and issubclass(schema, BaseModel):
            annotation = schema.model_fields[key].annotation if key in schema.model_fields else None
            data = data.get(key) if isinstance(data, dict) else None
            if key in CHOICES:
                _, choose, classes = CHOICES[key]
                schema = classes.get(choose(data) or "")
                continue
            schema = annotation
        elif typing.get_origin(schema) is list:
            schema = typing.get_args(schema)[0]
            data = data[key] if isinstance(data, list) and isinstance(key, int) else None
        if typing.get_origin(schema) in (types.UnionType, typing.Union):
            schema = next((arm for arm in typing.get_args(schema) if arm is not type(None)), None)
    return schema if isinstance(schema, type) and issubclass(schema, BaseModel) else None


# --------------------------------------------------------------------------------------------------------------- recipes
def load_recipe(name: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """The complete, checked recipe: a file or a shipped name, with dotted overrides.

    Raises RecipeError or DataError with one line that names key, place and fix.
    """
    if not isinstance(name, str | Path):
        raise RecipeError(
            f"a recipe is a name, a file or a Recipe, got a {type(name).__name__}: make one of a mapping by "
            "lmrl.recipe.Recipe.model_validate(...)"
        )
    document = read_yaml(find_yaml(name, "recipes"))
    arguments = take_arguments(document.data)
    for override in overrides:
        apply_override(document, spelled_out(override, arguments))
    check_arguments(document.data, arguments, str(name))
    stages = document.data.get("stages")
    for section in [document.data, *(stages.values() if isinstance(stages, dict) else ())]:
        resolve_files(section, document.folder)
    recipe = validate(Recipe, document)
    stages = {name: _stage(document, name) for name in recipe.stages}
    _check_stage_rewards(stages | {MAIN_STAGE: recipe})
    check_no_secrets(recipe)
    return recipe


def stages_of(recipe: Recipe) -> dict[str, Recipe]:
    """Every stage as a recipe of its own, in order; the last is `main`."""
    document = Document(recipe.model_dump(mode="json"))
    stages = {name: _stage(document, name) for name in recipe.stages}
    stages[MAIN_STAGE] = recipe.model_copy(update={"stages": {}})
    _check_stage_rewards(stages)
    return stages


def _check_stage_rewards(stages: dict[str, Recipe]) -> None:
    """Rewards of the form `stages/NAME` have to be there when a stage needs them."""
    models = [name for name, recipe in stages.items() if recipe.objective.name == REWARD_MODEL]
    for position, (name, recipe) in enumerate(stages.items()):
        before = list(stages)[:position]
        for index, reward in enumerate(getattr(recipe.task, "rewards", ())):
            for model in reward.models:
                wanted = model.removeprefix(STAGE_PREFIX)
                if wanted == model:
                    continue
                key = f"task.rewards.{index}.model"
                if wanted not in models:
                    raise RecipeError(
                        f"{key}: no stage '{wanted}' trains a reward model{did_you_mean(wanted, models)}"
                        + ("" if models else "; add one under stages, with objective.name=reward_model")
                    )
                if recipe.judges and wanted not in before:
                    raise RecipeError(
                        f"{key}: stage {name} is judged by stage {wanted}, which is trained later: move {wanted} before "
                        f"{name}, or set stages.{name}.task.rewards (and stages.{name}.evaluation.suite=null)"
                    )


def locate_rewards(task: dict[str, Any], run: Path) -> dict[str, Any]:
    """A task as plain data, in which rewards of the form `stages/NAME` became the folders of that run."""
    rewards = []
    for given in task.get("rewards") or ():
        reward, spec = dict(given), Reward.model_validate(given)
        if any(model.startswith(STAGE_PREFIX) for model in spec.models):
            folders = [str(run / model / "final") if model.startswith(STAGE_PREFIX) else model for model in spec.models]
            reward |= {"model": folders, "name": spec.label}
        rewards.append(reward)
    return task | ({"rewards": rewards} if rewards else {})


def _stage(document: Document, name: str) -> Recipe:
    """An earlier stage: the top-level keys with the stage's own laid over them."""
    base = {key: value for key, value in document.data.items() if key not in ("stages", "start")}
    merged = merge(base, document.data["stages"][name])
    start = merged.pop("start", "previous")  # checked where all stages are known
    stage = validate(Recipe, Document(merged, document.path, document.places), prefix=("stages", name))
    return stage.model_copy(update={"start": start})


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Lay changes over plain recipe data; a section that becomes another kind is replaced as a whole."""
    merged = dict(base)
    for key, value in changes.items():
        if not isinstance(value, dict) or not isinstance(merged.get(key), dict):
            merged[key] = value
            continue
        chooser = CHOICES.get(key)
        other = chooser and chooser[0] in value and value[chooser[0]] != merged[key].get(chooser[0])
        merged[key] = dict(value) if other else merge(merged[key], value)
    return merged


def resolve_files(data: Any, beside: Path) -> None:
    """Make the files that plain recipe data name absolute, in place, so that a run resumes from any folder."""

    def resolve(resolver: Callable[[str, Path, str], str], *keys: str) -> None:
        section = data
        for key in keys[:-1]:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict) and isinstance(section.get(keys[-1]), str):
            section[keys[-1]] = resolver(section[keys[-1]], beside, dotted(keys))

    resolve(_model_path, "model", "path")
    resolve(_data_path, "task", "prompts", "path")
    resolve(_data_path, "source", "path")
    resolve(_plugin_path, "task", "environment")
    resolve(_plugin_path, "objective", "name")
    resolve(_plugin_path, "source", "name")
    resolve(_plugin_path, "rollouts", "engine")
    resolve(_suite_path, "evaluation", "suite")
    _resolve_items(data, ("training", "listeners"), "name", beside)
    _resolve_items(data, ("tracking", "trackers"), "name", beside)
    task = data.get("task") if isinstance(data, dict) else None
    if isinstance(task, dict) and "rewards" in task:
        task["rewards"] = as_rewards(task["rewards"])
    rewards = task.get("rewards") if isinstance(task, dict) else None
    for index, reward in enumerate(rewards if isinstance(rewards, list) else ()):
        if isinstance(reward, dict) and isinstance(reward.get("function"), str):
            reward["function"] = _plugin_path(reward["function"], beside, f"task.rewards.{index}.function")
        if isinstance(reward, dict) and isinstance(reward.get("model"), str | list):
            given = [reward["model"]] if isinstance(reward["model"], str) else reward["model"]
            found = [_reward_model(model, beside, f"task.rewards.{index}.model") for model in given]
            reward["model"] = found[0] if isinstance(reward["model"], str) else found


def _resolve_items(data: Any, keys: tuple[str, str], name: str, beside: Path) -> None:
    """Make the files absolute that the items of a list name as code."""
    section = data.get(keys[0]) if isinstance(data, dict) else None
    items = section.get(keys[1]) if isinstance(section, dict) else None
    if not isinstance(items, list):
        return
    for index, item in enumerate(items):
        if isinstance(item, dict) and isinstance(item.get(name), str):
            item[name] = _plugin_path(item[name], beside, f"{dotted(keys)}.{index}.{name}")
        elif isinstance(item, str):
            items[index] = _plugin_path(item, beside, f"{dotted(keys)}.{index}")


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith(DATA_SUFFIXES)


def _model_path(name: str, beside: Path, key: str) -> str:
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    for place in (Path(name), beside / name):
        if place.exists():
            return str(place.resolve())
    refuse_missing(name, key)
    return name


def _reward_model(name: Any, beside: Path, key: str) -> Any:
    is_path = isinstance(name, str) and not name.startswith(STAGE_PREFIX)
    return _model_path(name, beside, key) if is_path else name


def _data_path(name: str, beside: Path, key: str) -> str:
    name = str(Path(name).expanduser()) if name.startswith("~") else name
    if _looks_local(name) or Path(name).exists() or (beside / name).exists():
        return find_file(name, beside, key)
    refuse_missing(name, key, "dataset")
    return name


def _suite_path(name: str, beside: Path, key: str) -> str:
    """A suite's file beside the caller or the recipe; anything else is a shipped name."""
    return find_file(name, beside, key) if name.endswith((".yaml", ".yml")) else name


def _plugin_path(name: str, beside: Path, key: str) -> str:
    file, colon, attribute = name.rpartition(":")
    if colon and file.endswith(".py"):
        try:
            return f"{find_file(file, beside, key)}:{attribute}"
        except DataError as error:
            raise PluginError(str(error)) from error
    if colon and "/" in file:
        raise PluginError(f"{key}: '{name}' should be file.py:name or a dotted path")
    return name


def to_yaml(recipe: BaseModel) -> str:
    """The resolved recipe, every default written out."""
    try:
        data = recipe.model_dump(mode="json")
    except PydanticSerializationError as error:  # an object of Python's among free-form options
        raise RecipeError(
            f"the recipe holds what no file can hold ({str(error).splitlines()[0]}): name functions as 'file.py:name', "
            "and give numbers, text, lists and mappings as options"
        ) from error
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    return text
