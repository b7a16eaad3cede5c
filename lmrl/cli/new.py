"""`lmrl new`: a first recipe for your own environment or data."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from lmrl.cli.common import Debug
from lmrl.errors import DataError, LmrlError, RecipeError, did_you_mean


def command(
    file: Annotated[Path, typer.Argument(help="The recipe to write, for instance mine.yaml")],
    environment: Annotated[
        str | None, typer.Option("--environment", "-e", help="An environment: file.py:Name, a dotted path or a name")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="A file of rows with prompts; needs --reward")
    ] = None,
    reward: Annotated[str | None, typer.Option("--reward", help="A reward, file.py:function")] = None,
    pairs: Annotated[str | None, typer.Option("--pairs", help="A file of pairs, chosen and rejected")] = None,
    messages: Annotated[
        str | None,
        typer.Option(
            "--messages", help="A file of dialogues, of prompts with completions, of texts, or of logged episodes"
        ),
    ] = None,
    method: Annotated[str | None, typer.Option("--method", "-m", help="An objective (default: the usual one)")] = None,
    model: Annotated[str | None, typer.Option("--model", help="A hub name, a folder or a run")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny model from scratch (of an environment)")] = False,
    max_turns: Annotated[
        int | None,
        typer.Option("--max-turns", min=1, help="Maximum turns per episode of an environment (default: 100)"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a first recipe for an environment or data of your own, after looking at it."""
    given = {"environment": environment, "prompts": prompts, "pairs": pairs, "messages": messages}
    named = [kind for kind, value in given.items() if value is not None]
    if len(named) != 1:
        raise RecipeError("name one of --environment, --prompts, --pairs and --messages: what the recipe is for")
    (kind,) = named
    if file.exists():
        raise RecipeError(f"{file} exists: choose another name")
    if file.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"{file}: a recipe's file ends in .yaml")
    if (reward is not None) != (kind == "prompts"):
        raise RecipeError("--prompts and --reward go together: the reward judges the completions")
    if max_turns is not None and kind != "environment":
        raise RecipeError(f"--max-turns is for --environment: leave it out with --{kind}")
    if model is not None and tiny:
        raise RecipeError("--model names a model, and --tiny makes one: leave one of them out")
    if model is None and kind != "environment":
        raise RecipeError(f"--{kind} needs --model: a hub name, a folder or a run")

    from lmrl.cli import first_recipe
    from lmrl.recipe.files import load_recipe
    from lmrl.rollouts.task import check_rewards

    known = first_recipe.METHODS[kind]
    method = {"sft": "likelihood", "rm": "reward_model"}.get(method or "", method) or known[0]
    if method not in known:
        raise RecipeError(f"--method {method} does not go with --{kind}{did_you_mean(method, known)}")
    for option, name in (("--environment", environment), ("--reward", reward)):
        path = (name or "").rpartition(":")[0]
        if path.endswith(".py") and not Path(path).is_file():
            raise DataError(f"{option}: file '{path}' does not exist")
    if environment is not None:
        turns = max_turns or 100
        look = first_recipe.look_at_environment(environment, turns, model is None, _tokenizer(model) if model else None)
        text = first_recipe.environment_recipe(environment, method, model, look, turns)
    else:
        rows = given[kind]
        assert rows is not None and model is not None, "rows were given, with a model"
        look = first_recipe.look_at_rows(rows, kind, _tokenizer(model))
        text = first_recipe.data_recipe(kind, rows, method, model, look, reward)
    quoted = shlex.quote(str(file))
    head = f"# Written by `lmrl new`; every line may be changed, and `lmrl show {quoted}` prints all defaults.\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(head + text)
    try:
        check_rewards(load_recipe(file).task)
    except LmrlError:
        file.unlink()
        raise
    for line in look.said:
        print(line)
    print(f"written to {file}; try it: lmrl train {quoted} --dry-run; then: lmrl train {quoted}")


def _tokenizer(model: str) -> object | None:
    """The tokenizer of a local model; None if it would have to be downloaded."""
    from transformers import AutoTokenizer

    from lmrl.policy.origins import newest_checkpoint

    try:
        return AutoTokenizer.from_pretrained(newest_checkpoint(model), local_files_only=True)
    except (OSError, ValueError):
        return None
