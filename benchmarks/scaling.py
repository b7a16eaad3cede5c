"""The cost of a token as a function of samples per step, sequence length, vocabulary and number of processes.

    python benchmarks/scaling.py [--model FOLDER] [--tables samples lengths vocabulary processes] [--rounds 3]

A token's cost is the time of a whole PPO step (rollout, rewards, preparation, two epochs of updates) divided by the tokens that
the policy has sampled and been trained on in it. Each setting trains in a separate process, in turn with the others of its
table; ratios are to the table's first line in the same round. `vocabulary` and `processes` use small models from
scratch of the size of recipe random_walks/ppo (64 wide, two layers); `samples` and `lengths` too, or the model of --model, with
LoRA as in recipe sentiment/ppo.

- samples: the same work for more episodes. Nothing should cost more per token.
- lengths: the same number of episodes with more tokens each. Attention grows, and the cache that rollouts read.
- vocabulary: the projection to it grows, and with it the sampling of tokens; everything else stays the same.
- processes: a step's episodes divided among processes, one thread each. Half the cost would be ideal.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _peers import assignments, in_turn, lmrl_train, median, seconds, write_json


@dataclass
class Setting:
    """One line of a table. The overrides include at least the episodes per step, `rollouts.prompts` and `rollouts.samples`."""

    label: str
    recipe: str
    overrides: dict[str, Any] = field(default_factory=dict)
    processes: int = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--model", help="folder of a causal LM for the tables of samples and lengths")
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 256], help="episodes per step")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512], help="new tokens")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[1024, 8192, 65536])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="steps, of which the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for table in args.tables:
            settings = {setting.label: setting for setting in TABLES[table](args)}

            def run(label: str, number: int, settings: dict = settings) -> dict:
                return measure(args, settings[label], Path(scratch) / f"{label}-{number}")

            print(f"\n{table}:")
            results = in_turn(settings, args.rounds, run)
            found[table] = {"results": results, "ratios": print_table(results)}
    write_json(args.json, found)


# ----------------------------------------------------------------------------------------------------------------- tables
def samples(args: argparse.Namespace) -> list[Setting]:
    recipe, own = base(args)
    return [
        Setting(f"{count} samples", recipe, own | {"rollouts.prompts": count, "rollouts.samples": 1})
        for count in args.samples
    ]


def lengths(args: argparse.Namespace) -> list[Setting]:
    recipe, own = base(args)
    own |= {"rollouts.prompts": 16, "rollouts.samples": 1}
    return [Setting(f"{length} tokens", recipe, own | {"rollouts.max_new_tokens": length}) for length in args.lengths]


def vocabulary(args: argparse.Namespace) -> list[Setting]:
    sizes = {"rollouts.prompts": 32, "rollouts.samples": 1}
    return [Setting(f"{size} entries", "random_walks/ppo", small_model(args, size) | sizes) for size in args.vocabulary]


def processes(args: argparse.Namespace) -> list[Setting]:
    """The unchanged recipe: 512 episodes, 4 minibatches, two epochs."""
    own = ONE_STAGE | {"rollouts.prompts": 64, "rollouts.samples": 8}
    return [Setting(f"processes: {count}", "random_walks/ppo", own, count) for count in args.processes]


TABLES = {"samples": samples, "lengths": lengths, "vocabulary": vocabulary, "processes": processes}
ONE_STAGE = {"stages": "{}", "objective.value_warmup_steps": 0}


def base(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The recipe and overrides that a table is based on."""
    if args.model is None:
        return "random_walks/ppo", small_model(args, 4096)
    return "sentiment/ppo", {"model.path": args.model, "objective.value_warmup_steps": 0}


def small_model(args: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """A model from scratch hardly ever ends a turn, because the end is one of many vocabulary entries."""
    return ONE_STAGE | {
        "model.config.vocab_size": vocabulary,
        "model.config.max_position_embeddings": max(32, *args.lengths) + 8,
        "rollouts.max_new_tokens": 32,
        "objective.minibatches": 1,
    }


# ------------------------------------------------------------------------------------------------------------ measurement
def measure(args: argparse.Namespace, setting: Setting, output: Path) -> dict[str, Any]:
    overrides = setting.overrides | {
        "training.steps": args.steps,
        "training.threads": args.threads,
        "training.checkpoint_every": 0,
        "evaluation.suite": "null",
        "evaluation.diagnostics_every": 0,
    }
    lines = lmrl_train(setting.recipe, assignments(overrides), output, args.threads, setting.processes)[1:]
    episodes = setting.overrides["rollouts.prompts"] * setting.overrides["rollouts.samples"]
    tokens = [episodes * line["length"] for line in lines]
    costs = [1e6 * seconds(line) / own for line, own in zip(lines, tokens, strict=True)]
    return {
        "us_per_token": round(statistics.median(costs), 2),
        "step_seconds": round(statistics.median(map(seconds, lines)), 4),
        "tokens": statistics.mean(tokens),
        "peak_mb": max(line["time"]["peak_memory_mb"] for line in lines),
    }


def print_table(results: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Print medians over rounds; returns each round's ratios of costs to the first line's."""
    first = next(iter(results.values()))
    print(f"\n{'':16}{'tokens a step':>14}{'s a step':>10}{'us a token':>12}{'peak MB':>9}   cost to the first line's")
    found = {}
    for label, runs in results.items():
        found[label] = [own["us_per_token"] / other["us_per_token"] for own, other in zip(runs, first, strict=True)]
        cells = [median(runs, key) for key in ("tokens", "step_seconds", "us_per_token", "peak_mb")]
        spread = f"{statistics.median(found[label]):.2f} ({min(found[label]):.2f} to {max(found[label]):.2f})"
        print("{:16}{:14.0f}{:10.3f}{:12.1f}{:9.0f}   {}".format(label, *cells, spread))
    print(f"(median of {len(first)} rounds)")
    return found


if __name__ == "__main__":
    main()
