"""Whether lmrl's methods learn at their default options, on twenty-six games that no recipe was tuned on.

    python benchmarks/zoo.py run --half first --jobs 2 --out zoo.jsonl     # goes on where it stopped
    python benchmarks/zoo.py table --out zoo.jsonl
    python benchmarks/zoo.py references
    python benchmarks/zoo.py decoding                                       # what exact Q values earn at a beta

Cells differ only in task, method and the source that the method needs: a small model imitates episodes of random play
(1,000 for online methods, 5,000 for offline ones), and is then improved, online from fresh episodes, offline from the
same 5,000. The second stage sets neither learning rate nor options of the objective. zoo_game.py says what a game is,
zoo_games.py, zoo_gymnasium.py, zoo_later.py and zoo_tuning.py hold the games, and zoo_references.py computes what can be
reached on them.

Scores: 0 is random play; 1 is the best policy that sees what the game shows for online methods, and for offline ones what
can be reached from random play: one step of policy improvement for `mc`, for `ilql` the best such policy among the logged
actions. A policy's return is estimated as the optimum minus the mean regret of its actions, which has the same
expectation as the mean return and less noise.

Sixteen games are split into two halves by a hash of their names: settings are chosen on the first; the second is held
out. Three were written later, when all settings had been chosen, and seven after that, to choose the optimizer on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from zoo_game import Game, State, optimum
from zoo_games import GAMES, SETS, half
from zoo_references import attainable, improved, random_play, within
from zoo_tables import decoding, references, table

HERE = Path(__file__).resolve().parent
ONLINE, OFFLINE = ("ppo", "grpo", "rloo"), ("ilql", "mc")
METHODS = (*ONLINE, *OFFLINE)
BC_LR = 2e-3
"""Learning rate of the imitation stage."""
BC_STEPS, ONLINE_STEPS, OFFLINE_STEPS = 100, 100, 3000
ONLINE_LOG, OFFLINE_LOG = 1000, 5000
"""Logged episodes of random play: to start from; and to learn everything from, which takes many if rewards are noisy."""
NEW_TOKENS = 4
EPISODES = 512
"""Fresh episodes that a policy is scored on."""
SCREEN_SEEDS = 1
"""How many of the seeds --screen takes."""
TIMEOUT = 1800
RUNNING: set[subprocess.Popen] = set()
"""Running cells, which end with this process."""


# ---------------------------------------------------------------------------------------------------------------- cells
def recipe(task: str, method: str, seed: int) -> dict[str, Any]:
    """What `lmrl train` runs for a cell."""
    return {
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "max_position_embeddings": 256,
            },
            "tokenizer": "word",
        },
        "task": task_section(task),
        "stages": {
            "bc": {
                "source": logged(method),
                "objective": {"name": "likelihood"},
                "optimizer": {"lr": BC_LR},
                "training": {"steps": BC_STEPS},
            }
        },
        "source": {"name": "rollouts"} if method in ONLINE else logged(method),
        "rollouts": {"prompts": 16, "samples": 8, "max_new_tokens": NEW_TOKENS},
        "objective": {"name": method},
        "training": {
            "steps": ONLINE_STEPS if method in ONLINE else OFFLINE_STEPS,
            "seed": seed,
            "threads": 1,
            "checkpoint_every": 0,
        },
        "evaluation": {"diagnostics_every": 0},
    }


def logged(method: str) -> dict[str, Any]:
    """The source of random play."""
    episodes = ONLINE_LOG if method in ONLINE else OFFLINE_LOG
    return {"name": "dataset", "player": "random", "episodes": episodes, "batch_size": 32}


def suite(task: str) -> dict[str, Any]:
    return {
        "task": task_section(task),
        "rollouts": {"max_new_tokens": NEW_TOKENS},
        "episodes": EPISODES,
        "metrics": ["return", "regret", "illegal"],
    }


def task_section(task: str) -> dict[str, Any]:
    game = GAMES[task]
    return {"environment": f"zoo_games.{game.__name__}", "history": game.history, "max_turns": game.turns}


def version(task: str, method: str) -> str:
    """Of the code that makes a cell: lmrl's git tree, and the games, references, recipe and suite of the cell."""
    zoo = hashlib.sha256()
    for name in (
        "zoo_game.py",
        "zoo_games.py",
        "zoo_gymnasium.py",
        "zoo_later.py",
        "zoo_tuning.py",
        "zoo_references.py",
    ):
        zoo.update((HERE / name).read_bytes())
    zoo.update(json.dumps([recipe(task, method, 0), suite(task)], sort_keys=True).encode())
    return f"{library_version()}-{zoo.hexdigest()[:8]}"


def library_version() -> str:
    """The git tree hash of lmrl/ as committed; with `+` and a hash of the difference where files have changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=True).stdout

    tree, changed = git("rev-parse", "HEAD:lmrl").strip()[:12], git("status", "--porcelain", "--", "lmrl")
    if not changed:
        return tree
    contents = hashlib.sha256()
    for path in sorted((HERE.parent / "lmrl").rglob("*.py")):
        contents.update(str(path.relative_to(HERE.parent)).encode() + path.read_bytes())
    return f"{tree}+{contents.hexdigest()[:6]}"


# ------------------------------------------------------------------------------------------------------- one cell alone
def run_cell(task: str, method: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train and score one cell in this process; the run stays in `folder`."""
    import lmrl

    recipe_file, suite_file = folder / "cell.json", folder / "suite.json"
    recipe_file.write_text(json.dumps(recipe(task, method, seed)))  # JSON is YAML
    suite_file.write_text(json.dumps(suite(task)))
    begun = time.perf_counter()
    result = lmrl.train(recipe_file, output=folder / "run")
    trained = time.perf_counter() - begun
    game = GAMES[task]
    reference = reference_return(game, method, result.folder)
    stages = {"bc": result.folder / "stages" / "bc" / "final", "final": result.checkpoint}
    metrics = {name: lmrl.evaluate(path, suite=suite_file).metrics for name, path in stages.items()}
    scores = {name: score(game, found["regret"]["mean"], reference) for name, found in metrics.items()}
    regret = metrics["final"]["regret"]
    return {
        "score": scores["final"],
        "ci95": [score(game, bound, reference) for bound in reversed(regret["ci95"])],
        "bc_score": scores["bc"],
        "return": metrics["final"]["return"]["mean"],
        "illegal": metrics["final"]["illegal"]["mean"],
        "reference": reference,
        "train_seconds": round(trained, 1),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def score(game: type[Game], regret: float, reference: float) -> float:
    """0: random play; 1: `reference`."""
    low = random_play(game).value
    return round((optimum(game).value - regret - low) / (reference - low), 4)


def reference_return(game: type[Game], method: str, run: Path) -> float:
    """The expected return that scores 1."""
    visible = attainable(game).value
    if method in ONLINE:
        return visible
    return min(improved(game).value, visible) if method == "mc" else within(game, logged_pairs(run)).value


def logged_pairs(run: Path) -> set[tuple[State, str]]:
    """States and actions of the very episodes that a run learned from, played once more."""
    from lmrl.policy.load import open_policy
    from lmrl.rollouts.task import build_task
    from lmrl.run_folders import read_recipe
    from lmrl.sources.dataset import play_dataset

    done, games = read_recipe(run), []
    task = build_task(done.task, open_policy(str(run / "stages" / "bc" / "final"), "float32").tokenizer)

    def make() -> Game:
        games.append(task.make())
        return games[-1]

    source = logged(done.objective.name)
    play_dataset(replace(task, make=make), source["player"], source["episodes"], done.training.seed)
    return {pair for game in games for pair in getattr(game, "played", ())}


# ------------------------------------------------------------------------------------------------------------ all cells
def run(args: argparse.Namespace) -> None:
    """Run the cells that the file of results does not hold yet for this version of the code."""
    seeds = args.seeds[:SCREEN_SEEDS] if args.screen else args.seeds
    tasks = [task for task in half(args.half) if not args.tasks or task in args.tasks]
    cells = [(task, method, seed) for seed in seeds for task in tasks for method in args.methods]
    done = {key(record) for record in read(args.out) if record.get("error") is None}
    versions = {(task, method): version(task, method) for task in tasks for method in args.methods}
    left = [cell for cell in cells if (*cell, versions[cell[:2]]) not in done]
    print(f"{len(cells)} cells, of which {len(cells) - len(left)} are done", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool, tempfile.TemporaryDirectory(prefix="zoo-") as scratch:
        under_way = {pool.submit(in_process, *cell, args.keep or Path(scratch)): cell for cell in left}
        try:
            for number, future in enumerate(as_completed(under_way), start=1):
                task, method, seed = cell = under_way[future]
                record = {"task": task, "method": method, "seed": seed, "version": versions[cell[:2]]}
                record |= future.result()
                with open(args.out, "a") as file:
                    file.write(json.dumps(record) + "\n")
                said = f"{record['score']:6.2f}" if record.get("error") is None else record["error"].splitlines()[-1]
                print(f"{number}/{len(left)} {task} {method} {seed}: {said} ({record['seconds']:.0f} s)", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in RUNNING:
                process.kill()
            raise


def in_process(task: str, method: str, seed: int, base: Path) -> dict[str, Any]:
    """A cell in a process of its own, on one core; `{"error": ...}` where it failed."""
    folder = base / f"{task}-{method}-{seed}-{time.time_ns()}"
    folder.mkdir(parents=True)
    command = [sys.executable, str(HERE / "zoo.py"), "cell", task, method, str(seed), str(folder)]
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])  # this checkout's lmrl
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    begun = time.perf_counter()
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True, env=environment)
        RUNNING.add(process)
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = f"killed after {TIMEOUT} s"
        finally:
            RUNNING.discard(process)
        log.seek(0)
        said = log.read()
    if code == 0:
        return json.loads((folder / "result.json").read_text()) | {"error": None}
    error = said.strip()[-2000:] if isinstance(code, int) and said.strip() else f"exit: {code}"
    return {"error": error, "seconds": round(time.perf_counter() - begun, 1)}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key(record: dict[str, Any]) -> tuple[str, str, int, str]:
    return record["task"], record["method"], record["seed"], record["version"]


# ---------------------------------------------------------------------------------------------------------------- main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="run cells and append them to a file of results")
    runs.add_argument("--half", choices=(*SETS, "all"), default="first")
    runs.add_argument("--methods", type=_names(METHODS), default=list(METHODS), metavar="NAME,...")
    runs.add_argument("--tasks", type=_names(GAMES), default=[], metavar="NAME,...", help="of the half (default: all)")
    runs.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=[0, 1, 2, 3, 4])
    runs.add_argument("--jobs", type=int, default=1, help="processes at a time, of one core each")
    runs.add_argument("--out", type=Path, default=Path("zoo.jsonl"))
    runs.add_argument("--keep", type=Path, help="leave the runs in this folder")
    runs.add_argument("--screen", action="store_true", help="the first seed alone")
    tables = commands.add_parser("table", help="print results as Markdown")
    tables.add_argument("--out", type=Path, default=Path("zoo.jsonl"))
    tables.add_argument("--tree", metavar="HASH", help="version of lmrl/ (default: that of the last result)")
    commands.add_parser("references", help="print what can be reached on each task")
    commands.add_parser("decoding", help="print what exact Q values earn, by beta")
    cell = commands.add_parser("cell", help="one cell in this process (what `run` calls)")
    cell.add_argument("task", choices=GAMES)
    cell.add_argument("method", choices=METHODS)
    cell.add_argument("seed", type=int)
    cell.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.command == "run":
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("terminated"))
        run(args)
    elif args.command == "table":
        print(table(read(args.out), METHODS, args.tree))
    elif args.command == "references":
        print(references())
    elif args.command == "decoding":
        print(decoding())
    else:
        found = run_cell(args.task, args.method, args.seed, args.folder)
        (args.folder / "result.json").write_text(json.dumps(found))


def _names(known: Iterable[str]):
    """A type for argparse: names from `known`, separated by commas."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    main()
