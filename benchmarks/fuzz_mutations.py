"""Mutations of recipes and rows, drawn by hypothesis: keys, values, types, nesting, the text itself, and overrides."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from fuzz_recipes import RECIPES, ROWS
from hypothesis import strategies as st


@dataclass(frozen=True)
class Case:
    """A command, and the files that it finds."""

    kind: str
    command: str
    recipe: str
    rows: bytes
    overrides: tuple[str, ...] = ()

    def __repr__(self) -> str:
        parts = [f"lmrl {self.command} recipe.yaml {' '.join(map(repr, self.overrides))}", self.recipe, repr(self.rows)]
        return "\n".join(part if len(part) < 3000 else f"{part[:1500]} ... {part[-200:]}" for part in parts)


ODD = st.sampled_from(
    [
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        7,
        0.5,
        1e-300,
        1e300,
        float("nan"),
        float("inf"),
        -float("inf"),
        10**12,
        2**63,
        10**400,
    ]
    + [
        "",
        "1",
        " ",
        "x" * 100_000,
        "\x00\x1b[31m",
        "\ud800",
        "\U0001f642 \u202e",
        "<|im_end|>",
        "${HOME}",
        "~",
        "a/../../b",
    ]
    + [
        "/dev/null",
        "/",
        ".",
        "https://127.0.0.1:9/x",
        "file.py:f",
        "os.system",
        "main",
        "null",
        "[",
        "{",
        "yes",
        "2024-99-99",
    ]
    + [[], {}, [[]], [None], {"": None}, [1, "a", None], {"name": "x"}]
)
PLAUSIBLE = st.sampled_from(
    [0, 1, 2, 3, 7, 64, 0.1, 0.5, 1.0, 1e-3, True, False, None, "auto", "linear", "running", "a", [0, 1]]
)
VALUES = (
    PLAUSIBLE
    | ODD
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    )
)
TOKENS = st.sampled_from(
    [
        "&a ",
        "*a",
        "!!python/object/apply:os.system ['touch evil']",
        "!!binary x",
        "!!int x",
        "!x ",
        "<<: *a",
        "---\n",
        "...\n",
    ]
    + [
        "{",
        "}",
        "[",
        "]",
        "\t",
        "\n",
        ": ",
        "- ",
        "? ",
        "|\n",
        ">",
        "%YAML 9\n",
        "#",
        "'",
        '"',
        "\\",
        "\x00",
        "\ufeff",
        "\u2028",
    ]
    + ["0x", "1e", ".nan", "~", "@", "`", "[" * 2000, "a: " * 300, '"\\ud800"', "1:2:3", "0o8", "\xff", "null"]
)
KEYS = st.sampled_from(
    [
        "",
        "name",
        "path",
        "stages",
        "main",
        "environment",
        "model",
        "0",
        "x" * 5000,
        "\x1b",
        "\ud800",
        "__class__",
        "task",
        "start",
    ]
) | st.text(max_size=10)


def paths_of(data: Any, keys: tuple = ()) -> Iterator[tuple]:
    """The keys of every value below the root."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        yield (*keys, key)
        yield from paths_of(value, (*keys, key))


@st.composite
def mutated(draw: Any, data: Any, how: str) -> Any:
    """Plain data with one thing changed. how: `keys`, `values`, `types` or `nesting`."""
    data = copy.deepcopy(data)
    paths = list(paths_of(data))
    *above, last = draw(st.sampled_from(sorted(paths, key=len)) | st.sampled_from(sorted(paths, key=len, reverse=True)))
    parent = data
    for key in above:
        parent = parent[key]
    value = parent[last]
    if how == "keys":
        act = draw(st.sampled_from(["delete", "rename", "add", "misspell"]))
        if act in ("delete", "rename", "misspell"):
            del parent[last]
        if act != "delete":
            name = draw(KEYS) if act != "misspell" else f"{str(last)[:-1]}x"
            put(parent, name, value if act != "add" else draw(VALUES))
    elif how == "values":
        parent[last] = draw(similar(value) | VALUES)
    elif how == "types":
        parent[last] = draw(
            st.sampled_from(
                [[value], {str(last): value}, str(value), [value, value], {"0": value}, not value, repr(value)]
            )
        )
    else:
        others = [value for value in (data, parent, draw(VALUES))]
        inner = copy.deepcopy(draw(st.sampled_from(others)))
        for _ in range(draw(st.sampled_from([1, 2, 50]))):
            inner = {last: inner} if isinstance(last, str) else [inner]
        parent[last] = inner
    return data


def similar(value: Any) -> Any:
    """Values of the same type, which are more often taken."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int | float):
        return st.sampled_from([0, 1, 2, 3, 5, 8, 64, 0.0, 0.1, 0.5, 0.9, 1.5, 1e-6, 30.0])
    if isinstance(value, str):
        return st.text(max_size=10) | st.just(value[::-1])
    if isinstance(value, list):
        return st.just(value[:1]) | st.just(value[::-1])
    return st.just(1) | st.just(0.5) | st.just("a")


def put(parent: Any, name: str, value: Any) -> None:
    if isinstance(parent, dict):
        parent[name] = value
    else:
        parent.append(value)


@st.composite
def torn(draw: Any, text: str) -> str:
    """Text with something put in, cut out or written twice, once or more."""
    for _ in range(draw(st.integers(1, 3))):
        low = draw(st.integers(0, len(text)))
        high = min(low + draw(st.sampled_from([0, 0, 1, 3, 20])), len(text))
        inside = draw(st.one_of(TOKENS, st.text(max_size=5), st.just(text[low:high] * 2), st.just("")))
        text = text[:low] + inside + text[high:]
    return text


@st.composite
def cases(draw: Any) -> Case:
    """Half of the mutations are of recipes, half of rows."""
    command = draw(st.sampled_from(["train --dry-run"] * 9 + ["train"]))
    if draw(st.booleans()):
        form = draw(st.sampled_from(list(ROWS)))
        how = draw(st.sampled_from(["keys", "values", "values", "types", "nesting", "text"]))
        rows = copy.deepcopy(ROWS[form])
        number = draw(st.integers(0, len(rows) - 1))
        lines = [json.dumps(row) for row in rows]
        if how == "text":
            lines[number] = draw(torn(lines[number]))
        else:
            lines[number] = json.dumps(draw(mutated(rows[number], how)))
        return Case(f"{form}: {how}", command, as_yaml(RECIPES[form]), encoded("\n".join(lines) + "\n"))
    name = draw(st.sampled_from(list(RECIPES)))
    how = draw(
        st.sampled_from(["keys", "values", "values", "values", "types", "nesting", "text", "override", "override"])
    )
    command = draw(st.sampled_from(["show", command]))
    recipe, overrides = draw(st.sampled_from([RECIPES[name], resolved(name)])), ()
    text = as_yaml(recipe)
    if how == "text":
        text = draw(torn(text))
    elif how == "override":
        overrides = tuple(draw(st.lists(override(recipe), min_size=1, max_size=2)))
    else:
        text = as_yaml(draw(mutated(recipe, how)))
    rows = "\n".join(json.dumps(row) for row in ROWS.get(name, ()))
    return Case(f"recipe: {how}", command, text, encoded(rows + "\n"), overrides)


@functools.cache
def resolved(name: str) -> dict[str, Any]:
    """A recipe with every default written out, so that every key is there to be changed."""
    from lmrl.recipe import Recipe

    return Recipe.model_validate(RECIPES[name]).model_dump(mode="json")


@st.composite
def override(draw: Any, recipe: dict[str, Any]) -> str:
    keys = ".".join(map(str, draw(st.sampled_from(list(paths_of(recipe))))))
    keys = draw(
        st.sampled_from([keys, keys, keys, f"{keys}.x", f"{keys}.0", f"{keys}.", f".{keys}", f"stages.warmup.{keys}"])
    )
    value = draw(st.one_of(VALUES.map(flow), TOKENS, st.text(max_size=10)))
    # What a command line can carry: no NUL, and bytes that are no text arrive as lone surrogates of their own kind.
    return f"{keys}={value}".replace("\x00", "").encode(errors="surrogatepass").decode(errors="surrogateescape")


def as_yaml(data: Any) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("...\n").strip()


def encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")
