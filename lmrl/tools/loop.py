"""The agent of `task.tools`: the policy answers, its tool calls are run, and it reads their results, until it makes no
more calls."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from lmrl.tools.functions import CHARACTERS, SECONDS, OfferedTool, ToolBox
from lmrl.trajectories.trajectory import Messages


class ToolLoop:
    """Plays an episode; the answer is the policy's last reply. prompt: the row's column with the question, text or
    messages.

    system: a message that comes first. rounds: maximum number of replies; the last one ends the episode even if it
    calls tools.
    """

    def __init__(
        self,
        tools: list[OfferedTool],
        prompt: str = "prompt",
        system: str | None = None,
        rounds: int = 8,
        seconds: float = SECONDS,
        characters: int = CHARACTERS,
    ):
        self.tools, self.prompt, self.system, self.rounds = tools, prompt, system, rounds
        self.seconds, self.characters = seconds, characters

    async def __call__(self, row: dict[str, Any], client: Any) -> dict[str, Any]:
        if self.prompt not in row:
            raise KeyError(f"the row has no '{self.prompt}' (task.options.prompt); it has {', '.join(row)}")
        box = ToolBox(self.tools, self.seconds, self.characters)
        given = row[self.prompt]
        messages: Messages = [{"role": "system", "content": self.system}] if self.system else []
        messages += [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
        described = {"tools": [tool.described for tool in self.tools]} if self.tools else {}
        used = failed = 0
        words = ""
        for number in range(self.rounds):
            answer = await client.chat.completions.create(model="policy", messages=messages, **described)
            message = answer.choices[0].message
            words = message.content or ""
            if not message.tool_calls or number == self.rounds - 1:
                break
            calls = [one.model_dump() if hasattr(one, "model_dump") else dict(one) for one in message.tool_calls]
            results = await asyncio.gather(
                *[box.run(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
            )
            messages.append({"role": "assistant", "content": message.content, "tool_calls": calls})
            for call, result in zip(calls, results, strict=True):
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
            used += len(calls)
            failed += sum(result.startswith("error: ") for result in results)
        return {"answer": words, "tool_calls": used, "tool_errors": failed}
