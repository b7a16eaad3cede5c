"""Recipes and data rows, mutated at random: every run succeeds, or ends with one line that says what is wrong.

    python benchmarks/fuzz.py --mutations 2000 --seed 0 --out fuzz.jsonl [--seconds 170]   # goes on where it stopped

A mutation changes a small recipe (its keys, values, types, nesting, its YAML text, an override) or one of the rows of its data
(prompts, chats, pairs, logged episodes), and `lmrl show`, `lmrl train --dry-run` or a training of one step is run on it in this
process. A defect is anything other than

- exit code 0, 2, or one of lmrl's own errors (1, 3), each with its line, short and free of control characters;
- files inside the run folder alone (none at all of `show` and `--dry-run`), and no leftovers among temporary files;
- an end within 60 seconds.

Mutations are drawn by hypothesis from the seed, 50 at a time. The table counts outcomes by kind. With --shrink a batch that has
defects is searched again for the smallest mutation that shows one.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
from fuzz_mutations import Case, cases
from fuzz_run import Outcome, run_case

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BATCH = 50


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
    head = [["mutated", "succeeds", "refused (2)", "fails by name (1, 3)", "defect"], ["---"] * 5]
    return "\n".join(f"| {' | '.join(row)} |" for row in head + rows)


CALLS = "{% for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments }}){% endfor %}"
"""A chat template's tool calls."""


def prepare(scratch: Path) -> Path:
    """The tiny chat model that recipes name, and settings of the process."""
    import torch
    from transformers import AutoTokenizer

    from tests.conftest import save_tiny_model

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # beside reward.py
    logging.disable(logging.WARNING)
    save_tiny_model(scratch / "model")
    tokenizer = AutoTokenizer.from_pretrained(scratch / "model")
    content = "{{ message.content }}"
    tokenizer.chat_template = tokenizer.chat_template.replace(content, content + CALLS)
    tokenizer.save_pretrained(scratch / "model")
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
