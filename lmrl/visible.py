"""Making untrusted text safe to show on a terminal."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, including escape; line breaks and tabs stay
    "\u2028\u2029\u202a-\u202e\u2066-\u2069"  # separators, and characters that change the writing direction
    "\ud800-\udfff]"  # lone surrogates, which cannot be encoded
)


def visible(text: str) -> str:
    r"""The text with control characters escaped, such as `\x1b`: they could move the cursor or recolour the
    terminal."""
    return _UNSEEN.sub(lambda match: ascii(match[0])[1:-1], text)


def plain_console() -> Console:
    """A console that shows text as it is: `[b]` is no markup, `:smile:` no emoji, and numbers have no colour."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)
