"""`lmrl.compare`: policies, logs of evaluations, or both, on the same episodes of one suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmrl.earlier_calls import forget_earlier_calls
from lmrl.engines.remote import Endpoint
from lmrl.errors import RecipeError, RewardError, RunError
from lmrl.evaluation.api import NamedSuite, evaluator_for, score_rows
from lmrl.evaluation.bridges import is_foreign
from lmrl.evaluation.claims import check_claims, read_claim
from lmrl.evaluation.contenders import contenders, names_of
from lmrl.evaluation.evaluate import Evaluator, Play, played_by
from lmrl.evaluation.identity import suite_version
from lmrl.evaluation.judging import judge_pair, load_judge
from lmrl.evaluation.log import EvalLog, is_log, logs_in
from lmrl.evaluation.paired import Comparison, Played, asked_metrics, compare_played, key_of
from lmrl.evaluation.scoring import Scoring, check_known
from lmrl.evaluation.suites import refuse_unscored
from lmrl.recipe.overrides import listed
from lmrl.run_folders import is_policy

SHOWN = 5
"""How many of the samples that changed most are shown."""


def compare(
    policies: str | Path | Sequence[str | Path],
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
    run_code: bool = False,
    control: str | None = None,
    judge: str | None = None,
    judge_options: Mapping[str, Any] = {},
    endpoint: Endpoint | None = None,
) -> Comparison:
    """Compare policies with the first of them: differences of the same samples, with intervals and p-values.

    policies: as for `lmrl.evaluate`, or evaluation logs, whose episodes are not played again. suite: what is played
    (default: that of the logs, else of the first policy). claims: for instance `B - A > -0.01`, checked by
    `Comparison.require`.
    metrics: what to compare (default: the suite's). log: a folder to save what is played. run_code: allow a suite to
    run code that the policies write. control: a metric, such as `length`; the others are also compared at equal values
    of it.
    judge, judge_options: a judge of pairs of answers, see `load_judge`. endpoint: how requests are sent to addresses.
    Raises RunError for logs of different suites, or of one that was edited since, RecipeError for an unknown metric or policy.
    """
    if is_foreign(suite):
        raise RecipeError(
            f"--suite {suite}: tasks of other tools are scored, not compared: lmrl eval A B --suite {suite}"
        )
    forget_earlier_calls()
    wanted = [read_claim(text) for text in listed(claims, "claims", "B - A > -0.01")]
    metrics = listed(metrics, "metrics", "reward")
    by = None if judge is None else load_judge(judge, judge_options)  # before anything is played
    if isinstance(policies, str | Path):
        if not checkpoints and not betas and suite is not None:
            raise RecipeError(
                f"compare: '{policies}' is a single policy, and '{suite}' is taken as its suite: name policies in a list, "
                f"lmrl.compare(['{policies}', '{suite}'])"
            )
    policies = names_of(policies)
    logs = {name: logs_in(name) for name in policies if has_logs(Path(name))}
    given = [one for found in logs.values() for one in found]
    check_same_suite(given)
    if given and (suite is not None or overrides):
        raise RecipeError(
            "--suite: a log already has a suite, which the other policies play as well: leave --suite out, or score "
            "the logs by other rewards first, lmrl eval --rescore LOG --suite NAME"
        )
    names = [name for name in policies if name not in logs]
    fresh = contenders(names, checkpoint, checkpoints) if names else []
    if not fresh and (checkpoints or betas or log is not None or checkpoint != "final"):
        raise RecipeError(
            "compare: logs are not played again: leave out --checkpoint, --beta and --log, or add a policy"
        )
    count = len(fresh) * max(len(betas), 1) + len(given)
    if count < 2:
        raise RecipeError("compare: two policies or more are needed, or several checkpoints of one: --checkpoints all")
    check_claims(wanted, [key_of(number) for number in range(count)])  # before anything is played
    played = {name: [_logged(one, name, len(found) > 1) for one in found] for name, found in logs.items()}
    plays = {
        own.label: Play(one.header["played"], one.episodes, len(own.trajectories))
        for name, found in logs.items()
        for one, own in zip(found, played[name], strict=True)
    }
    common = Common.of_log(given[0], run_code) if given else None
    for contender in fresh:
        evaluator = evaluator_for(
            contender,
            suite,
            overrides,
            trust_remote_code,
            given=common.suite if common else None,
            run_code=run_code,
            endpoint=endpoint,
        )
        if given:
            check_same_version(given[0], evaluator)
        common = common or Common.of(evaluator)
        if not metrics and by is None and log is None:
            refuse_unscored(evaluator.suite)
        check_known(asked_metrics(metrics, wanted, control), evaluator.suite, "metrics")
        for row, _, episodes in score_rows(evaluator, contender, betas, log, several=len(fresh) > 1):
            label = row if not contender.is_alone else f"{contender.name} {row}" if betas else contender.name
            played.setdefault(contender.name, []).append(Played(label, episodes))
            plays[label] = Play(evaluator.played, evaluator.planned, len(episodes))
    assert common is not None  # there are two policies, logs or fresh ones
    ordered = [one for name in dict.fromkeys(policies) for one in played[name]]
    said = played_by({one.label: plays[one.label] for one in ordered})
    result = compare_played(common.suite.name, ordered, common.scoring, metrics, wanted, shown, said, control)
    if by is not None:
        try:
            result.judged = [judge_pair(by, one, ordered[0], common.scoring.fixed) for one in ordered[1:]]
        except RewardError as error:
            error.comparison = result  # all but the judge's part
            raise
    return result


@dataclass(frozen=True)
class Common:
    """What all policies of a comparison share."""

    suite: NamedSuite
    scoring: Scoring

    @classmethod
    def of(cls, evaluator: Evaluator) -> Common:
        return cls(NamedSuite(evaluator.suite, evaluator.name), evaluator.scoring())

    @classmethod
    def of_log(cls, log: EvalLog, run_code: bool) -> Common:
        suite = log.suite
        if suite.run_code and not run_code:  # permission was given to an earlier call
            suite = suite.model_copy(update={"run_code": False})
        return cls(NamedSuite(suite, log.header["suite"]["name"]), log.scoring)


def has_logs(folder: Path) -> bool:
    """True for a log, and for a folder with logs in it that is not itself a run or a model."""
    folder = folder.expanduser()
    inside = folder.iterdir() if folder.is_dir() and not is_policy(folder) else ()
    return is_log(folder) or any(map(is_log, inside))


def check_same_suite(logs: Sequence[EvalLog]) -> None:
    """Raise RunError for logs whose episodes cannot be paired, because their suites or start states differ."""
    for one in logs[1:]:
        first, other = logs[0].header, one.header
        differs = [
            name
            for name, same in (
                ("version", first["suite"]["version"] == other["suite"]["version"]),
                ("starts", first["starts"] == other["starts"]),
            )
            if not same
        ]
        if differs:
            raise RunError(
                f"{logs[0].folder} and {one.folder} do not share a suite (its {differs[0]} differs), so their "
                "episodes cannot be paired: play one suite with both policies, or score both logs by the same rewards, "
                "lmrl eval --rescore"
            )


def check_same_version(log: EvalLog, evaluator: Evaluator) -> None:
    """Raise RunError if the log's suite means something else today, so that new episodes cannot be paired with its."""
    then, now = log.header["suite"]["version"], suite_version(evaluator.suite, evaluator.task.environment)
    if then != now:
        raise RunError(
            f"{log.folder}: its suite was edited since (version {then} then, {now} now): a file of prompts or rewards, or an "
            "environment. Score the log by today's rewards first, lmrl eval --rescore, or play its policy again"
        )


def _logged(log: EvalLog, name: str, several: bool) -> Played:
    """The episodes of a log. several: True if the user named a folder with several logs."""
    return Played(f"{name} {log.folder.name}" if several else name, log.judged())
