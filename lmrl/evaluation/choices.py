"""Multiple choice by log-likelihood: the policy's choice is the most likely of the given answers to a prompt.

Scored as lm-eval does: `acc` by the sum over the answer's tokens, `acc_norm` by that sum per character of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmrl.engines.base import Sampling, guidance_of
from lmrl.errors import DataError, RecipeError
from lmrl.policy.likelihood import Continued, likelihoods
from lmrl.policy.policy import Policy
from lmrl.recipe import Choices
from lmrl.rollouts.task import Task
from lmrl.rollouts.templates import compiled
from lmrl.trajectories.readers import Malformed
from lmrl.trajectories.render import Renderer
from lmrl.trajectories.trajectory import Segment, Trajectory, Turn, prompt_text


class Chooser:
    """Answers the prompts of a task by choice. Raises RecipeError for invalid expressions."""

    def __init__(self, policy: Policy, task: Task, choices: Choices):
        self.policy, self.task, self.delimiter = policy, task, choices.delimiter
        self._texts, self._right = compiled(choices.texts, "choices.texts"), compiled(choices.right, "choices.right")
        environment = task.make()
        self.rows, self.column = environment.rows, environment.column

    def play(self, starts: Sequence[int | None], first: int, sampling: Sampling) -> list[Trajectory]:
        """An episode for each prompt: its most likely answer. first: number of the first prompt in the suite.

        Raises RecipeError if Q guides the policy, because nothing is sampled, and DataError for a row without choices.
        """
        if guidance_of(self.policy, sampling) is not None:
            raise RecipeError(
                "choices: answers are scored by the policy's own log-likelihood, without Q: set rollouts.beta=0 and "
                "rollouts.support=0"
            )
        rows = [self.rows[start] for start in starts if start is not None]
        asked = [self._asked(row, start) for row, start in zip(rows, starts, strict=True)]
        wanted = []
        for row, start, (texts, _) in zip(rows, starts, asked, strict=True):
            wanted.append(continued(self.task.renderer, row[self.column], texts, self.delimiter))
            if not all(wanted[-1].continuations):
                raise DataError(f"prompt {start}: an answer of {texts!r:.80} has no token of its own after the prompt")
        found = likelihoods(self.policy, wanted)
        episodes = []
        for place, (row, (texts, right), one, likely) in enumerate(zip(rows, asked, wanted, found, strict=True)):
            totals = [each.total for each in likely]
            best = int(np.argmax(totals))
            segment = Segment()
            segment.observe(one.context)
            segment.act(one.continuations[best], likely[best].logprobs, 0)
            episode = self._episode(row, texts, right, totals, best)
            episode.segments = [segment]
            episode.group = episode.episode = first + place
            episode.start = starts[place]
            episode.place_reward(float(episode.components["acc"] or 0), 0)
            episodes.append(episode)
        return episodes

    def _asked(self, row: dict[str, Any], start: int | None) -> tuple[list[str], int]:
        """The answers of a row, and the number of the right one."""
        try:
            texts, right = self._texts(row), self._right(row)
        except Malformed as error:
            raise DataError(f"prompt {start}: {error}") from error
        if (
            not isinstance(texts, list | tuple)
            or len(texts) < 2
            or not all(isinstance(one, str) and one for one in texts)
        ):
            raise DataError(f"prompt {start}: choices.texts gives {texts!r:.80}; expected a list of two texts or more")
        if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(texts):
            raise DataError(
                f"prompt {start}: choices.right gives {right!r:.40}; expected a number from 0 to {len(texts) - 1}"
            )
        return list(texts), right

    def _episode(
        self, row: dict[str, Any], texts: Sequence[str], right: int, totals: Sequence[float], best: int
    ) -> Trajectory:
        """The choice, and whether it is right, as an episode without tokens."""
        prompt = row[self.column]
        by_length = int(np.argmax(np.array(totals) / [len(text) for text in texts]))
        columns = {name: value for name, value in row.items() if name != self.column}
        acc = float(best == right)
        return Trajectory(
            [],
            prompt_text(prompt),
            texts[best],
            reward=acc,
            components={"acc": acc, "acc_norm": float(by_length == right)},
            columns=columns | {"choices": list(texts), "right": right, "loglikelihoods": list(totals)},
            messages=prompt if isinstance(prompt, list) else None,
            turns=[Turn(prompt, texts[best])],
        )


def continued(renderer: Renderer, prompt: Any, texts: Sequence[str], delimiter: str = "") -> Continued:
    """Tokens of a prompt and of each possible continuation.

    Plain text is tokenized together and split after as many tokens as the prompt has alone, as in lm-eval; white space
    at the prompt's end goes to the continuation. In a dialogue, an answer begins the assistant's turn.
    """
    if renderer.chat or not isinstance(prompt, str):
        return Continued(renderer.first(prompt), [renderer.plain(text) for text in texts])
    context = prompt.rstrip() or prompt
    texts = [prompt[len(context) :] + delimiter + text for text in texts]
    tokens = renderer.first(context)
    return Continued(tokens, [renderer.first(context + text)[len(tokens) :] for text in texts])
