"""Which tests are `fast`: unit tests by folder, without those that train, start processes, or write a model."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

UNITS = (
    "docs",
    "environments",
    "evaluation",
    "objectives",
    "plugins",
    "policy",
    "recipe",
    "sources",
    "training",
    "trajectories",
)
"""Folders below tests/ that hold unit tests, and the files beside them."""
SLOW = re.compile(
    r"\b(train|dry_run|resume_run|Updater|simulate\w*|exec)\(|\b(subprocess|multiprocessing|Popen|fork|kill|fuzz)\b"
    r"|\bworkers=|\brange\(SEEDS\)"
)
"""What the source of a test has that trains a policy, starts a process, runs a notebook, or tries hundreds of inputs."""
SLOW_FIXTURES = {"ilql_run", "tiny_folder"}
SLOW_MARKS = {"slow", "smollm2", "vllm"}


def is_fast(item: Any) -> bool:
    """True for a test of a unit folder that neither trains nor starts processes, itself or by what it uses of its module."""
    path = Path(item.path)
    if not is_unit(path):
        return False
    if SLOW_MARKS & {mark.name for mark in item.iter_markers()}:
        return False
    return not ({item.originalname, *item.fixturenames} & (SLOW_FIXTURES | slow_names(path)))


def is_unit(path: Path) -> bool:
    """True for a test file of a unit folder, or beside these folders."""
    folder = path.relative_to(Path(__file__).parent).parts[0]
    return folder in UNITS or folder.endswith(".py")


@cache
def slow_names(path: Path) -> frozenset[str]:
    """Names in a test's file, fixtures included, that match SLOW, come from another test's file, or use one that does."""
    text = path.read_text()
    sources, slow = {}, set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            # without the name itself, which may have a word of SLOW in it
            sources[node.name] = ast.unparse(node).partition("(" if hasattr(node, "args") else ":")[2]
        elif (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").split(".")[0] == "tests"
            and node.module != "tests.conftest"
        ):
            slow |= {name.asname or name.name for name in node.names}
    slow |= {name for name, source in sources.items() if SLOW.search(source)}
    while more := {name for name, source in sources.items() if name not in slow and _uses(source, slow)}:
        slow |= more
    return frozenset(slow)


def _uses(source: str, names: set[str]) -> bool:
    return any(re.search(rf"\b{name}\b", source) for name in names)
