"""The opponent in a game: `task.opponent`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from lmrl.recipe.base import Section

SELF = "self"
"""Self-play: the policy plays and learns from every side."""


class Opponent(Section):
    """Who plays the other sides of a game, and how a model plays them."""

    player: str
    """`self`: the policy itself, which then learns from every side; a scripted player of the game; a run folder, a checkpoint, a
    model folder or hub name; or an address, `http://HOST/v1#MODEL`."""
    system: str | None = None
    """System message, for instance who a simulated user is; needs a chat template or an address."""
    temperature: float = Field(1.0, ge=0)
    max_new_tokens: int = Field(256, ge=1)
    """Maximum new tokens of an answer."""
    stop: list[str] = []
    """Strings that end an answer; they are removed from it."""
    chat: bool | None = None
    """Use a local model's chat template (null: as `task.chat`). An address always gets chat messages."""
    checkpoint: str = "final"
    """For a run folder: final, best, or step-N."""
    key_env: str | None = None
    """For an address: environment variable with the key (null: OPENAI_API_KEY for OpenAI's own address, no key elsewhere)."""
    timeout: float = Field(120, gt=0)
    """For an address: seconds per request."""
    retries: int = Field(5, ge=0)
    """For an address: retries after a temporary failure; after these the episode fails."""
    connections: int = Field(8, ge=1, le=1024)
    """For an address: concurrent requests."""
    requests_per_minute: float | None = Field(None, gt=0)
    """For an address: limit on the rate of requests (null: none)."""
    cache: str | None = None
    """Folder that caches the answers of an address, so that no request is sent twice."""


def as_opponent(given: Any) -> Any:
    """Turn a bare name into a section."""
    return {"player": given} if isinstance(given, str) else given


OpponentOf = Annotated[Opponent, BeforeValidator(as_opponent, json_schema_input_type=Opponent | str)] | None
