"""The recipes, rewards and suites inside the package: their locations, names and one-line descriptions.

Nothing here imports pydantic, so that `lmrl ls` is fast.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import yaml

LAUNCHES, METHODS = "accelerate", "methods/"
"""Special folders of shipped recipes: accelerate configurations, and recipes for your own data, named by the method
only."""
FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Only for lmrl's own files: it has no guard against deep nesting."""


def shipped(kind: str) -> Path:
    """Folder of shipped content: `recipes`, `reward_models` or `eval`."""
    return Path(str(files(f"lmrl.{kind}")))


def shipped_names(kind: str) -> list[str]:
    """Names of the shipped recipes (`sft`, `random_walks/ppo`) or suites (`random_walks`)."""
    folder = shipped(kind)
    names = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    methods = [name.removeprefix(METHODS) for name in names if name.startswith(METHODS)]
    return methods + [name for name in names if not name.startswith((f"{LAUNCHES}/", METHODS))]


def shipped_file(kind: str, name: str) -> Path:
    """The file of a shipped recipe or suite."""
    own = shipped(kind) / f"{name}.yaml"
    return own if own.exists() else shipped(kind) / f"{METHODS}{name}.yaml"


def descriptions(kind: str) -> dict[str, str]:
    """The shipped recipes or suites with their `description`."""
    read = {name: yaml.load(shipped_file(kind, name).read_text(), Loader=FAST_LOADER) for name in shipped_names(kind)}
    return {name: str(data.get("description", "")) for name, data in read.items()}


def section_docs(place: str, key: str) -> dict[str, str]:
    """First paragraphs of the docstrings of the recipe's section classes in a file or folder of lmrl/recipe, by the
    name that selects each: that of its field `key: Literal[NAME]`."""
    root = Path(__file__).parent / "recipe" / place
    found: dict[str, str] = {}
    for file in sorted(root.glob("*.py")) if root.is_dir() else [root]:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                found |= {name: _first_paragraph(node) for name in _literals(node, key)}
    return found


def _literals(node: ast.ClassDef, key: str) -> Iterator[str]:
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and getattr(part.target, "id", None) == key:
            kind = part.annotation
            if isinstance(kind, ast.Subscript) and getattr(kind.value, "id", None) == "Literal":
                yield ast.literal_eval(kind.slice)


def _first_paragraph(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())


def reward_docs() -> dict[str, str]:
    """The shipped rewards by dotted path: functions that take completions, and classes that can be called, with the
    first paragraphs of their docstrings."""
    found = {}
    for path in sorted(shipped("reward_models").glob("[!_]*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                is_reward = any(argument.arg == "completions" for argument in node.args.args)
            elif isinstance(node, ast.ClassDef):
                is_reward = any(getattr(part, "name", "") == "__call__" for part in node.body)
            else:
                continue
            if is_reward:
                found[f"lmrl.reward_models.{path.stem}.{node.name}"] = _first_paragraph(node)
    return dict(sorted(found.items()))
