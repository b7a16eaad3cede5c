"""Rewards that compare with a known answer: 1 if right, 0 if wrong, None if the row has no answer."""

from __future__ import annotations

import re
import string
import unicodedata
from functools import cache

from lmrl.reward_models._text import text_of

NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
FINAL = re.compile(r"####\s*(.+)|\\boxed\{([^{}]*)\}", re.MULTILINE)


def _answer_text(wanted: object) -> str:
    """An answer as text: 7 for 7.0, because columns of a table that also have fractions or gaps hold only floats."""
    return str(int(wanted)) if isinstance(wanted, float) and wanted.is_integer() else str(wanted)


def exact(completions: list, answer: list, ignore_case: bool = True, **_) -> list[float | None]:
    """1 if a completion is the row's `answer`, up to white space, Unicode form, a final full stop and, if `ignore_case`, case."""

    def normal(text: str) -> str:
        text = " ".join(unicodedata.normalize("NFKC", text).split()).rstrip(".")
        return text.casefold() if ignore_case else text

    return [
        None if wanted is None else float(normal(text_of(completion)) == normal(_answer_text(wanted)))
        for completion, wanted in zip(completions, answer, strict=True)
    ]


def extracted(
    completions: list,
    answer: list,
    pattern: str | None = None,
    which: int = 0,
    ignore: tuple[str, ...] = (),
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    **_,
) -> list[float | None]:
    """1 if the match of `pattern` in a completion is the row's `answer`, compared like lm-eval's exact_match.

    pattern: a regular expression (None: the whole completion counts); the first group that matched counts. which:
    of several matches, 0 is the first and -1 the last. ignore: regular expressions that are removed from both sides. A
    completion without a match is wrong.
    """
    compiled, removed = re.compile(pattern or "(?s).*"), [re.compile(one) for one in ignore]

    def plain(text: str) -> str:
        for expression in removed:
            text = expression.sub("", text)
        text = text.lower() if ignore_case else text
        return text.translate(NO_PUNCTUATION) if ignore_punctuation else text

    def found_in(text: str) -> str | None:
        if pattern is None:
            return text
        matches = compiled.findall(text)
        if not matches:
            return None
        match = matches[which]
        return (next((one for one in match if one), "") if isinstance(match, tuple) else match).strip()

    rewards: list[float | None] = []
    for completion, wanted in zip(completions, answer, strict=True):
        found = found_in(text_of(completion))
        right = None if wanted is None else float(found is not None and plain(found) == plain(_answer_text(wanted)))
        rewards.append(right)
    return rewards


def numeric(completions: list, answer: list, tolerance: float = 1e-6, **_) -> list[float | None]:
    """1 if a completion's number equals the row's `answer`, up to a relative `tolerance`.

    The number is the one after `####` or in `\\boxed{}`, as in GSM8K and MATH, otherwise the last one. The answer
    may be a number, or text that contains it in the same form. A completion without a number is wrong.
    """
    rewards: list[float | None] = []
    for completion, wanted in zip(completions, answer, strict=True):
        right, found = number_in(str(wanted)), number_in(text_of(completion))
        if right is None:
            rewards.append(None)
        else:
            rewards.append(float(found is not None and abs(found - right) <= tolerance * max(1.0, abs(right))))
    return rewards


def number_in(text: str) -> float | None:
    """The last number of a text, or of its last marked answer."""
    marked = [one or other for one, other in FINAL.findall(text)]
    found = NUMBER.findall(marked[-1] if marked else text)
    return float(found[-1].replace(",", "")) if found else None


def math(completions: list, answer: list, **_) -> list[float | None]:
    """1 if a completion's mathematical answer equals the row's `answer`, by math-verify (pip install 'lmrl[rewards]').

    math-verify's time limits use signals, which only work in a main thread, so they are off: set a `timeout` in the recipe.
    """
    parse, verify = _math_verify()
    rewards: list[float | None] = []
    for completion, wanted in zip(completions, answer, strict=True):
        right = parse(str(wanted), parsing_timeout=None)
        found = parse(text_of(completion), parsing_timeout=None)
        rewards.append(float(verify(right, found, timeout_seconds=None)) if right else None)
    return rewards


@cache
def _math_verify():
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("the reward answers.math needs math-verify: pip install 'lmrl[rewards]'") from error
    return parse, verify
