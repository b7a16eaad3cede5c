"""Find and load recipes and suites, and split a recipe into stages."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from lmrl.errors import RecipeError, did_you_mean
from lmrl.plugins import registry
from lmrl.plugins.objects import with_names
from lmrl.recipe import CHOICES, MAIN_STAGE, REWARD_MODEL, STAGE_PREFIX, Recipe, Reward
from lmrl.recipe.document import Document, read_yaml
from lmrl.recipe.methods import check_arguments, take_arguments
from lmrl.recipe.overrides import apply_overrides
from lmrl.recipe.paths import resolve_files
from lmrl.recipe.validation import validate
from lmrl.secrets import check_no_secrets
from lmrl.shipped import LAUNCHES, shipped, shipped_file, shipped_names


def find_launch(name: str) -> Path:
    """An accelerate configuration file by path, or by name among the shipped ones."""
    if Path(name).is_file():
        return Path(name)
    folder = shipped("recipes") / LAUNCHES
    names = [path.stem for path in folder.glob("*.yaml")]
    if name in names:
        return folder / f"{name}.yaml"
    raise RecipeError(f"--accelerate: there is no file '{name}'{did_you_mean(name, names)}")


def find_yaml(name: str | Path, kind: str) -> Path:
    """A recipe or suite by path first, then by name among the shipped ones. A folder that happens to have such a name, like
    one of data, does not hide it, unless it is a run."""
    noun = {"recipes": "recipe", "eval": "suite"}[kind]
    path = Path(name).expanduser()
    if path.is_file():
        return path
    own = path / "recipe.yaml"
    if noun == "recipe" and own.is_file():
        raise RecipeError(f"'{name}' is a folder, not a recipe: name {own}")
    names = shipped_names(kind)
    if path.as_posix() in names:
        return shipped_file(kind, path.as_posix())
    if kind == "eval" and str(name) in registry.names("suite"):
        return Path(registry.load("suite", str(name), "suite"))
    if path.is_dir():
        raise RecipeError(f"'{name}' is a folder, not a {noun}: name a {noun}'s file")
    if path.suffix in (".yaml", ".yml"):
        raise RecipeError(f"{noun} file '{name}' does not exist")
    names = [*names, *(registry.names("suite") if kind == "eval" else ())]
    raise RecipeError(f"no {noun} called '{name}'{did_you_mean(str(name), names)}")


def is_suite(name: str) -> bool:
    """True if a name or file is a suite: it has a task, but neither a model nor an objective, which every recipe has."""
    path = Path(name)
    if path.is_file():
        keys = read_yaml(path).data.keys()
        return "task" in keys and not keys & {"model", "objective"}
    return name in {*shipped_names("eval"), *registry.names("suite")} - {*shipped_names("recipes")}


def load_recipe(name: str | Path | Mapping[str, Any], overrides: typing.Sequence[str] = ()) -> Recipe:
    """The complete, checked recipe: a file, a shipped name or a mapping, with dotted overrides.

    Raises RecipeError or DataError with one line that names key, place and fix.
    """
    if not isinstance(name, str | Path | Mapping):
        raise RecipeError(f"a recipe is a name, a file, a mapping or a Recipe, got a {type(name).__name__}")
    if isinstance(name, Mapping):
        document, name = Document(with_names(name)), "recipe"
    else:
        document = read_yaml(find_yaml(name, "recipes"))
    arguments = take_arguments(document.data)
    apply_overrides(document, overrides, arguments)
    check_arguments(document.data, arguments, str(name))
    stages = document.data.get("stages")
    resolve_files(document.data, document.folder)
    for stage, section in (stages if isinstance(stages, dict) else {}).items():
        resolve_files(section, document.folder, ("stages", str(stage)))
    recipe = validate(Recipe, document)
    stages = {name: _stage(document, name) for name in recipe.stages}
    _check_stage_rewards(stages | {MAIN_STAGE: recipe})
    check_no_secrets(recipe)
    return recipe


def stages_of(recipe: Recipe) -> dict[str, Recipe]:
    """Every stage as a separate recipe, in order; the last is `main`."""
    document = Document(recipe.model_dump(mode="json"))
    stages = {name: _stage(document, name) for name in recipe.stages}
    stages[MAIN_STAGE] = recipe.model_copy(update={"stages": {}})
    _check_stage_rewards(stages)
    return stages


def _check_stage_rewards(stages: dict[str, Recipe]) -> None:
    """Check that rewards of the form `stages/NAME` are trained before a stage needs them."""
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
    """A task's plain data with rewards of the form `stages/NAME` replaced by folders of the run."""
    rewards = []
    for given in task.get("rewards") or ():
        reward, spec = dict(given), Reward.model_validate(given)
        if any(model.startswith(STAGE_PREFIX) for model in spec.models):
            folders = [str(run / model / "final") if model.startswith(STAGE_PREFIX) else model for model in spec.models]
            reward |= {"model": folders, "name": spec.label}
        rewards.append(reward)
    return task | ({"rewards": rewards} if rewards else {})


def _stage(document: Document, name: str) -> Recipe:
    """An earlier stage: the top-level keys overridden by the stage's own."""
    base = {key: value for key, value in document.data.items() if key not in ("stages", "start")}
    merged = merge(base, document.data["stages"][name])
    start = merged.pop("start", "previous")  # checked where all stages are known
    stage = validate(Recipe, Document(merged, document.path, document.places), prefix=("stages", name))
    return stage.model_copy(update={"start": start})


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Merge changes into plain recipe data; a section that changes its kind is replaced as a whole."""
    merged = dict(base)
    for key, value in changes.items():
        if not isinstance(value, dict) or not isinstance(merged.get(key), dict):
            merged[key] = value
            continue
        chooser = CHOICES.get(key)
        other = chooser and chooser[0] in value and value[chooser[0]] != merged[key].get(chooser[0])
        merged[key] = dict(value) if other else merge(merged[key], value)
    return merged


def to_yaml(recipe: BaseModel) -> str:
    """The resolved recipe as YAML, with every default."""
    text: str = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    return text
