"""Talking to policies: each continues its own copy of the dialogue, in the same tokens as in training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lmrl.coroutines import run
from lmrl.engines.base import Sampling
from lmrl.engines.hf import HFEngine
from lmrl.policy.policy import Policy
from lmrl.trajectories.recorder import Recorder
from lmrl.trajectories.render import Renderer
from lmrl.trajectories.trajectory import Messages, Trajectory


@dataclass
class Speaker:
    """A policy in a dialogue, through its chat template if it has one; otherwise it continues the plain text.

    chat: True to use the template (None: if there is one). history: what it sees of the dialogue, see Recorder.
    """

    name: str
    policy: Policy
    sampling: Sampling
    system: str | None = None
    seed: int = 0
    chat: bool | None = None
    history: int | str = "all"
    turns: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.engine = HFEngine(self.policy)
        template = bool(self.policy.tokenizer.chat_template)
        self.renderer = Renderer(self.policy.tokenizer, template if self.chat is None else self.chat)
        self.forget()

    def forget(self) -> None:
        """Start a new dialogue."""
        self.recorder = Recorder(Trajectory([], "", ""), self.renderer, self.history)

    def say(self, text: str | Messages, heard: Callable[[str], None] = lambda answer: None) -> str:
        """The answer to a message. heard: called with the answer so far whenever tokens are added."""
        begins = not self.recorder.trajectory.segments
        observation: str | Messages = text
        if begins and self.system and self.renderer.chat and isinstance(text, str):
            observation = [{"role": "system", "content": self.system}, {"role": "user", "content": text}]
        context = self.recorder.observe(observation)
        tokens: list[int] = []

        def add(added: list[int]) -> None:
            tokens.extend(added)
            heard(self.policy.decode(tokens))

        self.engine.heard = add
        self.turns += 1
        done = run(self.engine.generate(context, self.sampling, (self.seed, "chat", self.turns)))
        answer = self.policy.decode(done.tokens)
        self.recorder.act(answer, done.tokens, done.logprobs, cut=done.finish_reason == "length")
        return answer
