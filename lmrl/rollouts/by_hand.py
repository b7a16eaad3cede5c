"""A person as a scripted player: sees the environment in the terminal, and types the actions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lmrl.trajectories.trajectory import prompt_text

PERSON = "person"
"""Name of the player, as written in the rows."""
Tell = Callable[[str], None]
Ask = Callable[[], str | None]


class InputEnded(BaseException):
    """The user has ended the input in the middle of an episode. Not an Exception, which would fail the episode."""


class ByHand:
    """An environment that shows what happens, and asks a person for the actions of its only player."""

    players = (PERSON,)

    def __init__(self, environment: Any, tell: Tell, ask: Ask):
        """tell: called with text to show. ask: returns the next action; None at the end of the input."""
        self.environment, self.tell, self.ask = environment, tell, ask
        self.num_starts = getattr(environment, "num_starts", None)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        result = self.environment.reset(seed=seed, options=options)
        if isinstance(result, tuple) and result:
            self._show(result[0])
        return result

    def step(self, action: str) -> Any:
        result = self.environment.step(action)
        if isinstance(result, tuple) and len(result) == 5:  # the sampler reports what is wrong with others
            observation, reward, terminated, truncated, _ = result
            if reward:
                self.tell(f"  {reward:+g}" if isinstance(reward, int | float) else f"  {reward}")
            self._show(observation)
            if terminated or truncated:
                self.tell("over" if terminated else "cut off")
        return result

    def act(self, player: str, rng: np.random.Generator) -> str:
        action = self.ask()
        if action is None:
            raise InputEnded
        return action

    def _show(self, observation: Any) -> None:
        if observation:
            self.tell(prompt_text(observation) if isinstance(observation, str | list) else str(observation))
