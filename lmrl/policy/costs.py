"""Cost of a pass over a sequence, in floating-point operations, for balancing sequences over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmrl.policy.policy import Policy
from lmrl.trajectories.batch import Sequence


@dataclass(frozen=True)
class PassCost:
    """Operations of a forward pass: per token in the layers, per action in the head, and per pair of tokens in
    attention. A backward pass takes about twice as many, in the same proportions."""

    token: float
    action: float
    pair: float

    def __call__(self, sequence: Sequence) -> float:
        """The cost of one sequence; 0 if its gradient is known to be zero, so that its pass is skipped."""
        if sequence.zero_gradient:
            return 0.0
        tokens = sequence.tokens.numel()
        return self.token * tokens + self.action * sequence.targets.numel() + self.pair * tokens**2


def pass_cost(policy: Policy) -> PassCost:
    """The costs of a policy's passes, from its sizes (Kaplan et al., arXiv 2001.08361, table 1). Attention is causal:
    on average, a token sees half of the others."""
    lm: Any = policy.causal_lm
    config = lm.config.get_text_config()
    parameters, hidden = policy.size
    vocabulary = policy.vocabulary.shape[0]
    tables = vocabulary * hidden * (1 if getattr(config, "tie_word_embeddings", False) else 2)
    heads = getattr(config, "num_attention_heads", None) or 1
    width = heads * (getattr(config, "head_dim", None) or hidden // heads)
    layers = getattr(config, "num_hidden_layers", None) or 1
    return PassCost(2.0 * max(parameters - tables, 0), 2.0 * vocabulary * hidden, 2.0 * layers * width)
