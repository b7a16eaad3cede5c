"""The agent of `task.tools`: the policy answers, its tool calls are run, and it reads their results, until it makes no
more calls, or their results no longer fit its context."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from pydantic import Field

from lmrl.recipe.base import Section
from lmrl.serve.requests import CONTEXT_FULL
from lmrl.tools.functions import CHARACTERS, SECONDS, OfferedTool, ToolBox
from lmrl.trajectories.trajectory import Messages


class LoopOptions(Section):
    """`task.options` with `task.tools`."""

    prompt: str = "prompt"
    """The row's column with the question, text or messages."""
    system: str | None = None
    """A message that comes first."""
    rounds: int = Field(8, ge=1)
    """Maximum number of replies; the last one ends the episode even if it calls tools."""
    seconds: float = Field(SECONDS, gt=0)
    """Time limit of a call."""
    characters: int = Field(CHARACTERS, ge=1)
    """Maximum length of a result."""


class ToolLoop:
    """Plays an episode; the answer is the policy's last reply."""

    def __init__(self, tools: list[OfferedTool], options: LoopOptions):
        self.tools, self.options = tools, options

    async def __call__(self, row: dict[str, Any], client: Any) -> dict[str, Any]:
        options = self.options
        given = row.get(options.prompt)
        if not isinstance(given, str | list):
            raise TypeError(
                f"the row's '{options.prompt}' (task.options.prompt) is {given!r:.60}; expected text or messages, and the "
                f"row has {', '.join(row)}"
            )
        box = ToolBox(self.tools, options.seconds, options.characters)
        messages: Messages = [{"role": "system", "content": options.system}] if options.system else []
        messages += [{"role": "user", "content": given}] if isinstance(given, str) else given
        described = {"tools": [tool.described for tool in self.tools]} if self.tools else {}
        used = 0
        words = ""
        for number in range(options.rounds):
            try:
                answer = await client.chat.completions.create(model="policy", messages=messages, **described)
            except Exception as error:  # of the openai package, or of the small client
                if number and getattr(error, "code", None) == CONTEXT_FULL:
                    break
                raise
            message = answer.choices[0].message
            words = message.content or ""
            if not message.tool_calls or number == options.rounds - 1:
                break
            calls = [one.model_dump() if hasattr(one, "model_dump") else dict(one) for one in message.tool_calls]
            results = await asyncio.gather(
                *[box.run(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
            )
            messages.append({"role": "assistant", "content": message.content, "tool_calls": calls})
            for call, result in zip(calls, results, strict=True):
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
            used += len(calls)
        return {"answer": words, "tool_calls": used, "tool_errors": box.failed}
