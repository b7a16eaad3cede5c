"""Learned rewards: any sequence classifier, or an ensemble of them, behind the protocol of reward functions."""

from __future__ import annotations

from typing import Any, Literal
from weakref import WeakValueDictionary

import torch

from lmrl.accelerators import default_device
from lmrl.errors import RecipeError, did_you_mean
from lmrl.policy.classifier import BATCH_TOKENS, Classifier
from lmrl.policy.load import open_classifier
from lmrl.recipe import SpecialTokens
from lmrl.trajectories.trajectory import Messages

COMBINE = ("mean", "min", "mean_minus_std")
_OPEN: WeakValueDictionary[tuple[Any, ...], Classifier] = WeakValueDictionary()
"""Loaded classifiers, so that training and evaluation share one copy of the weights."""


class RewardModel:
    """Scores completions with a transformers sequence classifier, with its own tokenizer and chat template.

    model: a folder or hub name, or a list of them for an ensemble.
    label: the output of a classifier with several, by name or index.
    probability: use the output's probability instead of its logit.
    prompt: score the prompt together with the completion (false: only the completion, as text).
    chat: put text through the chat template, as messages always are.
    eos: end plain text with the end-of-sequence token, unless the token limit cut it, as in the training of reward
        models here and in trl (false: for classifiers that were trained without it).
    max_tokens: of longer texts only the end is kept (None: as much as model and tokenizer allow).
    combine: how an ensemble's scores become one (Coste et al., arXiv 2310.02743); std_coef: for mean_minus_std.
    batch_tokens: maximum tokens, padding included, in one pass.
    special_tokens: how `<|im_end|>` and the like in the text are read: as `text`, or as control tokens (`parse`); in a
        recipe, the task's choice unless set here.
    dtype: of the weights; the head stays float32. device: null takes the accelerator if there is one.

    Raises RecipeError for options that make no sense, ModelError for a model that cannot be loaded.
    """

    def __init__(
        self,
        model: str | list[str],
        label: str | int | None = None,
        probability: bool = False,
        prompt: bool = True,
        chat: bool = False,
        eos: bool = True,
        max_tokens: int | None = None,
        combine: Literal["mean", "min", "mean_minus_std"] = "mean",
        std_coef: float = 1.0,
        batch_tokens: int = BATCH_TOKENS,
        dtype: Literal["float32", "bfloat16"] = "float32",
        device: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        special_tokens: SpecialTokens = "text",
    ):
        if special_tokens not in ("text", "parse"):
            raise RecipeError(f"'special_tokens' cannot be '{special_tokens}': choose text or parse")
        if combine not in COMBINE:
            raise RecipeError(f"'combine' cannot be '{combine}'{did_you_mean(str(combine), COMBINE)}")
        if dtype not in ("float32", "bfloat16"):
            raise RecipeError(f"'dtype' cannot be '{dtype}': choose float32 or bfloat16")
        place = device or default_device()
        paths = [model] if isinstance(model, str) else model
        self.members = [_open(path, dtype, max_tokens, revision, trust_remote_code, place) for path in paths]
        self.outputs = [output_of(member, label, path) for member, path in zip(self.members, paths, strict=True)]
        self.probability, self.prompt, self.chat, self.eos = probability, prompt, chat, eos
        self.combine, self.std_coef, self.batch_tokens = combine, std_coef, batch_tokens
        self.special_tokens = special_tokens

    def __call__(
        self,
        prompts: list[str | Messages],
        completions: list[str | Messages],
        completion_cut: list[bool] | None = None,
        **columns: Any,
    ) -> list[float] | list[dict[str, float]]:
        """One score for each completion; for an ensemble also `std`, the disagreement of its members.

        completion_cut: which completions ran into the token limit (None: unknown; all count as complete).
        """
        ended = [self.eos and not cut for cut in completion_cut or [False] * len(prompts)]
        rows = list(zip(prompts, completions, ended, strict=True))
        scores_MN = torch.stack([self._scores(index, rows) for index in range(len(self.members))])
        if len(self.members) == 1:
            return scores_MN[0].tolist()
        mean_N, std_N = scores_MN.mean(0), scores_MN.std(0, correction=0)
        if self.combine == "min":
            combined_N = scores_MN.amin(0)
        else:
            combined_N = mean_N - (self.std_coef * std_N if self.combine == "mean_minus_std" else 0)
        return [{"score": score, "std": std} for score, std in zip(combined_N.tolist(), std_N.tolist(), strict=True)]

    def _scores(self, index: int, rows: list[tuple[str | Messages, str | Messages, bool]]) -> torch.Tensor:
        """Scores of one member for prompts, completions and whether these ended, (N,), float64."""
        member = self.members[index]
        tokens = []
        for prompt, answer, ended in rows:
            seen, judged = self._parts(prompt, answer)
            tokens.append(member.tokens(seen, judged, ended, self.special_tokens))
        logits_NL = member.logits(tokens, self.batch_tokens).double()
        if not self.probability:
            return logits_NL[:, self.outputs[index]]
        several = logits_NL.shape[1] > 1 and member.config.problem_type != "multi_label_classification"
        return (logits_NL.softmax(-1) if several else logits_NL.sigmoid())[:, self.outputs[index]]

    def _parts(self, prompt: str | Messages, completion: str | Messages) -> tuple[str | Messages, str | Messages]:
        """Prompt and completion in the form that a member gets."""
        if not self.prompt:
            prompt = ""
            if not isinstance(completion, str):
                completion = "\n\n".join(message["content"] for message in completion)
        elif self.chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return prompt, completion


def _open(
    path: str,
    dtype: str,
    max_tokens: int | None,
    revision: str | None,
    trust_remote_code: bool,
    device: str | torch.device,
) -> Classifier:
    name = (path, dtype, max_tokens, revision, trust_remote_code, device)
    if (found := _OPEN.get(name)) is None:
        found = open_classifier(path, dtype, max_tokens, revision, trust_remote_code)
        model: torch.nn.Module = found.model  # transformers wraps `to` in a way that loses its arguments' types
        model.to(device)
        if dtype == "bfloat16":
            found.compute_in_bfloat16()
        _OPEN[name] = found
    return found


def output_of(classifier: Classifier, label: str | int | None, path: str) -> int:
    """The output of a classifier that a label means. Raises RecipeError if there is no such label, or none is chosen."""
    names = [classifier.config.id2label[index] for index in range(classifier.config.num_labels)]
    if label is None:
        if len(names) > 1:
            raise RecipeError(f"'{path}' has several labels: choose one with options.label ({', '.join(names)})")
        return 0
    if isinstance(label, int) and not 0 <= label < len(names) or isinstance(label, str) and label not in names:
        raise RecipeError(f"options.label: '{path}' has no label '{label}'{did_you_mean(str(label), names)}")
    return label if isinstance(label, int) else names.index(label)
