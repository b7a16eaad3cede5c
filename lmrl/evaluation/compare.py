"""`lmrl.compare`: policies, logs of evaluations, or both, on the same episodes of one suite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lmrl.errors import RecipeError, RunError
from lmrl.evaluation.api import NamedSuite, evaluator_for, score_rows
from lmrl.evaluation.contenders import contenders
from lmrl.evaluation.log import EvalLog, is_log, logs_in
from lmrl.evaluation.paired import Comparison, Played, check_claims, compare_played, key_of, read_claim
from lmrl.evaluation.scoring import Scoring

SHOWN = 5
"""Samples that changed most, to show."""


def compare(
    policies: Sequence[str | Path],
    suite: str | Path | None = None,
    overrides: Sequence[str] = (),
    checkpoint: str = "final",
    checkpoints: Sequence[str] = (),
    betas: Sequence[float] = (),
    metrics: Sequence[str] = (),
    claims: Sequence[str] = (),
    log: str | Path | None = None,
    shown: int = SHOWN,
    trust_remote_code: bool = False,
) -> Comparison:
    """Compare policies with the first of them: differences of the same samples, with intervals and p-values.

    policies: as of `lmrl.evaluate`, and evaluation logs, of which nothing is played again. suite: what is played (default: that of
    the logs, else of the first policy). claims: `B - A > -0.01` and its like, to be held to by `Comparison.require`.
    metrics: what to compare (default: the suite's). log: a folder to keep what is played.
    Raises RunError for logs of different suites, RecipeError for a metric or policy that there is not.
    """
    wanted = [read_claim(text) for text in claims]
    logs = {str(name): logs_in(name) for name in policies if has_logs(Path(name))}
    given = [one for found in logs.values() for one in found]
    check_same_suite(given)
    if given and (suite is not None or overrides):
        raise RecipeError(
            "--suite: a log has been played on a suite already, which the others play as well: leave it out, or score "
            "logs by other rewards first, lmrl eval --rescore LOG --suite NAME"
        )
    names = [str(name) for name in policies if str(name) not in logs]
    fresh = contenders(names, checkpoint, checkpoints) if names else []
    several = len(fresh) * max(len(betas), 1) + len(given)
    if several < 2:
        raise RecipeError("compare: two policies or more are needed, or several checkpoints of one: --checkpoints all")
    check_claims(wanted, [key_of(number) for number in range(several)])
    played: dict[str, list[Played]] = {
        name: [_played(one, name, found) for one in found] for name, found in logs.items()
    }
    named = NamedSuite(given[0].suite, given[0].header["suite"]["name"]) if given else None
    scoring: Scoring | None = given[0].scoring if given else None
    what = given[0].header["played"] if given else ""
    for contender in fresh:
        evaluator = evaluator_for(contender, suite, overrides, trust_remote_code, given=named)
        named, what = named or NamedSuite(evaluator.suite, evaluator.name), what or evaluator.played
        scoring = scoring or evaluator.scoring()
        label = contender.name if contender.is_alone else contender.label
        for row, _, episodes in score_rows(evaluator, contender, betas, log, several=len(fresh) > 1):
            own = label if contender.is_alone and not betas else f"{label} {row}" if contender.is_alone else row
            played.setdefault(contender.name, []).append(Played(own, episodes))
    ordered = [one for name in dict.fromkeys(map(str, policies)) for one in played[name]]
    return compare_played(named.name, ordered, scoring, metrics, wanted, shown, what)


def has_logs(folder: Path) -> bool:
    """True for a log, and for a folder with logs in it."""
    return is_log(folder) or folder.is_dir() and any(is_log(one) for one in folder.iterdir())


def check_same_suite(logs: Sequence[EvalLog]) -> None:
    """Raise RunError for logs whose episodes cannot be paired: of other suites, or other start states."""
    for one in logs[1:]:
        for key, value in (("version", one.header["suite"]["version"]), ("starts", one.header["starts"])):
            first = logs[0].header["suite"]["version"] if key == "version" else logs[0].header["starts"]
            if value != first:
                raise RunError(
                    f"{logs[0].folder} and {one.folder} are not of the same suite (its {key} differs), so their episodes "
                    "make no pairs: play one suite with both policies, or score both logs by the same rewards, lmrl eval --rescore"
                )


def _played(log: EvalLog, name: str, all_of_name: Sequence[EvalLog]) -> Played:
    trajectories, extra = log.judged()
    label = name if len(all_of_name) == 1 else f"{name} {log.folder.name}"
    return Played(label, trajectories, extra)
