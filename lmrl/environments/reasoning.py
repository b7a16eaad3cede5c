"""Tasks of reasoning-gym by name: `environment: reasoning_gym:leg_counting`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lmrl.environments.base import TextEnvironment
from lmrl.errors import PluginError, did_you_mean


class ReasoningGym(TextEnvironment):
    """One question a time, and the score of the answer, from 0 to 1 (Stojanovski et al., arXiv 2505.24760).

    id: the task's name there. size, seed: how many questions are generated, and from what. answer_tag: what the completion is
    to put its answer between, such as `answer`; None scores the completion as it is. Further keys are the task's own.
    """

    metric_limits = {"return": (0.0, 1.0)}

    def __init__(self, id: str, size: int = 500, seed: int = 0, answer_tag: str | None = None, **options: Any):
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise PluginError("task.environment: reasoning_gym is not installed: pip install reasoning-gym") from error
        if id not in DATASETS:
            raise PluginError(f"task.environment: reasoning_gym has no task '{id}'{did_you_mean(id, DATASETS)}")
        self.data = reasoning_gym.create_dataset(id, size=size, seed=seed, **options)
        self.size = self.num_starts = size
        self.answer_tag = answer_tag
        self.version = f"reasoning-gym {reasoning_gym.__version__}" if hasattr(reasoning_gym, "__version__") else None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(self.size))
        self.entry = self.data[(options or {}).get("start", drawn)]
        return self.entry["question"], {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        score = float(self.data.score_answer(self._answer(action), self.entry))
        return "", score, True, False, {"metrics": {"correct": float(score >= 1.0)}}

    def texts(self) -> Iterable[str]:
        rows = [self.data[index] for index in range(min(self.size, 200))]
        return [text for row in rows for text in (row["question"], str(row["answer"]))]

    def _answer(self, action: str) -> str:
        if self.answer_tag is None:
            return action.strip()
        _, opened, rest = action.rpartition(f"<{self.answer_tag}>")
        return rest.partition(f"</{self.answer_tag}>")[0].strip() if opened else ""
