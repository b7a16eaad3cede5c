"""The shipped suites compared with lm-eval's own tasks on real files: prompts, scores, log-likelihoods and greedy completions.

    python benchmarks/lm_eval_suites.py MODEL FOLDER --limit 40        # needs pip install lm-eval==0.4.13

MODEL is a checkpoint, FOLDER has a file for each suite, SUITE.jsonl with the hub's rows, and of its examples, if it has any,
SUITE_examples.jsonl; suites without a file are left out. Both sides run in float32 on rows evenly spaced over the file, and run the code
that the model writes. Tasks that load a metric from the hub need the network, or the metric's folder here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_ALLOW_CODE_EVAL", "1")

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM

import lmrl
from lmrl.evaluation.harness import manager_of
from lmrl.evaluation.suites import load_suite
from lmrl.rollouts.templates import Filler

Row = dict[str, Any]
ACCURACY = {"acc": "acc"}
BOTH = ACCURACY | {"acc_norm": "acc_norm"}


class Task(NamedTuple):
    """A task of lm-eval. scores: its name for each metric of the suite, with the filter if there are several. part: the column
    whose values have tasks of their own. examples: the split of its examples (None: they are in the task)."""

    file: str
    scores: dict[str, str]
    part: str | None = None
    examples: str | None = None


TASKS = {
    "arc_easy": Task("arc/arc_easy.yaml", BOTH),
    "arc_challenge": Task("arc/arc_challenge.yaml", BOTH),
    "hellaswag": Task("hellaswag/hellaswag.yaml", BOTH),
    "truthfulqa": Task("truthfulqa/truthfulqa_mc1.yaml", ACCURACY),
    "mmlu": Task("mmlu/default/mmlu_{}.yaml", ACCURACY, "subject", "dev"),
    "gsm8k": Task(
        "gsm8k/gsm8k.yaml",
        {"strict_match": "exact_match/strict-match", "flexible_extract": "exact_match/flexible-extract"},
        examples="train",
    ),
    "math_500": Task("minerva_math/minerva_math500.yaml", {"math_verify": "math_verify"}),
    "mmlu_pro": Task("mmlu_pro/mmlu_pro_{}.yaml", {"exact_match": "exact_match"}, "category", "validation"),
    "ifeval": Task(
        "ifeval/ifeval.yaml",
        {"strict": "prompt_level_strict_acc", "loose": "prompt_level_loose_acc"},
    ),
    "humaneval": Task("humaneval/humaneval.yaml", {"passes": "pass@1"}),
    "mbpp": Task("mbpp/mbpp.yaml", {"passes": "pass_at_1"}),
}
SPLITS = ("train", "validation", "dev", "test")


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().split("\n") if line]


def write(file: Path, rows: list[Row]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def chosen(suite: str, data: Path, limit: int | None) -> list[Row]:
    """The rows that the suite keeps, `limit` of them evenly spaced over the file; those of one part follow each other."""
    fill = Filler(load_suite(suite, [f"data={data}"]).task.prompts)  # type: ignore[union-attr]
    kept = [row for row in read(data) if fill.is_wanted(fill.columns(row))]
    count = min(limit or len(kept), len(kept))
    part = TASKS[suite].part
    return sorted((kept[place * len(kept) // count] for place in range(count)), key=lambda row: str(row.get(part)))


def tasks_over(suite: str, rows: list[Row], examples: Path, folder: Path) -> list[str]:
    """Writes lm-eval's tasks over rows, as files that include its own; returns their names in the order of the rows."""
    task, names = TASKS[suite], []
    for part in dict.fromkeys(row.get(task.part, "") for row in rows):
        name = re.sub(r"\W", "_", f"local_{suite}_{part}")
        own = [row for row in rows if row.get(task.part, "") == part]
        files = dict.fromkeys(SPLITS, str(write(folder / f"{name}.jsonl", own)))
        if task.examples and examples.exists():
            own = [row for row in read(examples) if row.get(task.part, "") == part]
            files[task.examples] = str(write(folder / f"{name}_examples.jsonl", own))
        original = Path(lm_eval.__file__).parent / "tasks" / task.file.format(re.sub(r"\W", "_", part))
        (folder / f"{name}.yaml").write_text(
            f"include: {original}\ntask: {name}\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {json.dumps({'data_files': files})}\ntag: null\n"
        )
        names.append(name)
    return names


def theirs(lm: HFLM, suite: str, names: list[str], folder: Path, shots: int | None, tokens: int | None) -> list[Row]:
    """Prompt, answers and scores of each row."""
    found = lm_eval.simple_evaluate(
        lm,
        tasks=names,
        task_manager=manager_of(str(folder)),
        num_fewshot=shots,
        gen_kwargs=None if tokens is None else {"max_gen_toks": tokens},
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,
    )
    result: list[Row] = []
    for name in names:
        rows: dict[int, Row] = {}
        for sample in found["samples"][name]:
            row = rows.setdefault(sample["doc_id"], {"scores": {}})
            row |= {"prompt": sample["arguments"][0][0], "answers": [answer for (answer,) in sample["resps"]]}
            for metric, label in TASKS[suite].scores.items():
                their, _, which = label.partition("/")
                if which in ("", sample["filter"]):
                    row["scores"][metric] = float(sample[their])
        result += [rows[number] for number in sorted(rows)]
    return result


def compared(suite: str, lm: HFLM, given: argparse.Namespace) -> str:
    """The suite's line of the table."""
    examples = Path(given.data, f"{suite}_examples.jsonl")
    rows = chosen(suite, Path(given.data, f"{suite}.jsonl"), given.limit)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = [f"data={write(folder / 'rows.jsonl', rows)}"]
        if examples.exists():
            overrides.append(f"examples={examples}")
        loaded = load_suite(suite, overrides)
        if given.shots is not None:
            overrides.append(f"shots={given.shots}")
        if given.tokens is not None and loaded.choices is None:
            overrides.append(f"rollouts.max_new_tokens={given.tokens}")
        shots = load_suite(suite, overrides).task.prompts.shots.count  # type: ignore[union-attr]
        report = lmrl.evaluate(given.model, suite, overrides, run_code=loaded.run_code is not None)
        names = tasks_over(suite, rows, examples, folder)
        others = theirs(lm, suite, names, folder, shots, None if loaded.choices else given.tokens)
    pairs = list(zip(report.trajectories, others, strict=True))
    prompts = sum(one.prompt == other["prompt"] for one, other in pairs)
    scores = []
    for metric in TASKS[suite].scores:
        ours = [one.components[metric] for one, _ in pairs]
        their = [other["scores"][metric] for _, other in pairs]
        differ = sum(a != b for a, b in zip(ours, their, strict=True))
        equal = f"{sum(ours) / len(ours):.3f}" if not differ else f"{differ} rows differ"
        scores.append(f"`{metric}` {equal}")
    if loaded.choices:
        gaps = (
            abs(a - b)
            for one, other in pairs
            for a, (b, _) in zip(one.columns["loglikelihoods"], other["answers"], strict=True)
        )
        answers = f"{max(gaps):.1e}"
    else:
        equal = sum(one.completion == other["answers"][0] for one, other in pairs)
        answers = f"{equal} of {len(pairs)} completions equal"
    return f"| `{suite}` | {shots} | {prompts} of {len(pairs)} | {', '.join(scores)} | {answers} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data", help="folder of SUITE.jsonl and SUITE_examples.jsonl")
    parser.add_argument("--suites", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--limit", type=int, help="rows of each suite (default: all)")
    parser.add_argument("--shots", type=int, help="examples before each prompt (default: the suite's)")
    parser.add_argument("--tokens", type=int, help="new tokens of both (default: the suite's, which are the task's)")
    parser.add_argument("--batch", type=int, default=8, help="lm-eval's batch size")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    lm = HFLM(pretrained=given.model, dtype="float32", device="cpu", batch_size=given.batch)
    print("| suite | examples | prompts equal | scores of both | largest difference of a log-likelihood |")
    print("|---|---|---|---|---|")
    for suite in given.suites:
        if Path(given.data, f"{suite}.jsonl").exists():
            print(compared(suite, lm, given), flush=True)


if __name__ == "__main__":
    main()
