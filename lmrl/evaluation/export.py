"""Exporting a run, and checking on its suite that the export performs like the run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmrl.errors import RunError
from lmrl.evaluation.api import TASK_FILE, dtype_of, evaluator_for
from lmrl.evaluation.card import write_card
from lmrl.evaluation.distill import Distillation, Fit
from lmrl.evaluation.evaluate import Evaluator
from lmrl.evaluation.hub import prepare, push
from lmrl.evaluation.scoring import Scores
from lmrl.policy.export import save_adapter, save_plain
from lmrl.policy.load import open_policy
from lmrl.policy.policy import Policy
from lmrl.run_folders import checkpoint_of, run_of


@dataclass
class Export:
    """Where an export was written, and its scores next to those of the policy that it was made from."""

    folder: Path
    metric: str = ""
    rows: dict[str, Scores] = field(default_factory=dict)
    loss: float | None = None
    """Points of normalised score (100: from the random player to the optimum) that the export lost; without players to
    scale by, percent of the gain of Q over beta 0."""
    address: str | None = None
    """Its address on the hub, if it was pushed."""

    @property
    def unit(self) -> str:
        """The unit of `loss`."""
        return "% of the gain over beta 0" if "without Q" in self.rows else "points of normalised score"


def export(
    policy: str | Path,
    destination: Path,
    beta: float | None = None,
    adapter_only: bool = False,
    max_loss: float = 5.0,
    check: bool = True,
    checkpoint: str = "final",
    suite: str | None = None,
    trust_remote_code: bool = False,
    push_to: str | None = None,
    private: bool = False,
    distill: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Export:
    """Write a run or checkpoint as an ordinary transformers (or adapter) folder, with a model card.

    beta: fold the Q heads into the vocabulary matrix at this weight; then both policies play the suite, and nothing is
    kept if the export loses more than `max_loss`. distill: instead fit a plain model to the guided policy, in at most
    this many updates (see lmrl/evaluation/distill.py). report: called with lines on the fit's progress. push_to: also
    upload the folder to this repository on the hub, OWNER/NAME. Raises RunError if that fails, or if `destination` is
    not an empty folder.
    """
    if destination.is_file() or destination.is_dir() and any(destination.iterdir()):
        raise RunError(f"{destination} is not an empty folder: choose another destination")
    if destination.suffix == ".gguf":
        raise RunError(
            f"{destination}: export writes a folder for transformers: name a folder, and convert it with llama.cpp's "
            "convert_hf_to_gguf.py"
        )
    if distill is not None and beta is None:
        raise RunError(
            "--distill fits a plain model to the policy that Q values guide: add their weight, --beta B; a run without "
            "Q values is exported without --distill"
        )
    if beta is not None and adapter_only:
        raise RunError("Q heads are folded into the vocabulary matrix, which no adapter holds: drop --adapter-only")
    path = Path(checkpoint_of(str(policy), checkpoint))
    exported = open_policy(str(path), trust_remote_code=trust_remote_code)
    if beta is None and exported.guidance is not None and not adapter_only:
        raise RunError("this policy is guided by Q heads: add their weight, --beta B (0: export without them)")
    api = prepare(push_to, private) if push_to else None
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".export-") as scratch:
        written = Path(scratch) / "model"
        if adapter_only:
            save_adapter(exported, written)
        elif distill is None:
            save_plain(exported, written, beta)
        del exported
        advice = "The support mask and the lower twin cannot be folded in: try --distill or another --beta"
        if distill is not None and beta is not None:
            fit = distilled(path, written, beta, distill, max_loss, check, suite, trust_remote_code, report)
            advice = (
                f"After {fit.steps} updates it is {fit.kl:.3f} nats per token from the guided policy: raise --steps"
            )
        result = Export(destination)
        if check and beta is not None and (beta > 0 or distill is not None):
            result = compare(path, written, destination, beta, suite, trust_remote_code)
            if (result.loss or 0.0) > max_loss:
                raise RunError(
                    f"the export scores {result.rows['exported'][result.metric]['mean']:.3f} on {result.metric} where the "
                    f"guided policy scores {result.rows['guided'][result.metric]['mean']:.3f}: a loss of {result.loss:.1f} "
                    f"{result.unit}, more than the {max_loss:g} allowed. {advice}, or allow it with --max-loss"
                )
        if (path / TASK_FILE).is_file():
            shutil.copy(path / TASK_FILE, written / TASK_FILE)
        write_card(written, run_of(path), push_to or destination.name, checkpoint, beta, distill is not None)
        if destination.exists():
            destination.rmdir()
        written.rename(destination)
    if push_to:
        result.address = push(api, destination, push_to)
    return result


def distilled(
    path: Path,
    written: Path,
    beta: float,
    steps: int,
    max_loss: float,
    check: bool,
    suite: str | None,
    trust_remote_code: bool,
    report: Callable[[str], None],
) -> Fit:
    """Write a plain model that was fitted to the guided policy, until it loses no more than `max_loss` on the suite."""
    run = run_of(path)
    if run is None:
        raise RunError(
            f"--distill needs the run's task and log, but '{path}' lies outside its run: name the run folder"
        )
    work = Distillation(path, run, beta, dtype_of(path), trust_remote_code)
    good = (
        close_on(evaluator_for(path, suite, (), trust_remote_code), beta, max_loss) if check else lambda student: True
    )
    fit = work.fit(steps, good, report)
    save_plain(work.student, written)
    return fit


def close_on(evaluator: Evaluator, beta: float, max_loss: float) -> Callable[[Policy], bool]:
    """A test whether a policy loses at most `max_loss` of the guided policy's score, on episodes that are not used for
    the final scores."""
    guided = evaluator(beta, choosing=True)[0]

    def close(policy: Policy) -> bool:
        exported = Evaluator(policy, evaluator.suite)(choosing=True)[0]
        return points_lost(evaluator, beta, {"guided": guided, "exported": exported}, choosing=True) <= max_loss

    return close


def compare(
    guided: Path,
    exported: Path,
    destination: Path,
    beta: float,
    suite: str | None,
    trust_remote_code: bool,
) -> Export:
    """Play the suite with both policies."""
    evaluator = evaluator_for(guided, suite, (), trust_remote_code)
    rows = {"guided": evaluator(beta)[0]}
    plain = Evaluator(open_policy(str(exported), trust_remote_code=trust_remote_code), evaluator.suite)
    rows["exported"] = plain()[0]
    loss = points_lost(evaluator, beta, rows)
    return Export(destination, evaluator.suite.metrics[0], rows, loss)


def points_lost(evaluator: Evaluator, beta: float, rows: dict[str, Scores], choosing: bool = False) -> float:
    """The score that `exported` loses to `guided`, see `Export.loss`. Adds the row `without Q` if it is needed."""
    metric = evaluator.suite.metrics[0]

    def score(row: dict[str, Any]) -> float:
        return evaluator.normalize(row[metric]["mean"])

    loss = score(rows["guided"]) - score(rows["exported"])
    if evaluator.scale is None:
        rows["without Q"] = evaluator(0.0, choosing=choosing)[0]
        gain = score(rows["guided"]) - score(rows["without Q"])
        loss = 100 * loss / gain if gain > 0 else (0.0 if loss <= 0 else 100.0)
    return loss
