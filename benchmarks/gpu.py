"""lmrl's learner on one GPU: precision, speed, memory and learning, with random weights in the shapes of Qwen2.5. No network.

    python benchmarks/gpu.py all --out gpu.jsonl                  # goes on where it stopped; one JSON line a measurement
    python benchmarks/gpu.py head attention --out gpu.jsonl       # some of: parity head attention update decode step fsdp1 learn
    python benchmarks/gpu.py table --out gpu.jsonl                # what was measured, as Markdown
    python benchmarks/gpu.py wheels FOLDER                        # wheels that a bare machine with torch and transformers lacks
    python benchmarks/gpu.py all --tiny --out FILE                # tiny shapes, also on a CPU: that it runs, not how fast

What is measured:

parity     log-probabilities, gradients and one update of PPO's surrogate against float32 on the CPU, by way of computing
head       log-probabilities of 8,192 tokens over the whole vocabulary, forward and backward: against full logits and plain products
attention  an update's passes over groups of samples that share prompts: padded, end to end, and with each prompt computed once
update     tokens a second and share of the card's peak (MFU) of GRPO's and DPO's update, by checkpointing and compilation
decode     tokens a second of the `hf` engine, against transformers' `generate`
step       a whole GRPO step by its phases
fsdp1      FSDP2 with a single rank: the same loss as without
learn      the same final score of small runs on CPU in float32 and on the GPU in bfloat16

MFU counts 6 FLOPs a parameter (embeddings left out, the vocabulary projection counted) and token, and causal attention; what
checkpointing computes again is not counted. Peak: 989 TFLOP/s, the dense bfloat16 rate of the H100 and H200.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from gpu_checks import MEASUREMENTS
from gpu_checks.timing import reset_peak
from gpu_checks.wheels import wheels


def execute(options: argparse.Namespace, names: list[str]) -> int:
    """Run the measurements that the file does not hold yet; each says in a last line that it is done. One that was stopped or
    failed begins anew, without its earlier lines."""
    lines = read(options.out) if options.out.is_file() else []
    done = {line["measurement"] for line in lines if line.get("done")}
    card = torch.cuda.get_device_name() if options.device.type == "cuda" else "CPU"
    failed = 0
    for name in names:
        if name in done:
            continue
        base = {"measurement": name, "device": card, "torch": torch.__version__}
        started, errors = time.perf_counter(), 0
        if any(line["measurement"] == name for line in lines):
            kept = [line for line in read(options.out) if line["measurement"] != name]
            options.out.write_text("".join(json.dumps(line) + "\n" for line in kept))
        try:
            for found in MEASUREMENTS[name](options):
                errors += "error" in found
                write(options.out, base | found)
            if not errors:
                write(options.out, base | {"done": True, "seconds": time.perf_counter() - started})
            failed += errors
        except Exception as error:  # the others are still worth their time
            failed += 1
            write(
                options.out,
                base | {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-1500:]},
            )
        torch._dynamo.reset()
        reset_peak(options)
    return failed


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, line: dict[str, Any]) -> None:
    line = {name: round(value, 6) if isinstance(value, float) else value for name, value in line.items()}
    print(json.dumps(line), flush=True)
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def table(path: Path) -> None:
    """What was measured, as Markdown."""
    lines = read(path)
    for name in MEASUREMENTS:
        rows = [line for line in lines if line["measurement"] == name and not line.get("done") and "error" not in line]
        if not rows:
            continue
        columns = list(
            dict.fromkeys(key for row in rows for key in row if key not in ("measurement", "device", "torch"))
        )
        print(f"\n### {name} ({rows[0]['device']}, torch {rows[0]['torch']})\n\n| {' | '.join(columns)} |")
        print(f"|{'---|' * len(columns)}")
        for row in rows:
            cells = [f"{row[key]:.4g}" if isinstance(row.get(key), float) else str(row.get(key, "")) for key in columns]
            print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help=f"all, table, wheels FOLDER, or some of {', '.join(MEASUREMENTS)}")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", type=torch.device, help="default: the accelerator")
    options = parser.parse_args()
    if options.what[0] == "wheels":
        return wheels(Path(options.what[1]))
    if options.what == ["table"]:
        return table(options.out)
    names = list(MEASUREMENTS) if options.what == ["all"] else options.what
    if unknown := set(names) - set(MEASUREMENTS):
        parser.error(f"'{sorted(unknown)[0]}' is not measured here: name some of {', '.join(MEASUREMENTS)}")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sys.exit(min(execute(options, names), 1))


if __name__ == "__main__":
    main()
