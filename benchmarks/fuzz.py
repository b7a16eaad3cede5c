"""Recipes and data rows, mutated at random: every run ends well, or with one line that says what is wrong.

    python benchmarks/fuzz.py --mutations 2000 --seed 0 --out fuzz.jsonl [--seconds 170]   # goes on where it stopped

A mutation changes a small recipe (its keys, values, types, nesting, its YAML text, an override) or one of the rows of its data
(prompts, chats, pairs, logged episodes), and `lmrl show`, `lmrl train --dry-run` or a training of one step is run on it in this
process. A defect is whatever else than

- exit code 0, 2, or one of lmrl's own errors (1, 3), each with its line, short and free of control characters;
- files inside the run folder alone (none at all of `show` and `--dry-run`), and no leftovers among temporary files;
- an end within 60 seconds.

Mutations are drawn by hypothesis from the seed, 50 at a time. The table counts outcomes by kind. With --shrink a batch that has
defects is searched again for the smallest mutation that shows one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import logging
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import yaml
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BATCH = 50
MAX_SECONDS = 60
MAX_MEMORY = 6 << 30
"""Address space beyond what the process has at the start of a case."""
LONGEST_LINE = 2000
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")

REWARD = (
    "def vowels(prompts, completions, **columns): return [sum(c in 'aeiou' for c in text) for text in completions]\n"
)
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "say a"},
    {"role": "assistant", "content": "a b c"},
    {"role": "user", "content": "and d"},
    {"role": "assistant", "content": "d"},
]
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
ROWS: dict[str, list[dict[str, Any]]] = {
    "prompts": [{"prompt": f"say {word}", "answer": word} for word in ("one", "two", "three", "four")],
    "messages": [
        {"messages": CHAT, "reward": 1.0},
        {"messages": CHAT[:3], "rewards": [0.5]},
        {
            "messages": [
                CHAT[1],
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "1", "tool_call_id": "1"},
                CHAT[4],
            ],
            "reward": 0,
        },
    ],
    "pairs": [
        {"prompt": "say one", "chosen": "one", "rejected": "two"},
        {"chosen": CHAT[:3], "rejected": [*CHAT[:2], {"role": "assistant", "content": "no"}]},
        {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go"},
    ],
    "episodes": [
        {
            "turns": [
                {"observation": "a", "action": "b", "reward": 0.0},
                {"observation": "c", "action": "d", "reward": 1.0, "cut": False},
            ],
            "final_observation": "e",
            "terminated": False,
            "reward": 1.0,
            "metrics": {"won": 1.0},
            "components": {"x": 0.5},
            "columns": {"answer": "d"},
            "group": 0,
            "episode": 0,
            "seed": 3,
            "start": None,
            "player": "me",
        },
        {"prompt": "a", "completion": "b", "reward": -1},
        {"prompt": CHAT[:2], "completion": CHAT[2:3], "reward": 0.5},
    ],
}
COMMON: dict[str, Any] = {
    "model": {"path": "model"},
    "rollouts": {"prompts": 2, "samples": 2, "max_new_tokens": 4},
    "training": {"steps": 1, "threads": 1, "microbatch_tokens": 512, "seed": 1},
    "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95], "schedule": "linear"},
    "evaluation": {"episodes": 2, "diagnostics_every": 0},
}
PROMPTS = {
    "prompts": {"path": "rows.jsonl", "holdout": 0.3},
    "rewards": [{"function": "reward.py:vowels", "weight": 1.5}],
}
WALKS = {"environment": "random_walks", "nodes": 6, "max_turns": 3, "history": 2}
DATASET = {"name": "dataset", "path": "rows.jsonl", "batch_size": 2}
RECIPES: dict[str, dict[str, Any]] = {
    "prompts": COMMON | {"task": PROMPTS, "objective": {"name": "grpo", "epochs": 2, "kl_coef": 0.1}},
    "messages": COMMON | {"task": WALKS, "source": DATASET, "objective": {"name": "likelihood"}},
    "pairs": COMMON
    | {"task": {"prompts": {"holdout": 0.3}}, "source": DATASET, "objective": {"name": "dpo", "beta": 0.1}},
    "episodes": COMMON | {"task": WALKS, "source": DATASET, "objective": {"name": "ilql", "q_head": "tied"}},
    "environment": COMMON
    | {
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
            }
        },
        "task": WALKS,
        "stages": {
            "warmup": {
                "source": {"name": "dataset", "player": "random", "episodes": 6, "batch_size": 2},
                "objective": {"name": "likelihood"},
            }
        },
        "objective": {"name": "ppo", "epochs": 1, "minibatches": 1},
    },
}
SMALL = (
    "training.steps=1",
    "rollouts.prompts=2",
    "rollouts.samples=2",
    "rollouts.max_new_tokens=4",
    "evaluation.episodes=2",
)
"""Of a training that is to be one step, whatever was changed."""


# --------------------------------------------------------------------------------------------------------------- mutations
@dataclass(frozen=True)
class Case:
    """A command, and the files that it finds."""

    kind: str
    verb: str
    recipe: str
    rows: bytes
    overrides: tuple[str, ...] = ()

    def __repr__(self) -> str:
        parts = [f"lmrl {self.verb} recipe.yaml {' '.join(map(repr, self.overrides))}", self.recipe, repr(self.rows)]
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
    verb = draw(st.sampled_from(["train --dry-run"] * 9 + ["train"]))
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
        return Case(f"{form}: {how}", verb, as_yaml(RECIPES[form]), encoded("\n".join(lines) + "\n"))
    name = draw(st.sampled_from(list(RECIPES)))
    how = draw(
        st.sampled_from(["keys", "values", "values", "values", "types", "nesting", "text", "override", "override"])
    )
    verb = draw(st.sampled_from(["show", verb]))
    recipe, overrides = draw(st.sampled_from([RECIPES[name], resolved(name)])), ()
    text = as_yaml(recipe)
    if how == "text":
        text = draw(torn(text))
    elif how == "override":
        overrides = tuple(draw(st.lists(override(recipe), min_size=1, max_size=2)))
    else:
        text = as_yaml(draw(mutated(recipe, how)))
    rows = "\n".join(json.dumps(row) for row in ROWS.get(name, ()))
    return Case(f"recipe: {how}", verb, text, encoded(rows + "\n"), overrides)


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


# ------------------------------------------------------------------------------------------------------------------ running
@dataclass
class Outcome:
    """How a case ended: `fine`, `refused` (2), `failed` (another of lmrl's errors), or a defect and what it is."""

    name: str
    defect: str | None = None


class TookTooLong(BaseException):
    pass


def run_case(case: Case, model: Path, scratch: Path) -> Outcome:
    """Run a case in this process, in a folder below scratch."""
    import lmrl.cli  # here, so that --help answers at once

    home = scratch / "home"
    shutil.rmtree(home, ignore_errors=True)
    here, temporary = home / "here", home / "tmp"
    for folder in (here, temporary):
        folder.mkdir(parents=True)
    (here / "model").symlink_to(model)
    (here / "recipe.yaml").write_bytes(encoded(case.recipe))
    (here / "rows.jsonl").write_bytes(case.rows)
    (here / "reward.py").write_text(REWARD)
    before = tree(home)
    verb, *options = case.verb.split()
    arguments = [verb, "recipe.yaml", *case.overrides, *options]
    if case.verb == "train":
        arguments += [*SMALL, "--output", "run"]
    code, trace, out, err, took = call(lmrl.cli.main, arguments, here, temporary)
    text = f"{out}\n{err}"
    made = sorted(name for name in tree(home) - before if not (case.verb == "train" and name.startswith("here/run")))
    lines = [line for line in err.splitlines() if line.startswith("lmrl: ")]
    if trace:
        return Outcome("defect", trace)
    if took > MAX_SECONDS:
        return Outcome("defect", f"took {took:.0f} s")
    if code not in (0, 1, 2, 3):
        return Outcome("defect", f"exit code {code}: {err[-300:]}")
    if code in (1, 2) and not lines and "Usage:" not in err:
        return Outcome("defect", f"exit code {code} without a line: {err[-300:]!r}")
    if "Traceback" in err:
        return Outcome("defect", err[-2000:])
    if long := [line for line in lines if len(line) > LONGEST_LINE]:
        return Outcome("defect", f"a line of {len(long[0])} characters: {long[0][:300]}")
    if found := CONTROL.search(text):
        return Outcome(
            "defect", f"control character {found[0]!r} in {text[max(found.start() - 100, 0) : found.end()]!r}"
        )
    if made:
        return Outcome("defect", f"left behind: {made[:5]}")
    return Outcome({0: "fine", 2: "refused", 3: "failed", 1: "failed"}[code])


def call(main: Any, arguments: list[str], here: Path, temporary: Path) -> tuple[int, str | None, str, str, float]:
    """Call the command line: exit code, a traceback where there is one, both streams, and seconds."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    was = Path.cwd(), sys.argv, os.environ.get("HOME"), tempfile.tempdir, resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    code, trace, began = 0, None, time.monotonic()

    def late(*_: Any) -> None:
        raise TookTooLong

    previous = signal.signal(signal.SIGALRM, late)
    try:
        os.chdir(here)
        sys.argv, os.environ["HOME"], tempfile.tempdir = ["lmrl", *arguments], str(here), str(temporary)
        resource.setrlimit(resource.RLIMIT_AS, (size + MAX_MEMORY, was[4][1]))
        signal.alarm(MAX_SECONDS + 1)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        places = traceback.extract_tb(error.__traceback__)
        where = [f"{Path(one.filename).name}:{one.lineno}" for one in places if "/lmrl/" in one.filename][-4:]
        trace = f"{type(error).__name__}: {str(error)[:300]} at {' > '.join(where)}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, was[4])
        os.chdir(was[0])
        sys.argv, tempfile.tempdir = was[1], was[3]
        if was[2] is not None:
            os.environ["HOME"] = was[2]
    streams = [stream.buffer.getvalue().decode(errors="replace") for stream in (out, err)]
    return code, trace, *streams, time.monotonic() - began


def tree(folder: Path) -> set[str]:
    """Names of all files and folders, of the folder above as well: a path may lead there."""
    found = {
        str(Path(root, name).relative_to(folder)) for root, dirs, names in os.walk(folder) for name in [*dirs, *names]
    }
    return found | {f"../{path.name}" for path in folder.parent.iterdir()}


# ------------------------------------------------------------------------------------------------------------------ batches
class Defect(AssertionError):
    pass


def run_batch(number: int, count: int, model: Path, scratch: Path) -> list[tuple[Case, Outcome]]:
    """`count` cases of the batch's own seed, defects among them."""
    found: list[tuple[Case, Outcome]] = []

    @hypothesis.seed(number)
    @_settings(count, hypothesis.Phase.generate)
    @hypothesis.given(cases())
    def attempt(case: Case) -> None:
        found.append((case, run_case(case, model, scratch)))

    attempt()
    return found


def smallest(number: int, count: int, model: Path, scratch: Path) -> str | None:
    """The smallest mutation of a batch that shows a defect, and the defect."""
    last: list[str] = []

    @hypothesis.seed(number)
    @_settings(count, hypothesis.Phase.generate, hypothesis.Phase.shrink)
    @hypothesis.given(cases())
    def attempt(case: Case) -> None:
        if defect := run_case(case, model, scratch).defect:
            last[:] = [f"{case!r}\n{defect}"]
            raise Defect

    try:
        attempt()
    except Defect:
        return last[0]
    return None


def _settings(count: int, *phases: Any) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=phases,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def table(lines: list[dict[str, Any]]) -> str:
    """Outcomes by kind, in Markdown."""
    names = ["fine", "refused", "failed", "defect"]
    counts = Counter((line["kind"], line["outcome"]) for line in lines)
    rows = [[kind, *(str(counts[kind, name]) for name in names)] for kind in sorted({line["kind"] for line in lines})]
    rows.append(["all", *(str(sum(counts[kind, name] for kind, _, *_ in rows)) for name in names)])
    head = [["mutated", "ends well", "refused (2)", "fails by name (1, 3)", "defect"], ["---"] * 5]
    return "\n".join(f"| {' | '.join(row)} |" for row in head + rows)


def prepare(scratch: Path) -> Path:
    """The tiny chat model that recipes name, and settings of the process."""
    import torch

    from tests.conftest import save_tiny_model

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # beside reward.py
    logging.disable(logging.WARNING)
    save_tiny_model(scratch / "model")
    return scratch / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz.jsonl"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no batch after so long")
    parser.add_argument(
        "--shrink", action="store_true", help="look for the smallest mutation of the first batch with a defect"
    )
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    lines = [line for line in lines if line["seed"] == args.seed]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lmrl-fuzz-") as folder:
        model = prepare(Path(folder))
        place = Path(folder) / "place"
        place.mkdir()
        for batch in range(-(-args.mutations // BATCH)):
            if any(line["batch"] == batch for line in lines) or time.monotonic() - began > args.seconds:
                continue
            found = run_batch(args.seed * 1_000_000 + batch, BATCH, model, place)
            new = [
                {"seed": args.seed, "batch": batch, "kind": case.kind, "outcome": outcome.name}
                | ({"defect": outcome.defect, "case": repr(case)} if outcome.defect else {})
                for case, outcome in found
            ]
            with open(args.out, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in new)
            lines += new
        print(table(lines))
        print(f"{len(lines)} of {args.mutations} mutations")
        broken = sorted({line["batch"] for line in lines if line["outcome"] == "defect"})
        if broken and args.shrink:
            print(smallest(args.seed * 1_000_000 + broken[0], BATCH, model, place))
    if broken:
        sys.exit(1)


if __name__ == "__main__":
    main()
