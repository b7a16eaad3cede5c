"""A suite of prompts, and a log of it."""

import json

import pytest

import lmrl


@pytest.fixture(scope="module")
def prompts_suite(tmp_path_factory):
    """A suite of nine prompts with two rewards."""
    folder = tmp_path_factory.mktemp("suite")
    rows = [{"prompt": f"say {number}", "answer": number, "note": [1] if number else "text"} for number in range(9)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judge.py").write_text(
        "def even(completions, **columns):\n    return [float(len(text) % 2 == 0) for text in completions]\n\n\n"
        "def letters(completions, **columns):\n    return [{'score': float(len(text)), 'half': len(text) / 2} for text in completions]\n"
    )
    (folder / "suite.yaml").write_text(
        "task:\n  prompts: {path: prompts.jsonl}\n"
        "  rewards: [{function: judge.py:even}, {function: judge.py:letters, weight: 0}]\n"
        "rollouts: {max_new_tokens: 4}\nsamples: 2\nmetrics: [reward, letters]\n"
    )
    (folder / "longer.yaml").write_text(
        "task:\n  prompts: {path: prompts.jsonl}\n  rewards: [{function: judge.py:letters}]\nmetrics: [reward, best@2]\n"
    )
    return folder / "suite.yaml"


@pytest.fixture(scope="module")
def logged(tiny_folder, prompts_suite, tmp_path_factory):
    """A finished log, and its report."""
    folder = tmp_path_factory.mktemp("logs") / "log"
    return folder, lmrl.evaluate(tiny_folder, prompts_suite, log=folder, part=4)
