"""Who plays the other side of a game: `task.opponent`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from lmrl.recipe.base import Section

SELF = "self"
"""The policy itself, whose every side is learned from."""


class Opponent(Section):
    """The other side of a game, and how a model plays it."""

    player: str
    """`self`: the policy itself, both of whose sides are learned from; a scripted player of the game; a run folder, a checkpoint, a
    model's folder or hub name; or an address, `http://HOST/v1#MODEL`."""
    system: str | None = None
    """System message, for instance who a simulated user is; needs a chat template or an address."""
    temperature: float = Field(1.0, ge=0)
    max_new_tokens: int = Field(256, ge=1)
    """Maximum new tokens of an answer."""
    stop: list[str] = []
    """Texts that end an answer, and are cut off."""
    chat: bool | None = None
    """Put what a local model sees through its chat template (null: as `task.chat` says). An address is always asked by chat."""
    checkpoint: str = "final"
    """Of a run folder: final, best, or step-N."""
    key_env: str | None = None
    """Of an address: environment variable with the key (null: OPENAI_API_KEY for OpenAI's own address, no key elsewhere)."""
    timeout: float = Field(120, gt=0)
    """Of an address: seconds a request."""
    retries: int = Field(5, ge=0)
    """Of an address: further requests after a failure that may pass; then the episode has failed."""
    connections: int = Field(8, ge=1, le=1024)
    """Of an address: requests side by side."""
    requests_per_minute: float | None = Field(None, gt=0)
    cache: str | None = None
    """A folder for answers of an address: what was asked before is not asked again."""


def as_opponent(given: Any) -> Any:
    """A name alone stands for a section."""
    return {"player": given} if isinstance(given, str) else given


OpponentOf = Annotated[Opponent, BeforeValidator(as_opponent, json_schema_input_type=Opponent | str)] | None
