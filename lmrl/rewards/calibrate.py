"""Agreement of a reward or a judge with known labels: right and wrong answers, or human preferences.

AUC: the probability that a right answer scores higher than a wrong one, with ties counted half. Its interval is for
clustered data (Obuchowski, Biometrics 1997): answers of one row form a cluster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lmrl.errors import DataError, counted
from lmrl.evaluation.statistics import summarize
from lmrl.evaluation.t_distribution import t95
from lmrl.findings import Finding
from lmrl.rewards.pairs import Verdict, ask_pairs, by_score
from lmrl.rewards.rewards import RewardFunction, Scores, answer_to, by_column, score
from lmrl.rewards.workers import Failure
from lmrl.trajectories.fields import take
from lmrl.trajectories.files import open_rows
from lmrl.trajectories.formats import preference
from lmrl.trajectories.readers import Malformed, Row, Rows
from lmrl.trajectories.rows import prompt_of
from lmrl.trajectories.trajectory import Messages, prompt_key, prompt_text

BATCH = 64
BIAS = 0.05
"""A bias is a finding if its interval lies entirely beyond this, on one side."""
FEWEST = 3
"""Minimum rows for a verdict."""


# ------------------------------------------------------------------------------------------------------ right and wrong
def auc(right: Sequence[Sequence[float]], wrong: Sequence[Sequence[float]]) -> dict[str, Any]:
    """AUC with its 95 % interval. right, wrong: for each row, the scores of its right and of its wrong answers.

    Raises ValueError without a right and a wrong score.
    """
    above = np.array([value for row in right for value in row], dtype=float)
    below = np.array([value for row in wrong for value in row], dtype=float)
    if not len(above) or not len(below):
        raise ValueError("an AUC needs right and wrong answers with scores")
    above_place = (_share_below(below, above), _owners(right))
    below_place = (1 - _share_below(above, below), _owners(wrong))
    mean, rows = float(above_place[0].mean()), len(right)
    # Each row's influence on the AUC, through its right and through its wrong answers.
    pull = np.zeros(rows)
    for (places, owners), count in ((above_place, len(above)), (below_place, len(below))):
        np.add.at(pull, owners, (places - mean) / count)
    used = len(set(above_place[1]) | set(below_place[1]))
    found = {"mean": mean, "n": len(above) + len(below), "clusters": used, "holds_for": "other rows like these"}
    deviation = math.sqrt(used / (used - 1) * float((pull**2).sum())) if used > 1 else math.inf
    return found | {"ci95": _logit_interval(mean, deviation, used)}


def _share_below(others: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each value, the share of others below it, with equal ones counted half."""
    ordered = np.sort(others)
    low, high = np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")
    return np.asarray((low + high) / 2 / len(ordered))


def _owners(rows: Sequence[Sequence[float]]) -> np.ndarray:
    return np.repeat(np.arange(len(rows)), [len(row) for row in rows])


def _logit_interval(mean: float, deviation: float, rows: int) -> list[float]:
    """A Student interval of the logit, which stays between 0 and 1; if all rows agree, the bound of a binomial
    share."""
    if rows < 2:
        return [0.0, 1.0]
    if mean in (0.0, 1.0) or deviation == 0:
        least = 0.025 ** (1 / rows)
        return [least, 1.0] if mean >= 0.5 else [0.0, 1 - least]
    half = t95(rows - 1) * deviation / (mean * (1 - mean))
    center = math.log(mean / (1 - mean))
    return [1 / (1 + math.exp(-(center - half))), 1 / (1 + math.exp(-(center + half)))]


def check_gold(function: RewardFunction, path: str, gold: str, wrong: str | None) -> Iterator[Finding]:
    """Check that a reward tells right answers from wrong ones. gold, wrong: columns of the file, with text or a list of
    texts in each row (wrong: None takes the right answers of the next row with different ones). Other columns are
    passed to the reward by name."""
    rows, answers, others = read_answers(path, gold, wrong)
    right = _scores(function, rows, answers, wrong)
    bad = _scores(function, rows, others, wrong)
    unscored = sum(value is None for row in (*right, *bad) for value in row)
    total = sum(map(len, (*answers, *others)))
    if unscored:
        yield Finding("scores gold and wrong answers", False, f"{unscored} of {total} have no score")
    known_right, known_bad = ([[value for value in row if value is not None] for row in part] for part in (right, bad))
    if not any(known_right) or not any(known_bad):
        return
    found = auc(known_right, known_bad)
    low, high = found["ci95"]
    detail = f"AUC {found['mean']:.3f} [{low:.3f}, {high:.3f}] over {counted(found['clusters'], 'row')}"
    means = [float(np.mean([value for row in part for value in row])) for part in (known_right, known_bad)]
    detail += f"; mean score {means[0]:.4g} of gold, {means[1]:.4g} of wrong answers"
    if wrong is None:
        detail += " (which are the gold answers of other rows: --wrong COLUMN names harder ones)"
    yield Finding("tells gold from wrong answers", low > 0.5 and found["clusters"] >= FEWEST, detail)
    if worst := _worst(rows, known_right, known_bad):
        yield Finding("rows where a wrong answer scores at least as high", None, worst)


def read_answers(path: str, gold: str, wrong: str | None) -> tuple[Rows, list[list[str]], list[list[str]]]:
    """Rows of a file, with the right and the wrong answers of each; see check_gold."""
    rows = open_rows(path)
    answers = [_answers(rows, number, gold) for number in range(len(rows))]
    if wrong is None:
        return rows, answers, _of_other_rows(answers, path, gold)
    return rows, answers, [_answers(rows, number, wrong) for number in range(len(rows))]


def samples_of(path: str, gold: str, wrong: str | None) -> dict[str, list[Any]]:
    """A right and a wrong answer of each row in turn, in the form of a reward's samples."""
    rows, answers, others = read_answers(path, gold, wrong)
    both = [(number, one[0]) for number, pair in enumerate(zip(answers, others, strict=True)) for one in pair if one]
    return _columns(rows, both, wrong)


def _answers(rows: Rows, number: int, column: str) -> list[str]:
    """The answers in a row's column, without "". Raises DataError with the row's place."""
    row = rows[number]
    if column not in row:
        raise DataError(f"{rows.where(number)}: has no column '{column}' (columns: {', '.join(row)})")
    given = row[column] if isinstance(row[column], list) else [row[column]]
    if not all(isinstance(one, str | int | float | None) for one in given):
        raise DataError(
            f"{rows.where(number)}: column '{column}' is {row[column]!r:.60}; expected an answer or a list of answers"
        )
    return [str(one) for one in given if one not in (None, "")]


def _of_other_rows(answers: list[list[str]], path: str, gold: str) -> list[list[str]]:
    """For each row, a right answer of the next row that has one which is not right here."""
    count, found = len(answers), []
    for number, own in enumerate(answers):
        following = (answer for step in range(1, count) for answer in answers[(number + step) % count])
        other = next((answer for answer in following if answer not in own), None)
        found.append([] if other is None or not own else [other])
    if not any(found):
        raise DataError(
            f"{path}: all rows have the same answer in column '{gold}', so that none is wrong: name --wrong COLUMN"
        )
    return found


def _scores(
    function: RewardFunction, rows: Rows, answers: list[list[str]], hidden: str | None
) -> list[list[float | None]]:
    """Scores of answers by row. hidden: a column of wrong answers, which the reward does not get."""
    flat = [(number, answer) for number, row in enumerate(answers) for answer in row]
    values: list[float | None] = []
    for first in range(0, len(flat), BATCH):
        values += score(function, _columns(rows, flat[first : first + BATCH], hidden)).values
    found: list[list[float | None]] = [[] for _ in answers]
    for (number, _), value in zip(flat, values, strict=True):
        found[number].append(value)
    return found


def _columns(rows: Rows, part: Sequence[tuple[int, str]], hidden: str | None) -> dict[str, list[Any]]:
    chosen: list[Row] = [rows[number] for number, _ in part]
    try:
        prompts = [prompt_of(row) for row in chosen]
    except Malformed as error:
        raise DataError(f"{rows.where(part[0][0])}: {error}") from error
    given = by_column(chosen).items()
    columns = {name: column for name, column in given if name not in ("prompt", "completion", hidden)}
    completions = [answer_to(prompt, answer) for prompt, (_, answer) in zip(prompts, part, strict=True)]
    return columns | {"prompts": prompts, "completions": completions}


def _worst(rows: Rows, right: list[list[float]], wrong: list[list[float]]) -> str:
    """A description of rows whose right answers do not beat their wrong ones; "" if there are none."""
    bad = [number for number, (a, b) in enumerate(zip(right, wrong, strict=True)) if a and b and min(a) <= max(b)]
    if not bad:
        return ""
    return f"{len(bad)} of {sum(bool(a and b) for a, b in zip(right, wrong, strict=True))}; first: {rows.where(bad[0])}"


# ---------------------------------------------------------------------------------------------------------- preferences
class Pairs:
    """Labelled pairs: prompts, each with the answer that people prefer and the other one."""

    def __init__(self, path: str, limit: int | None = None):
        rows = open_rows(path)
        self.prompts: list[str | Messages] = []
        self.chosen: list[str | Messages] = []
        self.rejected: list[str | Messages] = []
        self.columns: list[Row] = []
        for number in range(min(len(rows), limit or len(rows))):
            row = rows[number]
            try:
                for name in ("chosen", "rejected"):
                    take(row, name, str, list)
                prompt, chosen, rejected = preference(row)
            except Malformed as error:
                raise DataError(f"{rows.where(number)}: {error}") from error
            self.prompts.append(prompt)
            self.chosen.append(chosen)
            self.rejected.append(rejected)
            self.columns.append({name: row[name] for name in row if name not in ("prompt", "chosen", "rejected")})

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def keys(self) -> list[str]:
        """Keys of the prompts; equal keys form a cluster."""
        return [prompt_key(prompt) for prompt in self.prompts]

    def longer(self) -> list[float]:
        """For each pair: 1 if the preferred answer is the longer one, 0 if the other is, 0.5 for equal lengths."""
        lengths = [(len(prompt_text(a)), len(prompt_text(b))) for a, b in zip(self.chosen, self.rejected, strict=True)]
        return [0.5 if a == b else float(a > b) for a, b in lengths]


def by_scores(function: RewardFunction, pairs: Pairs) -> list[list[Verdict]]:
    """Verdicts of a reward that scores answers: 1 if it prefers the answer that people prefer; there is only one
    order."""
    columns = by_column(pairs.columns)
    sides = []
    for answers in (pairs.chosen, pairs.rejected):
        found = Scores()
        for first in range(0, len(pairs), BATCH):
            part = slice(first, first + BATCH)
            batch = {name: column[part] for name, column in columns.items()}
            found.extend(score(function, batch | {"prompts": pairs.prompts[part], "completions": answers[part]}))
        sides.append(found)
    return [[verdict] for verdict in by_score(*sides)]


def by_comparison(prefers: Callable[..., Any], pairs: Pairs) -> list[list[Verdict]]:
    """Verdicts of a judge that compares, with the preferred answer first and then second."""
    columns = by_column(pairs.columns) | {"prompts": pairs.prompts}
    first = ask_pairs(prefers, columns | {"first": pairs.chosen, "second": pairs.rejected}, "calibrate")
    second = ask_pairs(prefers, columns | {"first": pairs.rejected, "second": pairs.chosen}, "calibrate")
    return [[a, b if isinstance(b, Failure) else 1 - b] for a, b in zip(first, second, strict=True)]


def check_pairs(verdicts: Sequence[Sequence[Verdict]], pairs: Pairs) -> Iterator[Finding]:
    """Agreement with the labels, and bias for length and position, each with its 95 % interval over prompts."""
    causes = [next((one for one in orders if isinstance(one, Failure)), None) for orders in verdicts]
    whole = [number for number, cause in enumerate(causes) if cause is None]
    if len(whole) < len(pairs):
        share = 1 - len(whole) / len(pairs)
        yield Finding(
            "judges every pair",
            None if share < BIAS else False,
            f"{len(pairs) - len(whole)} of {len(pairs)} have no verdict; the first: {next(filter(None, causes))}",
        )
    if len(whole) < FEWEST:
        yield Finding("agrees with the labels", False, f"{counted(len(whole), 'pair')}, too few for a verdict")
        return
    keys = [key for key, cause in zip(pairs.keys, causes, strict=True) if cause is None]
    orders = np.array([verdicts[number] for number in whole], dtype=float)
    agreement = orders.mean(1)
    found = summarize(agreement.tolist(), keys, (0, 1), unit="prompt")
    yield Finding("agrees with the labels", found["ci95"][0] > 0.5, f"{_shown(found)} of {len(whole)} pairs")
    longer = np.array(pairs.longer())[whole]
    told = longer != 0.5
    if told.sum() >= FEWEST:
        # If the preferred answer is the longer one, agreeing means preferring the longer; otherwise it means the
        # opposite.
        prefers_longer = np.where(longer == 1, agreement, 1 - agreement)
        bias = summarize(
            (prefers_longer - longer)[told].tolist(),
            [key for key, one in zip(keys, told, strict=True) if one],
            (-1, 1),
            unit="prompt",
        )
        detail = f"prefers the longer answer in {prefers_longer[told].mean():.3f} of the pairs, people in {longer[told].mean():.3f}: "
        yield Finding("no bias for length", _is_small(bias), f"{detail}bias {_shown(bias)}")
    if orders.shape[1] == 2:
        first_wins = (orders[:, 0] + 1 - orders[:, 1]) / 2
        bias = summarize((first_wins - 0.5).tolist(), keys, (-0.5, 0.5), unit="prompt")
        same = float((orders[:, 0] == orders[:, 1]).mean())
        detail = f"the first answer wins in {first_wins.mean():.3f}; {same:.3f} of the verdicts hold in both orders: "
        yield Finding("no bias for position", _is_small(bias), f"{detail}bias {_shown(bias)}")


def _shown(found: dict[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{found['mean']:.3f} [{low:.3f}, {high:.3f}]"


def _is_small(bias: dict[str, Any]) -> bool:
    """True unless the interval lies beyond BIAS on one side."""
    low, high = bias["ci95"]
    return bool(low <= BIAS and high >= -BIAS)
