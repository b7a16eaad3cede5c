"""Tasks of reasoning-gym, generated and verified (pip install 'lmrl[rewards]').

Stojanovski et al., "Reasoning Gym" (arXiv 2505.24760). Write prompts, and name the verifier in the recipe:

    python -m lmrl.reward_models.reasoning_gym chain_sum --size 500 --output sums.jsonl -c max_terms=2 -c max_digits=1

    task: {prompts: {path: sums.jsonl}, rewards: [{function: lmrl.reward_models.reasoning_gym.verified}]}
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from lmrl.reward_models._text import text_of

TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def verified(completions: list, reasoning_gym: list, **_) -> list[float | None]:
    """The verifier's score in [0, 1] of each completion; None for a row that is not a reasoning-gym task.

    `reasoning_gym` is the column that this module writes. The answer is the content of the last <answer> tag, otherwise the
    whole completion, stripped.
    """
    from reasoning_gym import get_score_answer_fn

    rewards: list[float | None] = []
    for completion, entry in zip(completions, reasoning_gym, strict=True):
        entry = json.loads(entry) if isinstance(entry, str) else entry
        if not entry:
            rewards.append(None)
            continue
        text = text_of(completion)
        found = TAGGED.findall(text)
        answer = (found[-1] if found else text).strip()
        rewards.append(float(get_score_answer_fn(entry["metadata"]["source_dataset"])(answer=answer, entry=entry)))
    return rewards


def write_prompts(task: str, size: int, seed: int, output: Path, ask: str = "", **settings) -> None:
    """Write `size` tasks as rows of prompt and entry. ask: text to append to each question."""
    from reasoning_gym import create_dataset

    with open(output, "w", encoding="utf-8") as file:
        for entry in create_dataset(task, size=size, seed=seed, **settings):
            row = {"prompt": entry["question"] + ask, "reasoning_gym": json.dumps(entry)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write prompts of a reasoning-gym task.")
    parser.add_argument("task")
    parser.add_argument("--size", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ask", default="", help="text after each question")
    parser.add_argument(
        "-c", "--config", action="append", default=[], metavar="NAME=JSON", help="a setting of the task"
    )
    args = parser.parse_args()
    settings = {name: json.loads(value) for name, _, value in (one.partition("=") for one in args.config)}
    write_prompts(args.task, args.size, args.seed, args.output, args.ask, **settings)


if __name__ == "__main__":
    main()
