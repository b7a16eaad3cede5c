"""`lmrl.evaluate`: score any policy on a suite, or on the task it was trained for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmrl.earlier_calls import forget_earlier_calls
from lmrl.engines.base import check_has_q
from lmrl.engines.remote import Endpoint, RemotePolicy, is_address
from lmrl.errors import RecipeError, RunError, ScoreError
from lmrl.evaluation.bridges import HARNESS, INSPECT, harness_options, harness_task, inspect_options, inspect_task
from lmrl.evaluation.contamination import WORDS, Overlap, find_overlap
from lmrl.evaluation.contenders import Contender, contenders, folder_name, names_of
from lmrl.evaluation.evaluate import Evaluator, Play, played_by
from lmrl.evaluation.log import in_order, is_log, logs_in, play_into_log
from lmrl.evaluation.rescoring import rescore_log
from lmrl.evaluation.scoring import Scores, check_known, check_metrics
from lmrl.evaluation.statistics import is_tie
from lmrl.evaluation.suites import Suite, allow_code, load_suite, own_suite, refuse_unscored
from lmrl.policy.load import open_policy
from lmrl.policy.policy import Policy
from lmrl.process_memory import keep_freed_memory
from lmrl.recipe.files import locate_rewards
from lmrl.run_folders import read_recipe, run_of
from lmrl.trajectories.trajectory import Trajectory

TASK_FILE = "lmrl.json"
"""File next to a checkpoint's weights: the task it was trained on, how it sampled, and the suite that scored it."""
OWN_TASK = "its own task"
"""Takes the place of a suite's name if a policy is scored on the task of its own run."""
OWN_EPISODES, OWN_STARTS = 100, 500
"""For a run's own task: the minimum number of episodes (several from each start state if need be), and the maximum
number of starts."""


@dataclass(frozen=True)
class NamedSuite:
    """A suite as it is played, with its name."""

    suite: Suite
    name: str


@dataclass
class Report:
    suite: str
    """The suite's name, or `OWN_TASK`."""
    policy: str
    rows: dict[str, Scores]
    """By label of what was varied: only `policy`, or `beta 1`, `beta 4`, ..."""
    columns: list[str]
    """The metrics that the suite puts into tables."""
    trajectories: list[Trajectory] = field(repr=False)
    """Of the last row."""
    played: str = ""
    """What was played: how many start states or prompts, which ones, and how often."""

    episodes: dict[str, list[Trajectory]] = field(default_factory=dict, repr=False)
    """The judged episodes of each row."""
    overlap: Overlap | None = None
    """What the prompts share with training data."""
    clean: dict[str, Scores] = field(default_factory=dict)
    """The rows without the prompts that share something; {} if none does, or all do."""

    @property
    def metrics(self) -> Scores:
        """Scores of the report's only row. Raises RecipeError if there are several."""
        if len(self.rows) > 1:
            raise RecipeError(
                f"this report has {len(self.rows)} rows ({', '.join(self.rows)}): take the scores of one from "
                f"`rows`, for instance .rows[{next(iter(self.rows))!r}]"
            )
        return next(iter(self.rows.values()))

    def require(self, floors: Mapping[str, float]) -> None:
        """Raise ScoreError if a metric's mean is below its floor in any row, or a row has no value of it; RecipeError if
        none has."""
        known = list(dict.fromkeys(name for scores in self.rows.values() for name in scores))
        for metric in floors:
            if metric not in known:
                raise RecipeError(
                    f"there is no metric '{metric}' with a floor to meet: this evaluation has {', '.join(known)}"
                )
        low = [
            f"{metric} of {label} is {scores[metric]['mean']:.4g}, below {floor:g}"
            if metric in scores
            else f"{metric} of {label} is not known: no episode has a value of it"
            for metric, floor in floors.items()
            for label, scores in self.rows.items()
            if metric not in scores or not (scores[metric]["mean"] >= floor or is_tie(scores[metric]["mean"], floor))
        ]
        if low:
            raise ScoreError("; ".join(low))

    def to_json(self) -> str:
        scores = {"metrics": self.metrics} if len(self.rows) == 1 else {"rows": self.rows}
        found: dict[str, Any] = {"suite": self.suite, "policy": self.policy, **scores}
        if self.overlap is not None:
            found |= {"overlap": self.overlap.to_plain(), "rows_without_overlap": self.clean}
        return json.dumps(found, indent=2) + "\n"


def evaluate(
    policy: str | Path | Sequence[str | Path],
    suite: str | Path | None = None,
    overrides: Sequence[str] = (),
    checkpoint: str = "final",
    trust_remote_code: bool = False,
    betas: Sequence[float] = (),
    log: str | Path | None = None,
    checkpoints: Sequence[str] = (),
    part: int | None = None,
    run_code: bool = False,
    overlap: Sequence[str | Path] = (),
    overlap_words: int = WORDS,
    endpoint: Endpoint | None = None,
    floors: Iterable[str] = (),
) -> Report:
    """Score a policy: a run folder, a checkpoint, any transformers or peft folder, a GGUF file, a hub name, or an
    address of OpenAI's API, `http://HOST/v1#MODEL`.

    policy: or a list, whose members all play the suite of the first, with the same random numbers. suite: a file or a
    shipped name (default: the suite of the policy's own recipe; without one the recipe's own task: fresh episodes of
    its environment, or its held-out prompts). A suite that follows runs, as the shipped ones do, scores a policy made
    by lmrl on the task it was trained for (its graph, its held-out prompts); `overrides` such as `task.graph=7` or
    `samples=4` change the suite.
    checkpoint: for a run, `final`, `best` or `step-N`; checkpoints: several of these, or `["all"]`.
    betas: weights of Q to try one after the other, for a policy with Q heads (0: without Q).
    log: a folder that gets every episode (see lmrl/evaluation/log.py), with a subfolder for each row if there are
    several; an evaluation that was stopped resumes there. part: episodes of a log that are played together and written
    at once.
    run_code: allow a suite to run code that the policy writes.
    overlap: runs or files whose training data is searched for the suite's prompts, by n-grams of `overlap_words` words.
    A suite `lm-eval:TASK` is a task of lm-eval, with the overrides of `HarnessOptions`; `inspect:TASK` one of
    inspect_ai, with those of `InspectOptions`.
    endpoint: how requests are sent to addresses.
    floors: metrics that `Report.require` will be asked about: an unknown one is refused before anything is played, if
    it can be known by then.
    """
    forget_earlier_calls()
    policies = names_of(policy)
    found = contenders(policies, checkpoint, checkpoints)
    if (task := harness_task(suite)) is not None:
        if betas or log is not None or part is not None or overlap:
            raise RecipeError(
                f"--suite {suite}: it does not support --beta, --log, --log-every or --overlap: leave them out"
            )
        return _harness_report(task, found, overrides, trust_remote_code, run_code)
    if (task := inspect_task(suite)) is not None:
        if betas or part is not None or overlap:
            raise RecipeError(f"--suite {suite}: it does not support --beta, --log-every or --overlap: leave them out")
        return _inspect_report(task, found, overrides, trust_remote_code, log, run_code)
    rows: dict[str, Scores] = {}
    episodes: dict[str, list[Trajectory]] = {}
    plays: dict[str, Play] = {}
    given: NamedSuite | None = None
    shared = Overlap(list(map(str, overlap)), overlap_words) if overlap else None
    for contender in found:
        evaluator = evaluator_for(
            contender, suite, overrides, trust_remote_code, given=given, run_code=run_code, endpoint=endpoint
        )
        if log is None:
            refuse_unscored(evaluator.suite)
        check_known(floors, evaluator.suite, "--fail-under")
        if shared is not None:  # before anything is played
            find_overlap(shared, evaluator.suite, evaluator.task, evaluator.starts())
        given = NamedSuite(evaluator.suite, evaluator.name)
        for label, scores, played in score_rows(evaluator, contender, betas, log, len(found) > 1, part):
            rows[label], episodes[label] = scores, played
            plays[label] = Play(evaluator.played, evaluator.planned, len(played))
    names = ", ".join(policies)
    report = Report(evaluator.name, names, rows, evaluator.suite.metrics, played, played_by(plays), episodes, shared)
    if shared is not None and 0 < len(shared.shared) < len(shared.prompts):
        kept = {label: shared.clean(own) for label, own in episodes.items()}
        report.clean = {label: evaluator.report(own) for label, own in kept.items() if own}
    return report


def _harness_report(
    task: str, found: Sequence[Contender], overrides: Sequence[str], trust_remote_code: bool, run_code: bool
) -> Report:
    """Policies on a task of lm-eval."""
    options = harness_options(overrides)
    from lmrl.evaluation.harness import run_harness

    return _foreign_report(
        f"{HARNESS}{task}",
        found,
        trust_remote_code,
        "lm-eval needs log-likelihoods, which an address does not give",
        lambda policy, _: run_harness(policy, task, options, run_code),
    )


def _inspect_report(
    task: str,
    found: Sequence[Contender],
    overrides: Sequence[str],
    trust_remote_code: bool,
    log: str | Path | None,
    run_code: bool,
) -> Report:
    """Policies on a task of inspect_ai. log: a folder for inspect_ai's logs, with a subfolder for each policy if there
    are several."""
    options = inspect_options(overrides)
    if run_code:
        raise RecipeError(f"--suite {INSPECT}{task}: inspect_ai runs code in its own sandboxes: leave --run-code out")
    from lmrl.evaluation.inspect_tasks import run_inspect

    def play(policy: Policy, contender: Contender) -> tuple[Scores, list[Trajectory], str]:
        folder = None if log is None else Path(log) if len(found) == 1 else Path(log) / contender.folder
        return run_inspect(policy, contender.name, task, options, folder)

    unreachable = "inspect_ai can score an address itself (`inspect eval --model openai-api/...`)"
    return _foreign_report(f"{INSPECT}{task}", found, trust_remote_code, unreachable, play)


def _foreign_report(
    suite: str,
    found: Sequence[Contender],
    trust_remote_code: bool,
    unreachable: str,
    play: Callable[[Policy, Contender], tuple[Scores, list[Trajectory], str]],
) -> Report:
    """Policies on another tool's suite, one after the other. unreachable: why addresses are refused. play: returns
    scores, samples as episodes, and a readable description of what was played."""
    from lmrl.accelerators import default_device

    rows, episodes = {}, {}
    for contender in found:
        if is_address(contender.path):
            raise RecipeError(f"--suite {suite}: {unreachable}: name the model itself, a folder or a name on the hub")
        policy = open_policy(contender.path, dtype_of(Path(contender.path)), trust_remote_code)
        policy.to(default_device())
        rows[contender.label], episodes[contender.label], played = play(policy, contender)
        del policy
    names = ", ".join(contender.name for contender in found)
    columns = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    return Report(suite, names, rows, columns, episodes[contender.label], played, episodes)


def dtype_of(checkpoint: Path) -> str:
    """The precision that a checkpoint was trained with; float32 for a checkpoint that is not lmrl's."""
    return str(saved_task(checkpoint)["dtype"]) if (checkpoint / TASK_FILE).is_file() else "float32"


def rescored(
    log: str | Path,
    suite: str | Path | None = None,
    overrides: Sequence[str] = (),
    target: str | Path | None = None,
    run_code: bool = False,
) -> Report:
    """Score the episodes of a log, or of all logs in a folder, again, without playing anything; see `rescore_log`.

    target: a folder for a new log with the new scores, or for one new log per old one. run_code: allow rewards to run
    code that the policy wrote.
    """
    logs = logs_in(log)
    rows, episodes, suites, plays = {}, {}, [], {}
    for label, one in in_order(logs):
        folder = None if target is None else Path(target) / one.folder.name if len(logs) > 1 else Path(target)
        found, rows[label], episodes[label] = rescore_log(one, suite, overrides, folder, run_code)
        suites.append(found)
        plays[label] = Play(one.header["played"], one.episodes, len(episodes[label]))
    name = one.header["suite"]["name"] if suite is None else str(suite)
    return Report(name, str(log), rows, suites[-1].metrics, episodes[label], played_by(plays), episodes)


def score_rows(
    evaluator: Evaluator,
    contender: Contender,
    betas: Sequence[float] = (),
    log: str | Path | None = None,
    several: bool = False,
    part: int | None = None,
) -> Iterator[tuple[str, Scores, list[Trajectory]]]:
    """A policy's rows of a report: label, scores and judged episodes at each beta. The policy is released at the end.

    several: the policy is one of several.
    """
    from lmrl.accelerators import default_device

    log = None if log is None else Path(log).expanduser()
    if betas:
        check_has_q(evaluator.policy, contender.name)
    try:
        evaluator.policy.to(default_device())
        for beta in betas or (None,):
            weight = [] if beta is None else [f"beta {beta:g}"]
            named = several or beta is None
            label, own = (" ".join([name] * named + weight) for name in (contender.label, contender.folder))
            if log is None:
                yield label, *evaluator(beta)
                continue
            alone = not several and len(betas) < 2
            if not alone and is_log(log):
                raise RunError(f"--log: {log} holds the log of a single policy: choose another folder for several")
            folder = log if alone else log / folder_name(own)
            who = {"name": contender.name, "label": label, "path": contender.path}
            yield label, *play_into_log(evaluator, folder, who, beta, part)
    finally:
        evaluator.close()


def evaluator_for(
    policy: str | Path | Contender,
    suite: str | Path | None = None,
    overrides: Sequence[str] = (),
    trust_remote_code: bool = False,
    given: NamedSuite | None = None,
    run_code: bool = False,
    endpoint: Endpoint | None = None,
) -> Evaluator:
    """A saved policy and the suite it is scored on, loaded; see `evaluate`. given: play this suite unchanged.
    endpoint: how requests are sent to an address."""
    keep_freed_memory()
    if not isinstance(policy, Contender):
        (policy,) = contenders([str(policy)])
    path = policy.path
    task, dtype = None, "float32"
    if (Path(path) / TASK_FILE).is_file():
        saved = saved_task(Path(path))
        task, dtype, own = saved["task"], saved["dtype"], saved["suite"]
        suite = suite or own
    if given is not None:
        loaded, name = given.suite, given.name
    else:
        if suite is None:
            if task is None:
                raise RecipeError(f"'{policy.name}' does not say what it was trained for: name a suite, --suite NAME")
            rollouts = saved.get("rollouts") or run_rollouts(Path(path))
            loaded = own_suite(task, rollouts, overrides, f"'{policy.name}'")
        else:
            loaded = load_suite(suite, overrides, task)
        loaded = allow_code(loaded) if run_code else loaded
        name = OWN_TASK if suite is None else str(suite)
    opened = RemotePolicy(path, endpoint) if is_address(path) else open_policy(path, dtype, trust_remote_code)
    evaluator = Evaluator(opened, loaded)
    evaluator.name = name
    if given is None and suite is None:
        size_own(evaluator, {override.partition("=")[0] for override in overrides})
    check_metrics(loaded.metrics, loaded.samples)
    return evaluator


def size_own(evaluator: Evaluator, overridden: set[str]) -> None:
    """Decide how many episodes score a run's own task, unless overrides do."""
    if "episodes" not in overridden and len(evaluator.starts()) > OWN_STARTS:
        evaluator.suite.episodes = OWN_STARTS
    if "samples" not in overridden:
        evaluator.suite.samples = math.ceil(OWN_EPISODES / len(evaluator.starts()))


def saved_task(checkpoint: Path) -> dict[str, Any]:
    """`{"task", "suite", "dtype", "rollouts"}` that a checkpoint was saved with; paths of its run's reward models are
    those of today. Checkpoints of older versions lack `rollouts`."""
    saved: dict[str, Any] = json.loads((checkpoint / TASK_FILE).read_text())
    run = run_of(checkpoint)
    return saved | ({"task": locate_rewards(saved["task"], run)} if run else {})


def run_rollouts(checkpoint: Path) -> dict[str, Any]:
    """The rollout section of the run around a checkpoint; {} for a checkpoint outside its run."""
    run = run_of(checkpoint)
    return read_recipe(run).rollouts.model_dump(mode="json") if run else {}
