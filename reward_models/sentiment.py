"""Sentiment of a completion by VADER, a rule-based scorer with a lexicon of some 7,500 words.

Hutto and Gilbert, "VADER: A parsimonious rule-based model for sentiment analysis of social media text" (ICWSM 2014).
"""

from __future__ import annotations

from functools import cache

from lmrl.reward_models._text import text_of
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def sentiment(completions: list, **_) -> list[float]:
    """VADER's compound score of the completion alone, from -1 (negative) to 1 (positive)."""
    return [_analyzer().polarity_scores(text_of(completion))["compound"] for completion in completions]


def variety(completions: list, **_) -> list[float]:
    """Distinct words over all words, in [0, 1]: falls if a policy repeats itself to exploit the lexicon.

    Meant to be watched, with `weight: 0`.
    """
    words = [text_of(completion).lower().split() for completion in completions]
    return [len(set(found)) / len(found) if found else 0.0 for found in words]
