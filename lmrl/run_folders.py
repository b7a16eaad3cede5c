"""Finding runs and their checkpoints on disk (see run.py for what a run folder holds)."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from lmrl.errors import RunError
from lmrl.local_names import MODEL_FILES, refuse_missing
from lmrl.recipe import MAIN_STAGE, Recipe
from lmrl.recipe.document import read_yaml
from lmrl.recipe.validation import validate

RECIPE_FILE, VERSIONS_FILE = "recipe.yaml", "versions.json"
STEP = re.compile(r"step-[0-9]+")


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def checkpoints_in(stage: Path) -> list[Path]:
    """Checkpoints in a stage's folder, oldest first; folders with other names (`step-old`) do not count."""
    found = [path for path in (stage / "checkpoints").glob("step-*") if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def checkpoint_names(folder: Path) -> list[str]:
    """Names that `final_checkpoint` accepts for a run's last stage, oldest first; [] if the folder is not a run."""
    stage = folder / "stages" / MAIN_STAGE
    return [path.name for path in checkpoints_in(stage)] + (["final"] if (stage / "final").exists() else [])


def read_recipe(folder: Path) -> Recipe:
    """The resolved recipe of a run folder."""
    if not (folder / RECIPE_FILE).is_file():
        raise RunError(f"{folder} is not a run: it holds no {RECIPE_FILE}")
    return validate(Recipe, read_yaml(folder / RECIPE_FILE))


def run_of(path: Path) -> Path | None:
    """The run that an existing file or folder is, or lies in."""
    around = (path.resolve(), *path.resolve().parents) if path.exists() else ()
    return next((one for one in around if (one / RECIPE_FILE).is_file() and (one / "stages").is_dir()), None)


def final_checkpoint(folder: Path, which: str = "final") -> Path:
    """A checkpoint folder of a run's last stage: `final` (or the newest one), `best`, or `step-N`."""
    stage = folder / "stages" / MAIN_STAGE
    checkpoints = checkpoints_in(stage)
    if which == "best":
        newest = [stage / "final"] if (stage / "final").exists() else checkpoints[-1:]
        best = json.loads((newest[0] / "state" / "trainer.json").read_text())["best"] if newest else None
        which = step_name(best["step"]) if best else "final"
    if which == "final":
        if (stage / "final").exists():
            return stage / "final"
        if checkpoints:
            return checkpoints[-1]
        raise RunError(_no_checkpoint(folder))
    step = which.removeprefix("step-")
    found = stage / "checkpoints" / (step_name(int(step)) if step.isdigit() else which)
    if not found.exists():
        if not checkpoints and not (stage / "final").exists():
            raise RunError(_no_checkpoint(folder))
        names = ", ".join([path.name for path in checkpoints] + ["final", "best"])
        raise RunError(f"{folder} has no checkpoint '{which}'; there are: {names}")
    return found


def _no_checkpoint(folder: Path) -> str:
    resumable = (folder / RECIPE_FILE).is_file()
    resume = f"continue it with: lmrl train {shlex.quote(str(folder))} --resume"
    fix = resume if resumable else f"its {RECIPE_FILE} is missing too"
    return f"{folder}: its last stage has no checkpoint yet: {fix}"


def checkpoint_of(policy: str, which: str = "final", key: str = "policy") -> str:
    """Resolve a policy's name: a checkpoint folder of a run, a model's folder or GGUF file, a name on the hub, or an
    address.

    which: for a run, see `final_checkpoint`. Raises DataError or RunError if it is none of these.
    """
    path = Path(policy).expanduser()
    if policy.startswith(("http://", "https://")):
        if which != "final":
            raise RunError(f"--checkpoint {which}: '{policy}' is an address, not a run folder: leave it out")
        return policy
    if not path.exists():
        refuse_missing(policy, key)
        return policy
    if path.is_file():
        if path.suffix != ".gguf":
            raise RunError(
                f"{key}: '{policy}' is a file: name a run folder, a checkpoint, a model folder or a GGUF file"
            )
        return str(path)
    if (path / RECIPE_FILE).is_file() or (path / "stages").is_dir():
        found = final_checkpoint(path, which)
        if not is_policy(found):
            raise RunError(
                f"checkpoint {found} is incomplete, it holds no model: choose another one, --checkpoint step-N"
            )
        return str(found)
    if which != "final":
        raise RunError(f"--checkpoint {which}: '{policy}' is not a run folder: leave it out")
    if not is_policy(path):
        inner = sorted(one.parent for one in path.glob(f"*/{RECIPE_FILE}"))
        hint = f": did you mean '{inner[-1]}'?" if inner else " (a model's folder holds a config.json)"
        raise RunError(f"{key}: '{policy}' is neither a run folder nor a checkpoint or model{hint}")
    return str(path)


def is_policy(folder: Path) -> bool:
    """True for a folder that is a run, or that holds a model."""
    return any((folder / name).exists() for name in MODEL_FILES)


def latest_run() -> Path:
    """The run folder under `runs/` that was written to last."""
    found = [path.parent for path in Path("runs").glob(f"**/{RECIPE_FILE}") if (path.parent / VERSIONS_FILE).exists()]
    if not found:
        raise RunError("there is no run to resume under runs/: name its folder, lmrl train FOLDER --resume")
    return max(found, key=lambda folder: max(path.stat().st_mtime for path in folder.iterdir()))
