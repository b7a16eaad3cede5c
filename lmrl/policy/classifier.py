"""Sequence classifiers: models that give a whole text one number a label, such as reward models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lmrl.errors import ModelError
from lmrl.policy.language_model import AnyModel, trunk_of, without_adapters
from lmrl.recipe import SpecialTokens
from lmrl.trajectories.encoding import Encoder, Part
from lmrl.trajectories.trajectory import Messages, as_messages

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 8192
"""Tokens, padding included, that go through a classifier at once unless something else is asked for."""


class Classifier:
    """A transformers sequence classifier with its tokenizer.

    model: `...ForSequenceClassification`, or a peft model around one. max_tokens: of a longer text the end is kept
    (None: as long as tokenizer and model allow).
    """

    def __init__(self, model: AnyModel, tokenizer: Any, max_tokens: int | None = None):
        self.model, self.tokenizer = model, tokenizer
        self._encoders: dict[SpecialTokens, Encoder] = {}
        positions = getattr(self.config, "max_position_embeddings", None)
        limits = [max_tokens, tokenizer.model_max_length, positions]
        self.max_tokens = min(limit for limit in limits if limit is not None)
        tokenizer.model_max_length, tokenizer.truncation_side = self.max_tokens, "left"
        closes = tokenizer("a").input_ids[-1:] == [tokenizer.eos_token_id]
        self.end = "" if closes else tokenizer.eos_token or ""
        """Tokens that end a text: none if the tokenizer adds its own, or has no end-of-sequence token."""

    @property
    def config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def trunk(self) -> PreTrainedModel:
        """The model below the classification head."""
        return trunk_of(self._plain)

    @property
    def _plain(self) -> PreTrainedModel:
        return without_adapters(self.model)

    @property
    def size(self) -> tuple[int, int]:
        """Parameters of the model, without adapters, and the width of its hidden states."""
        added = (".lora_", ".modules_to_save.")
        own = (one.numel() for name, one in self._plain.named_parameters() if not any(part in name for part in added))
        return sum(own), getattr(self.config, "hidden_size", 1024)

    def tokens(
        self,
        prompt: str | Messages,
        completion: str | Messages,
        ended: bool = True,
        special_tokens: SpecialTokens = "text",
    ) -> list[int]:
        """Tokens of a prompt with its completion: text as it stands, messages through the chat template.

        ended: end text with the end-of-sequence token, as trl's RewardTrainer. special_tokens: what becomes of those in
        the text: `text`, or control tokens (`parse`; one at the end is then not added again).
        Raises ModelError for messages if the tokenizer has no chat template.
        """
        encoder = self._encoders.setdefault(special_tokens, Encoder(self.tokenizer, special_tokens))
        if isinstance(prompt, str) and isinstance(completion, str):
            parts, opening = encoder.content(prompt + completion), True
            if ended and not (encoder.parses and parts[0].text.endswith(self.end)):
                parts = [*parts, Part(self.end, True)]
        else:
            answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
            if not self.tokenizer.chat_template:
                raise ModelError(
                    f"'{self.model.config._name_or_path}' is asked about messages, but has no chat template"
                )
            dialogue = [*as_messages(prompt), *answer]
            parts, opening = encoder.dialogue(dialogue, open_turn=False), False
        ids = encoder.encode(parts, opening, self.max_tokens)
        start = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return ids or [next((token for token in start if token is not None), 0)]

    @torch.no_grad()
    def logits(self, sequences: Sequence[list[int]], batch_tokens: int = BATCH_TOKENS) -> torch.Tensor:
        """Logits (N, labels), float32 on the CPU. A sequence's do not depend on the others beyond float rounding.

        Sequences of similar length go through the model together, padded on the right to `batch_tokens` tokens at most
        (a single one may be longer).
        """
        was_training = self.model.training
        self.model.eval()
        device, config = next(self.model.parameters()).device, self.config
        own_pad: int | None = config.pad_token_id
        rows: dict[int, torch.Tensor] = {}
        for batch in batches(list(map(len, sequences)), batch_tokens):
            chosen = [torch.tensor(sequences[index]) for index in batch]
            # The head reads the last token that is not padding. A model without a pad token reads the last
            # token there is, whichever it be: so pad with one that does not occur.
            pad = own_pad if own_pad is not None and 0 <= own_pad < config.vocab_size else _absent(chosen)
            config.pad_token_id = pad
            ids = nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=pad)
            lengths = torch.tensor([len(one) for one in chosen])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            result = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float().cpu()
            rows.update(zip(batch, result, strict=True))
        config.pad_token_id = own_pad
        self.model.train(was_training)
        return torch.stack([rows[index] for index in range(len(sequences))])

    def compute_in_bfloat16(self) -> Callable[[], None]:
        """Run the trunk in bfloat16, and the head in float32: scores that differ little should not become equal.

        Returns what undoes it.
        """
        for name, module in self._plain.named_children():
            if name != self._plain.base_model_prefix:
                module.float()
        trunk = self.trunk
        device = next(trunk.parameters()).device.type
        trunk.forward = torch.autocast(device, dtype=torch.bfloat16)(trunk.forward)
        hook = trunk.register_forward_hook(_to_float32)

        def undo() -> None:
            del trunk.forward
            hook.remove()

        return undo


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Positions in batches, longest first, of at most `budget` tokens after padding; at least one each."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        count = max(budget // lengths[order[0]], 1)
        yield order[:count]
        order = order[count:]


def _absent(sequences: Sequence[torch.Tensor]) -> int:
    """The lowest token that does not occur."""
    present = set(torch.cat(list(sequences)).tolist())
    return next(token for token in range(len(present) + 1) if token not in present)


def _to_float32(_: nn.Module, __: Any, outputs: Any) -> Any:
    for name, value in outputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            outputs[name] = value.float()
    return outputs
