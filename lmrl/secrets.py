"""Keys, tokens and passwords: they are kept out of run folders and printed text.

A recipe is written to the run folder, so it must not contain secrets: it names an environment variable, `${NAME}`,
which is read where the value is used. Secrets in messages, which may quote a server or a library, are masked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from lmrl.errors import RecipeError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Addresses that only this machine reaches: a server there needs no key."""
MASK = "***"
SHORTEST = 6
"""Shorter values of environment variables are not masked: they would occur in ordinary text."""
REFERENCE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
NAMED = r"(?:api|access|secret|private|auth)[-_]?key|(?:access|auth|api|hf|hub|secret|bearer)[-_]?token|password|passwd|secret|credentials?"
NAME = re.compile(rf"(?:.*[-_.])?(?:{NAMED}|token|authorization)", re.IGNORECASE)
"""Keys whose text is a secret."""
NO_SECRET = re.compile(
    r".*(?:eos|bos|pad|unk|sep|cls|mask|stop|start|end|special|image|next|first|last)[-_]?token", re.IGNORECASE
)
VARIABLE = re.compile(r".*(?:_|\b)(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)", re.IGNORECASE)
"""Names of environment variables whose values are masked."""
SHAPES = re.compile(
    r"\b(?:sk-[\w-]{16,}|hf_[A-Za-z0-9]{16,}|gh[opsu]_[A-Za-z0-9]{20,}|xox[abp]-[\w-]{10,}|AKIA[0-9A-Z]{16})"
)
"""Patterns of the tokens of well-known services."""
HEADER = re.compile(r"(?:bearer\s+\S{8,}|basic\s+[A-Za-z0-9+/]{6,}={1,2})", re.IGNORECASE)
IN_TEXT = re.compile(
    rf"(?i)(\b(?:[\w.-]*[-_.])?(?:{NAMED})\b[\"']?\s*[=:]\s*[\"']?|\btoken=|\bbearer\s+)(?!\$\{{)[^\s\"',;}}&)]{{4,}}"
)
IN_URL = re.compile(r"(?<=://)[^/\s@]+@")

_known: set[str] = set()


def remember(value: str | None) -> None:
    """Mask this value from now on."""
    if value and len(value) >= SHORTEST:
        _known.add(value)


def redact(text: str) -> str:
    """The text without secrets: those in the environment, those that recipes name, and text that looks like one."""
    values = _known | {
        value
        for name, value in os.environ.items()
        if len(value) >= SHORTEST and VARIABLE.fullmatch(name) and " " not in value
    }
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, MASK)
    text = IN_URL.sub(f"{MASK}@", text)
    text = IN_TEXT.sub(lambda match: match[1] + MASK, text)
    return SHAPES.sub(MASK, text)


def plain_url(url: str) -> str:
    """An address for messages: without user, password and query."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def expand(value: Any, key: str) -> Any:
    """Options with the environment's values in place of `${NAME}`. Raises RecipeError for an unset variable."""
    if isinstance(value, dict):
        return {name: expand(one, f"{key}.{name}") for name, one in value.items()}
    if isinstance(value, list):
        return [expand(one, f"{key}.{index}") for index, one in enumerate(value)]
    name = reference(value)
    if name is None:
        return value
    if not os.environ.get(name):
        raise RecipeError(f"{key}: the environment variable {name} is not set")
    remember(os.environ[name])
    return os.environ[name]


def reference(value: Any) -> str | None:
    """The variable that a recipe's value names; None if it names none."""
    match = REFERENCE.fullmatch(value) if isinstance(value, str) else None
    return match[1] if match else None


def remember_named(value: Any) -> None:
    """Mask the values that options name as `${NAME}` or `..._env: NAME`, even if a worker process reads them."""
    if isinstance(value, list):
        for one in value:
            remember_named(one)
    for key, one in value.items() if isinstance(value, dict) else ():
        if isinstance(one, str) and str(key).endswith("_env"):
            remember(os.environ.get(one))
        elif name := reference(one):
            remember(os.environ.get(name))
        else:
            remember_named(one)


def check_no_secrets(recipe: Any) -> None:
    """Raise RecipeError for a recipe that contains a secret, without repeating the secret."""
    for keys, advice in _found(recipe.model_dump(), ()):
        raise RecipeError(f"{'.'.join(map(str, keys))}: {advice}")


def _found(value: Any, keys: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], str]]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _found(one, (*keys, key))
    elif isinstance(value, list | tuple):
        for index, one in enumerate(value):
            yield from _found(one, (*keys, index))
    elif isinstance(value, str) and value and reference(value) is None and is_secret(keys[-1], value):
        fix = "leave it out; keys of hubs and trackers are read from the environment (HF_TOKEN, WANDB_API_KEY)"
        if _expanded(keys):
            fix = "put it into an environment variable, and write ${NAME} here"
        yield keys, f"this is a secret, and a run folder holds its recipe: {fix}"


def _expanded(keys: tuple[Any, ...]) -> bool:
    """True for keys in which `${NAME}` is replaced: a reward's address, and options of rewards, environments and
    objectives."""
    own = keys[2:] if keys[:1] == ("stages",) else keys
    if own[:2] == ("task", "rewards"):
        return own[3:4] in (("url",), ("options",))
    return own[:1] in (("task",), ("objective",)) and own[1:2] != ("prompts",)


def is_secret(key: Any, value: str) -> bool:
    """True if a key's name says that its text is a secret, or the text looks like one."""
    named = NAME.fullmatch(str(key)) and not NO_SECRET.fullmatch(str(key))
    if (
        named and len(value) >= SHORTEST and not re.search(r"\s", value)
    ):  # a shorter text, or one of several words, is not a secret
        return True
    if SHAPES.search(value) or HEADER.fullmatch(value):
        return True
    if "://" not in value:
        return False
    try:
        parts = urlsplit(value)
        return "@" in parts.netloc or any(NAME.fullmatch(name) for name, _ in parse_qsl(parts.query))
    except ValueError:
        return False
