"""Running a recipe from its first stage to its closing table."""

from __future__ import annotations

import atexit
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console

from lmrl import distributed
from lmrl.earlier_calls import forget_earlier_calls
from lmrl.errors import LmrlError, RunError
from lmrl.evaluation.scoring import Scores
from lmrl.plugins.foreign import as_guest, drop_note, keep_note
from lmrl.plugins.objects import require
from lmrl.process_memory import keep_freed_memory
from lmrl.recipe import MAIN_STAGE, Recipe
from lmrl.recipe.custom import with_custom_options
from lmrl.recipe.files import load_recipe, stages_of
from lmrl.recipe.overrides import listed
from lmrl.rollouts.task import check_rewards
from lmrl.run import CALL_FILE, Run
from lmrl.run_folders import RECIPE_FILE, read_recipe
from lmrl.training.before_after import before_after, check_before_after, flat
from lmrl.training.build import build_stage
from lmrl.training.closing import closing_lines, closing_table, ended_early, warnings_of
from lmrl.training.display import Display
from lmrl.training.extend import extend
from lmrl.training.given_objects import at_hand, objects_as_overrides, with_saved_model
from lmrl.training.interrupt import Interrupt, Interrupted
from lmrl.training.memory_record import compare_memory, predicted_memory_mb
from lmrl.training.parallel.launch import build_strategy, check_launch
from lmrl.training.result import Result
from lmrl.training.tracking import SCORE_COLUMNS, StageTracking, Trackers, check_trackers, open_trackers, score_rows

if TYPE_CHECKING:
    from lmrl.training.reward_model import RewardModelStage
    from lmrl.training.stage import Stage


class StageParts(NamedTuple):
    """What every stage is built from."""

    run: Run
    name: str
    recipe: Recipe
    start: Path | None
    """The checkpoint that it begins from; None: the recipe's model."""
    device: torch.device
    display: Display
    interrupt: Interrupt
    track: StageTracking


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    resume: bool = False,
    display: Display | None = None,
    *,
    model: Any = None,
    prompts: Any = None,
    data: Any = None,
    rewards: Any = None,
    environment: Any = None,
) -> Result:
    """Train a recipe: a `Recipe`, a mapping of the same keys, a file, or a shipped name such as `random_walks/ppo`.

    output: the run folder (default: a new one under `runs/`). resume: continue the run in that folder (or in a run folder in
    place of the recipe), or start it if there is none. SIGTERM and Ctrl-C save a checkpoint and raise `Interrupted`.

    These replace keys of the recipe, and take objects as well as text: model (`model.path`): a transformers model, or
    (model, tokenizer); prompts (`task.prompts.path`) and data (`source.path`): rows as a list, a `datasets.Dataset` or a
    data frame; rewards (`task.rewards`): a function or a list of them; environment (`task.environment`): a class, a
    function that makes one, or an environment, of which episodes play copies. A mapping and a `Recipe` take objects in
    the same places. A given model stays as it is: the run trains its own copy.
    """
    forget_earlier_calls()
    display = display or Display()
    name = str(recipe) if isinstance(recipe, str | Path) else "recipe"
    given = {"model": model, "prompts": prompts, "data": data, "rewards": rewards, "environment": environment}
    overrides = [
        *objects_as_overrides({key: value for key, value in given.items() if value is not None}),
        *listed(overrides),
    ]
    output = None if output is None else Path(output).expanduser()
    if isinstance(recipe, str | Path) and (own := Path(recipe).expanduser() / RECIPE_FILE).is_file():
        if not resume or output is not None:
            raise RunError(f"'{recipe}' is a run folder: continue it with resume=True, without output")
        return resume_run(own.parent, load_recipe(own, overrides) if overrides else None, display)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    elif overrides:
        recipe = load_recipe(recipe.model_dump(mode="json"), overrides)
    require(recipe.model_dump(mode="json"), at_hand(output))
    check_before_after(recipe)
    accelerator = join(recipe)
    folder = distributed.broadcast(output or default_output(name)).resolve()
    if resume and distributed.broadcast((folder / "recipe.yaml").exists()):
        return resume_run(folder, recipe, display)
    if resume:
        display.say(f"there is no run in {folder} to resume: starting over")
    return _execute(_open(lambda: Run.create(folder, recipe), folder), accelerator, display)


def resume_run(folder: Path, recipe: Recipe | None = None, display: Display | None = None) -> Result:
    """Continue a run; recipe: None takes the run's own."""
    folder = folder.resolve()
    before, display = read_recipe(folder), display or Display()
    require((recipe or before).model_dump(mode="json"), at_hand(folder))
    check_before_after(recipe or before)
    accelerator = join(recipe or before)
    notes: list[str] = []

    def reopen() -> Run:
        run = Run.resume(folder, recipe)
        changed = run.changed_files()  # before the recipe is rewritten
        notes.extend(extend(run, before))
        notes.extend(
            f"{name} has changed since the run began: from here on, its new content counts" for name in changed
        )
        return run

    run = _open(reopen, folder)
    for note in notes:
        display.say(f"note: {note}")
    return _execute(run, accelerator, display, resumed=True)


def dry_run(recipe: Recipe, display: Display | None = None) -> None:
    """Try everything a run would do on a tiny scale: every stage, one step, a few episodes, in a temporary folder."""
    check_trackers(recipe)
    data = recipe.model_dump(mode="json")
    for section in [data, *data["stages"].values()]:
        section.setdefault("training", {})["steps"] = 1 + recipe.rollouts.ahead
        if (section.get("source") or {}).get("name") in ("dataset", "mixture"):
            section["source"] |= {"episodes": 8, "batch_size": 2}
        for part in (section.get("source") or {}).get("parts", ()):
            if part.get("log"):
                part["log"]["episodes"], section["source"]["batch_size"] = 8, 2
        if (section.get("source") or {}).get("warmup_steps"):
            section["source"]["warmup_steps"] = 0  # try the update as well
    data["rollouts"] |= {"prompts": 2, "samples": min(recipe.rollouts.samples, 2)}
    data["rollouts"]["max_new_tokens"] = min(recipe.rollouts.max_new_tokens, 8)
    data["tracking"]["trackers"] = []
    data["evaluation"]["episodes"] = 2
    for other in data["evaluation"]["before_after"]:
        other["episodes"] = 2
    if "max_turns" in (data["task"] or {}):
        data["task"]["max_turns"] = min(data["task"]["max_turns"], 5)
    if "value_warmup_steps" in data["objective"]:
        data["objective"]["value_warmup_steps"] = 0  # try the policy's update as well
    with tempfile.TemporaryDirectory(prefix="lmrl-dry-run-") as scratch:
        tiny = Recipe.model_validate(data)
        accelerator = join(tiny)
        folder = distributed.broadcast(Path(scratch))
        _execute(_open(lambda: Run.create(folder, tiny), folder), accelerator, display or Display(), keeps=False)


def default_output(name: str) -> Path:
    """A fresh folder under `runs/`, named after recipe and time."""
    path = Path(name)
    label = "-".join([*path.parts[-2:-1], path.stem]) if not path.is_absolute() else path.stem
    base = Path("runs") / f"{label}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def join(recipe: Recipe) -> Any:
    """Meet the other processes of this launch, if there are any; returns accelerate's Accelerator."""
    from accelerate import Accelerator

    keep_freed_memory()
    check_trackers(recipe)
    accelerator = Accelerator()
    check_launch(accelerator, recipe)
    atexit.register(distributed.shutdown)
    # Else transformers would read weights in the first process of a machine alone, and leave zeros to be filled by a wrapper
    # of accelerate's that lmrl does not use.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if accelerator.distributed_type == "DEEPSPEED":
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        # Models are loaded whole and sharded afterwards, as with every other strategy.
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call,unused-ignore]  # typed in some releases of transformers
    return accelerator


def _open(make: Callable[[], Run], folder: Path) -> Run:
    """The run, as the main process makes it; the others follow it, or fail as it does."""
    run: Run | None = None
    error: LmrlError | None = None
    if distributed.is_main():
        try:
            run = make()
        except LmrlError as problem:
            error = problem
    error, recipe = distributed.broadcast((error, None if run is None else run.recipe))
    if error is not None:
        raise error
    if run is not None:
        return run
    assert recipe is not None  # the main process has a run, or an error
    return Run(folder, recipe, writes=False)


def _execute(run: Run, accelerator: Any, display: Display, resumed: bool = False, keeps: bool = True) -> Result:
    """keeps: False if the run's folder is about to be deleted."""
    if not run.writes:
        display = Display(Console(quiet=True))
    try:
        with open_trackers(run, display) as trackers:
            display.say(f"run folder: {run.folder}", whole=True)
            if resumed and not any(run.final(name).exists() or run.checkpoints(name) for name in stages_of(run.recipe)):
                display.say("there is no checkpoint yet: starting over")
            if run.writes and (call := keep_note(run.folder / CALL_FILE)):
                display.say(f"note: the process before this one ended without a word in the middle of {call}")
            with Interrupt() as interrupt:
                steps = _train_stages(run, accelerator, display, interrupt, trackers)
            scores, columns = closing_table(run)
            shown = {label: {name: row[name] for name in columns if name in row} for label, row in scores.items()}
            trackers.table("result", SCORE_COLUMNS, score_rows(shown), MAIN_STAGE, steps)
            compared, problem = _before_after(run, display)
            trackers.table("before_after", SCORE_COLUMNS, score_rows(flat(compared)), MAIN_STAGE, steps)
    except Interrupted:
        display.say(f"interrupted; continue with: lmrl train {shlex.quote(str(run.folder))} --resume")
        raise
    except LmrlError as error:
        if error.exit_code == 2 and not resumed:  # refused: the folder is free for the next try
            run.discard()
        raise
    finally:
        drop_note()
        run.release()
    if any(shown.values()):
        display.table("Result", {label: row for label, row in shown.items() if row})
    for suite, rows in compared.items():
        display.table(f"{suite}, before and after", rows)
    if problem is not None:
        raise problem
    for name, step, text in warnings_of(run):
        display.say(f"warning at step {step} of stage {name}: {text}")
    ended = ended_early(run, [name for name in stages_of(run.recipe) if run.final(name).exists()][-1])
    if ended:
        display.say(f"ended early: {ended}")
    if keeps and run.final(MAIN_STAGE).exists():
        for line in closing_lines(run):
            display.say(line, whole=True)
    return Result(run.folder, scores, ended, compared)


def _before_after(run: Run, display: Display) -> tuple[dict[str, dict[str, Scores]], LmrlError | None]:
    """Scores of the suites in addition to the task's, and an error that must not keep the run's own results from being shown."""
    if not run.recipe.evaluation.before_after or not distributed.broadcast(run.final(MAIN_STAGE).exists()):
        return {}, None
    base = with_saved_model(run, run.recipe).model.path
    assert base is not None
    try:
        return before_after(run, base, display), None
    except LmrlError as error:
        return {}, error


def _train_stages(run: Run, accelerator: Any, display: Display, interrupt: Interrupt, trackers: Trackers) -> int:
    """Train the stages that are not finished, until one ends early; returns the steps of the finished ones."""
    previous: Path | None = None
    steps, predicted = 0, 0.0
    for name, recipe in stages_of(run.recipe).items():
        if recipe.judges and not run.final(name).exists():
            for task in [recipe.task, *(part.task for part in getattr(recipe.source, "parts", ()) if part.log is None)]:
                check_rewards(task)
    for name, recipe in stages_of(run.recipe).items():
        recipe = with_custom_options(with_saved_model(run, recipe))
        if distributed.broadcast(run.final(name).exists()):
            display.say(f"stage {name} is finished: not run again")
        else:
            start = previous
            if recipe.start != "previous":
                start = None if recipe.start == "model" else run.final(recipe.start)
            track = StageTracking(trackers, name, steps)
            parts = StageParts(run, name, recipe, start, accelerator.device, display, interrupt, track)
            with as_guest(accelerator.device):
                shared = _train_stage(parts, accelerator)
            distributed.barrier()
            predicted = max(predicted, predicted_memory_mb(recipe))
            if not shared:
                compare_memory(run, name, recipe, predicted, display)
            if ended_early(run, name):
                return steps + recipe.training.steps
        if recipe.objective.leaves_policy:
            previous = run.final(name)
        steps += recipe.training.steps
    return steps


def _train_stage(parts: StageParts, accelerator: Any) -> bool:
    """Build a stage of these parts and train it; returns True if its policy was sharded over processes."""
    shared = False
    stage: Stage | RewardModelStage
    if not parts.recipe.objective.leaves_policy:
        stage = _reward_model_stage(parts)
    else:
        strategy = build_strategy(accelerator)
        shared = strategy.synchronized
        stage = build_stage(*parts, strategy)
    for note in stage.notes:
        parts.display.say(note if note.startswith("warning: ") else f"note: {note}")
    stage.train()
    return shared


def _reward_model_stage(parts: StageParts) -> RewardModelStage:
    if distributed.size() > 1:
        raise RunError(
            f"a reward_model stage trains in one process, but this is a launch of {distributed.size()}: train it alone, then "
            "continue the run with --resume, or name its checkpoint as a reward"
        )
    from lmrl.training.reward_model import RewardModelStage  # trl takes seconds to import

    return RewardModelStage(*parts)
