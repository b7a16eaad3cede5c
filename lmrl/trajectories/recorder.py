"""Recording an episode while it is played."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmrl.trajectories.allowed import AllowedTokens
from lmrl.trajectories.render import Renderer
from lmrl.trajectories.trajectory import Messages, Segment, Trajectory, Turn, as_messages, prompt_text


class Recorder:
    """Records an episode while it is played: text in the trajectory's turns, tokens in its segments.

    history: what the policy sees of the episode, `all` or the last N observations with the turns between them; turns
    share a segment only with `all`. renderer: turns text into context tokens. positions: tokens that the policy has
    positions for; of a last observation that needs more, the beginning is kept (None: all of it).
    """

    def __init__(self, trajectory: Trajectory, renderer: Renderer, history: int | str, positions: int | None = None):
        self.trajectory, self.renderer, self.history, self.positions = trajectory, renderer, history, positions
        self._observation: str | Messages = ""
        self._recent: list[
            tuple[str | Messages, dict[str, Any], list[int]]
        ] = []  # observation, the message that answered, its tokens

    def observe(self, observation: str | Messages) -> list[int]:
        """Add an observation to the trajectory; return the whole context of the action that follows."""
        renderer, segments = self.renderer, self.trajectory.segments
        if not segments:
            self._begin(observation)
        self._observation = observation
        if self.history == "all" and segments:
            said = self.trajectory.turns[-1].message
            segments[-1].observe(renderer.next(observation, segments[-1].tokens[-1], said))
            return list(segments[-1].tokens)
        segment, earlier = Segment(), self._recent
        if renderer.chat:
            dialogue = [message for seen, said, _ in earlier for message in [*as_messages(seen), said]]
            segment.observe(renderer.first(dialogue + as_messages(observation)))
        elif not earlier:
            segment.observe(renderer.first(observation))
        else:
            opening, _, acted = earlier[0]
            segment.observe(renderer.first(opening) + acted)
            for seen, _, acted in earlier[1:]:
                segment.observe(renderer.plain(prompt_text(seen)) + acted)
            segment.observe(renderer.plain(prompt_text(observation)))
        segments.append(segment)
        return list(segment.tokens)

    def act(
        self,
        text: str,
        tokens: list[int],
        logprobs: list[float] | None = None,
        cut: bool = False,
        message: dict[str, Any] | None = None,
        allowed: Sequence[AllowedTokens | None] = (),
    ) -> None:
        """Add the action that answers the last observation to the trajectory.

        cut: True if it ran into the token limit. message: the action, if it calls tools. allowed: see `Segment.act`.
        """
        turns = self.trajectory.turns
        self.trajectory.segments[-1].act(tokens, logprobs, len(turns), allowed)
        if cut:
            self.trajectory.cut_turns.append(len(turns))
        turns.append(Turn(self._observation, text, message=message))
        if isinstance(self.history, int) and self.history > 1:
            self._recent = [*self._recent, (self._observation, message or _assistant(text), tokens)][1 - self.history :]

    def truncate(self, observation: str | Messages) -> None:
        """End with an unanswered observation: the state whose value stands for the rest of the episode."""
        self.observe(observation)
        self.stop()

    def stop(self) -> None:
        """End with the last added observation, which stays unanswered."""
        self.trajectory.terminated = False
        self.trajectory.final_observation = self._observation
        if self.positions is not None:
            self.trajectory.segments[-1].cut(self.positions)

    def _begin(self, observation: str | Messages) -> None:
        self.trajectory.messages = None if isinstance(observation, str) else observation
        self.trajectory.prompt = prompt_text(observation)


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
