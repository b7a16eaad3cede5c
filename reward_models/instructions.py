"""Rewards for rule-checkable instructions, as in IFEval (Zhou et al., arXiv 2311.07911).

The rules are those of lm-eval 0.4.13, except for instructions that need a language detector or a sentence splitter: the language of
the answer, all capitals and all lower case in English, the number of sentences, and the number of words in capitals.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from lmrl.reward_models._text import text_of

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
FENCES = ("```json", "```Json", "```JSON", "```")


def follows(
    completions: list, instruction_id_list: list, kwargs: list, loose: bool = False, **_
) -> list[dict[str, float] | None]:
    """1 if a completion follows every instruction of its row, else 0; `share` is the share that it follows. None for a row
    without instructions, or with one that no rule here checks.

    instruction_id_list, kwargs: each row's instructions and their arguments, as in IFEval's file. loose: also accept the
    completion without asterisks, without its first line, its last line, or both.
    """
    rewards: list[dict[str, float] | None] = []
    for completion, names, arguments in zip(completions, instruction_id_list, kwargs, strict=True):
        if not names or not set(names) <= set(CHECKS):
            rewards.append(None)
            continue
        forms = [form for form in (variants if loose else plain)(text_of(completion)) if form.strip()]
        met = [any(followed(name, form, given) for form in forms) for name, given in zip(names, arguments, strict=True)]
        rewards.append({"score": float(all(met)), "share": sum(met) / len(met)})
    return rewards


def plain(text: str) -> list[str]:
    return [text]


def variants(text: str) -> list[str]:
    """The variants of a text that the loose score tries."""
    lines = text.split("\n")
    forms = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return forms + [form.replace("*", "") for form in forms]


def followed(name: str, text: str, arguments: dict[str, Any]) -> bool:
    """True if a text follows one instruction."""
    given = {key: value for key, value in arguments.items() if value}
    return bool(CHECKS[name](text, **given))


def compared(count: int, threshold: int, relation: str) -> bool:
    return count < threshold if relation == "less than" else count >= threshold


# ------------------------------------------------------------------------------------------------------------------ rules
def existence(text: str, keywords: list[str]) -> bool:
    return all(re.search(keyword, text, flags=re.IGNORECASE) for keyword in keywords)


def frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return compared(len(re.findall(keyword.strip(), text, flags=re.IGNORECASE)), frequency, relation)


def forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, flags=re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return compared(text.lower().count(letter.strip().lower()), let_frequency, let_relation)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """True for this number of paragraphs between dividers, ***; empty ones only at the ends."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    empty = [place for place, part in enumerate(parts) if not part.strip()]
    return set(empty) <= {0, len(parts) - 1} and len(parts) - len(empty) == num_paragraphs


def number_words(text: str, num_words: int, relation: str) -> bool:
    return compared(len(re.findall(r"\w+", text)), num_words, relation)


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """True for this number of paragraphs, separated by empty lines, if the nth one starts with the word."""
    parts = text.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    if nth_paragraph > count or not parts[nth_paragraph - 1].strip():
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    said = re.split(r"[.,?!'\"]", word)[0].lower()
    return count == num_paragraphs and said == first_word.lower()


def number_placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    known = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    marker = postscript_marker.strip()
    pattern = known.get(marker, rf"\s*{marker.lower()}.*$")
    return bool(re.search(pattern, text.lower(), flags=re.MULTILINE))


def number_bullet_lists(text: str, num_bullets: int) -> bool:
    starred = re.findall(r"^\s*\*[^\*].*$", text, flags=re.MULTILINE)
    return len(starred) + len(re.findall(r"^\s*-.*$", text, flags=re.MULTILINE)) == num_bullets


def constrained_response(text: str) -> bool:
    return any(option in text for option in OPTIONS)


def number_highlighted_sections(text: str, num_highlights: int) -> bool:
    single = [part for part in re.findall(r"\*[^\n\*]*\*", text) if part.strip("*").strip()]
    double = [part for part in re.findall(r"\*\*[^\n\*]*\*\*", text) if part[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", text)) - 1 >= num_sections


def json_format(text: str) -> bool:
    text = text.strip()
    for fence in FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except ValueError:
        return False
    return True


def title(text: str) -> bool:
    return any(one.lstrip("<").rstrip(">").strip() for one in re.findall(r"<<[^\n]+>>", text))


def two_responses(text: str) -> bool:
    """True for two different answers separated by ******."""
    parts = text.split("******")
    empty = [place for place, part in enumerate(parts) if not part.strip()]
    full = [part.strip() for part in parts if part.strip()]
    return set(empty) <= {0, len(parts) - 1} and len(full) == 2 and full[0] != full[1]


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def no_comma(text: str) -> bool:
    return "," not in text


def quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == '"' and text[-1] == '"'


CHECKS: dict[str, Callable[..., Any]] = {
    "keywords:existence": existence,
    "keywords:frequency": frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "punctuation:no_comma": no_comma,
    "startend:quotation": quotation,
}
"""Rules by instruction name; each takes the text and the instruction's arguments."""
