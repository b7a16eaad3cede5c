"""The `hf` engine: sampling with the policy's own transformers model, on any device.

Rows are decoded together with a key-value cache; a row that has ended leaves the batch at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from lmrl.errors import ModelError
from lmrl.policy.passes import Guidance
from lmrl.policy.policy import Policy
from lmrl.rollouts.engine import Completion, Engine, Keys, Sampling
from lmrl.seeding import stream


class HFEngine(Engine):
    """Samples from the policy in place: weights are always the current ones."""

    def __init__(self, policy: Policy, slots: int = 256, check: Callable[[], None] = lambda: None):
        """slots: rows decoded at a time. check: called between tokens; may raise to abandon the rollout."""
        super().__init__(policy, check)
        self.slots = slots

    @torch.no_grad()
    def sample(self, prompts: Sequence[list[int]], sampling: Sampling, keys: Keys) -> list[Completion]:
        longest, limit = max(map(len, prompts)) + sampling.max_new_tokens, self.policy.max_length
        if limit is not None and longest > limit:
            raise ModelError(
                f"a context of {longest - sampling.max_new_tokens} tokens and max_new_tokens={sampling.max_new_tokens} need "
                f"{longest} positions, but the model has {limit}: lower rollouts.max_new_tokens, or shorten the context "
                "(task.prompts.max_tokens, task.history)"
            )
        was_training = self.policy.training
        self.policy.eval()
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # alike lengths, little padding
        done: dict[int, Completion] = {}
        try:
            for first in range(0, len(order), self.slots):
                chosen = order[first : first + self.slots]
                completions = self._decode(
                    [prompts[index] for index in chosen], sampling, [keys[index] for index in chosen]
                )
                done.update(zip(chosen, completions, strict=True))
        finally:
            self.policy.train(was_training)
        return [done[index] for index in range(len(prompts))]

    def _decode(
        self, prompts: list[list[int]], sampling: Sampling, keys: list[tuple[int | str, ...]]
    ) -> list[Completion]:
        policy, device = self.policy, self.policy.device
        eos = policy.eos_ids
        width = max(map(len, prompts))
        tokens_BT = torch.full((len(prompts), width), policy.pad_id)
        mask_BT = torch.zeros((len(prompts), width), dtype=torch.long)
        for row, prompt in enumerate(prompts):  # left padding: all rows continue at the same column
            tokens_BT[row, width - len(prompt) :] = torch.tensor(prompt)
            mask_BT[row, width - len(prompt) :] = 1
        uniforms = np.stack([stream(*key).random(sampling.max_new_tokens) for key in keys])
        inputs, mask_BT = tokens_BT.to(device), mask_BT.to(device)
        positions = (mask_BT.cumsum(1) - 1).clamp(min=0)
        guidance = guidance_of(policy, sampling)
        cache = policy.new_cache(guidance)
        completions = [Completion([], [], "length") for _ in prompts]
        active = list(range(len(prompts)))

        for column in range(sampling.max_new_tokens):
            self.check()
            logits_BV = policy.next_token_logits(
                cache, guidance, input_ids=inputs, attention_mask=mask_BT, position_ids=positions
            )
            if device.type == "mps":  # has no float64, which drawing needs
                logits_BV = logits_BV.cpu()
            chosen_B, logprobs_B = draw(logits_BV.float(), sampling, uniforms[active, column])
            chosen_B = chosen_B.to(device)
            chosen, logprobs = chosen_B.tolist(), logprobs_B.tolist()
            going = []
            for row, index in enumerate(active):
                completion = completions[index]
                completion.tokens.append(chosen[row])
                completion.logprobs.append(logprobs[row])
                if chosen[row] in eos:
                    completion.end = "eos"
                elif sampling.stop and self.stopped(completion.tokens, sampling.stop):
                    completion.end = "stop"
                else:
                    going.append(row)
            if not going or column + 1 == sampling.max_new_tokens:
                break
            if len(going) < len(active):
                keep = torch.tensor(going, device=device)
                try:
                    cache.keep(keep)
                except AttributeError as error:
                    raise ModelError(
                        "engine 'hf' needs a model whose whole cache is keys and values (no state-space layers)"
                    ) from error
                chosen_B, mask_BT, positions = chosen_B[keep], mask_BT[keep], positions[keep]
                active = [active[row] for row in going]
            inputs = chosen_B[:, None]
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(active), 1)], dim=1)
            positions = positions[:, -1:] + 1
        return completions


def guidance_of(policy: Policy, sampling: Sampling) -> Guidance | None:
    """How Q guides this policy: as the sampling says, else as the policy itself says; None where it has no Q."""
    own = policy.guidance
    if own is None:
        return None
    beta = own.beta if sampling.beta is None else sampling.beta
    support = own.support if sampling.support is None else sampling.support
    return Guidance(beta, support) if beta > 0 or support > 0 else None


def draw(logits_BV: torch.Tensor, sampling: Sampling, uniforms_B: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row by inverting the cumulative distribution at a given uniform number.

    Returns tokens and their log-probabilities under the distribution drawn from (after temperature, top-k, top-p).
    """
    if sampling.temperature == 0:
        tokens_B = logits_BV.argmax(-1)
        return tokens_B, torch.zeros(len(tokens_B), device=logits_BV.device)
    logprobs_BV = _truncate(logits_BV / sampling.temperature, sampling).log_softmax(-1)
    # float64: a float32 running sum over a large vocabulary loses the tail.
    cumulative_BV = logprobs_BV.exp().double().cumsum(-1)
    targets_B1 = torch.as_tensor(uniforms_B, device=logits_BV.device)[:, None] * cumulative_BV[:, -1:]
    tokens_B1 = torch.searchsorted(cumulative_BV, targets_B1, right=True).clamp(max=logits_BV.shape[-1] - 1)
    return tokens_B1[:, 0], logprobs_BV.gather(1, tokens_B1)[:, 0]


def _truncate(logits_BV: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Set the logits outside top-k and top-p to minus infinity; the most likely token always stays."""
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        kth = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits_BV.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= sampling.top_p  # mass before this token already reaches top_p
        logits_BV = logits_BV.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return logits_BV
