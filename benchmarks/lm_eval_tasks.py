"""lmrl compared with lm-eval's hf backend on the same model, tasks and data: whether scores are equal, and which is faster.

    python benchmarks/lm_eval_tasks.py        # some minutes on one core; needs pip install lm-eval==0.4.13

A random Llama in float32 and rows drawn here, in the schema of ARC, HellaSwag, MMLU and GSM8K, so nothing is downloaded. Both run
lm-eval's own tasks, one after the other, three times each; seconds are the minimum of the three for answering all requests, without
loading tasks and models.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lmrl.evaluation.bridges import HarnessOptions
from lmrl.evaluation.harness import PolicyLM, manager_of
from lmrl.policy.load import open_policy

TASKS = {
    "arc_easy": "arc/arc_easy.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "mmlu": "mmlu/default/mmlu_anatomy.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}
ROWS = {"arc_easy": 100, "hellaswag": 60, "mmlu": 100, "gsm8k": 16}
REPEATS = 3
BATCH = 16
WORDS = [
    "".join(random.Random(number).choices("bdfgklmnprstvz", k=1) + random.Random(-number).choices("aeiou", k=1))
    * (1 + number % 2)
    for number in range(1, 400)
]


def text(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most))).capitalize() + "."


def rows(name: str, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Rows in a benchmark's schema."""
    for number in range(ROWS[name]):
        if name == "arc_easy":
            answers = {"text": [text(rng, 2, 12) for _ in range(4)], "label": list("ABCD")}
            yield {"question": text(rng, 15, 40), "choices": answers, "answerKey": rng.choice("ABCD")}
        elif name == "hellaswag":
            context = {"activity_label": text(rng, 1, 2), "ctx_a": text(rng, 30, 60), "ctx_b": "the"}
            yield context | {"endings": [text(rng, 10, 25) for _ in range(4)], "label": str(rng.randrange(4))}
        elif name == "mmlu":
            yield {
                "question": text(rng, 20, 60),
                "choices": [text(rng, 2, 8) for _ in range(4)],
                "answer": rng.randrange(4),
                "subject": "anatomy",
            }
        else:
            yield {"question": text(rng, 10, 30), "answer": f"{text(rng, 5, 15)}\n#### {number}"}


def write(folder: Path) -> None:
    """A model, its tokenizer, and tasks over local files."""
    root, everything = Path(lm_eval.__file__).parent / "tasks", []
    for name, file in TASKS.items():
        data = folder / f"{name}.jsonl"
        lines = [json.dumps(row) for row in rows(name, random.Random(0))]
        everything += lines
        data.write_text("\n".join(lines) + "\n")
        files = json.dumps({"data_files": dict.fromkeys(("train", "validation", "dev", "test"), str(data))})
        (folder / f"local_{name}.yaml").write_text(
            f"include: {root / file}\ntask: local_{name}\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {files}\ntag: null\n"
        )
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(everything, vocab_size=8000, special_tokens=["<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=8000, max_position_embeddings=2048, eos_token_id=0, bos_token_id=None)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
        model.lm_head.weight[0] = 0
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


@contextmanager
def clock(lm: Any, spent: dict[str, float]) -> Iterator[None]:
    """Adds up the seconds in which a language model answers requests."""
    originals = {name: getattr(lm, name) for name in ("loglikelihood", "generate_until")}

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = call(*args, **kwargs)
            spent["seconds"] = spent.get("seconds", 0.0) + time.perf_counter() - began
            return result

        return run

    for name, call in originals.items():
        setattr(lm, name, timed(call))
    try:
        yield
    finally:
        for name in originals:
            delattr(lm, name)


def run(lm: Any, task: str, folder: Path) -> tuple[dict[str, Any], float]:
    spent: dict[str, float] = {}
    with clock(lm, spent):
        found = lm_eval.simple_evaluate(
            lm, tasks=[f"local_{task}"], task_manager=manager_of(str(folder)), bootstrap_iters=0
        )
    return found, spent["seconds"]


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        path = str(folder / "model")
        theirs = HFLM(pretrained=path, dtype="float32", device="cpu", batch_size=BATCH)
        ours = PolicyLM(open_policy(path), HarnessOptions())
        print("| task | requests | scores | largest difference of a log-likelihood | lm-eval hf | lmrl | ratio |")
        print("|---|---|---|---|---|---|---|")
        for task in TASKS:
            both = [[run(lm, task, folder) for lm in (theirs, ours)] for _ in range(REPEATS)]
            (one, _), (other, _) = both[0]
            seconds = [min(pair[side][1] for pair in both) for side in (0, 1)]
            samples = [found["samples"][f"local_{task}"] for found in (one, other)]
            results = [
                {key: value for key, value in found["results"][f"local_{task}"].items() if "," in key}
                for found in (one, other)
            ]
            answers = [[one[0] for sample in side for one in sample["resps"]] for side in samples]
            if task == "gsm8k":
                gap = f"{sum(a == b for a, b in zip(*answers, strict=True)) // 2} of {ROWS[task]} completions equal"
            else:
                gap = f"{max(abs(a[0] - b[0]) for a, b in zip(*answers, strict=True)):.1e}"
            same = "equal" if results[0] == results[1] else f"{results[0]} and {results[1]}"
            print(
                f"| {task} | {len(answers[0]) // (2 if task == 'gsm8k' else 1)} | {same} | {gap} | {seconds[0]:.1f} s | "
                f"{seconds[1]:.1f} s | {seconds[0] / seconds[1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
