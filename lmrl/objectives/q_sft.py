"""Q-learning by supervised fine-tuning: a second model whose probabilities, over the policy's, are Q values.

Hong, Dragan, Levine, "Q-SFT" (arXiv 2411.05193). The policy pi imitates the data and stays fixed. The
second model p is trained by a weighted cross-entropy, with w = clip(r + gamma max_a' pbar(a'|s') / pi(a'|s'), 0, 1):

    L = -[w log p(a|s) + (1 - w) / (V - 1) sum_{a' != a} log p(a'|s)]

If the data are drawn from pi, setting the expected gradient to zero gives p(a) = pi(a) w(a) + sum_{a' != a} pi(a') (1 -
w(a')) / (V - 1): p / pi is the value w of an action only where pi(a) is well above 1 / V. Elsewhere the second term
makes unlikely actions look good, so both the maximum and decoding stay inside the behaviour support.
"""

from __future__ import annotations

from collections.abc import Iterable

from lmrl.errors import DataError
from lmrl.objectives.base import Loss, Objective
from lmrl.objectives.ilql import next_values
from lmrl.objectives.q import drifting
from lmrl.policy.heads import HeadsSpec
from lmrl.policy.passes import ForwardRequest, Outputs
from lmrl.policy.policy import Policy
from lmrl.recipe import QSFTObjective
from lmrl.trajectories.batch import Batch, Microbatch, Sequence
from lmrl.trajectories.chain import anchors, to_chains, token_returns
from lmrl.trajectories.trajectory import Trajectory


class QSFT(Objective):
    label = "Q-SFT"
    index_fields = ()

    def __init__(self, options: QSFTObjective):
        self.options, self.polyak = options, options.polyak
        self.heads = HeadsSpec(
            value=False, q="probability", twins=1, trunk="separate", beta=options.beta, support=options.support
        )

    @property
    def forward_request(self) -> ForwardRequest:
        return ForwardRequest(logprobs=False, probability=self.options.support)

    def ready(self, policy: Policy, dataset: Iterable[list[Trajectory]], fresh: bool) -> None:
        """Raise DataError if a stage begins and a logged episode has returns outside the range, or restricted actions; or if
        nothing fixes the values."""
        if not fresh:
            return
        options, (low, high) = self.options, self.options.return_range
        found, anchored = [], False
        for one in (one for part in dataset for one in part):
            if any(segment.allowed for segment in one.segments):
                raise DataError(
                    "source: the log holds actions that were restricted (task.allowed_actions), but 'q_sft' compares "
                    "probabilities over the whole vocabulary, which imitating such actions does not teach: set "
                    "objective.name=ilql, or `segments` to null in the log"
                )
            found.append(token_returns(one, options.gamma, options.gamma_token).aminmax())
            anchored = anchored or anchors(one, options.gamma, options.gamma_token)
        if not anchored:
            raise drifting(options.name, len(found))
        lowest, highest = (min(float(one.min) for one in found), max(float(one.max) for one in found))
        if lowest < low - 1e-6 or highest > high + 1e-6:
            raise DataError(
                f"source: the logged returns-to-go are {lowest} to {highest}, outside objective.return_range=[{low:g}, {high:g}]: "
                f"set objective.return_range=[{lowest},{highest}]"
            )

    def prepare(self, policy: Policy, trajectories: list[Trajectory]) -> Batch:
        sequences: list[Sequence] = []
        for trajectory in trajectories:
            first = (sequences[-1].chain or 0) + 1 if sequences else 0
            options = self.options
            chains = to_chains(trajectory, options.gamma, options.gamma_token, policy.microbatch_tokens, first)
            sequences += [sequence for chain in chains for sequence in chain]
        batch = Batch(sequences)
        for name in ("rewards", "discounts", "returns", "real"):
            batch.set(name, batch.get(name).to(policy.precision))
        return batch

    def loss(self, outputs: Outputs, batch: Microbatch) -> Loss:
        fields, real_N = batch.fields, batch.fields["real"]
        low, high = self.options.return_range
        # In units of the range, and counted from its low end: the value 0 of an episode's end becomes -low.
        rewards_N = fields["rewards"] / (high - low)
        zero = -low / (high - low)
        following_N = next_values(outputs.best_ratio) - zero
        weights_N = (rewards_N + fields["discounts"] * following_N + zero).clamp(0, 1)
        others = outputs.vocabulary - 1
        losses_N = -(weights_N * outputs.logprobs + (1 - weights_N) / others * outputs.other_logprobs)
        stats = {"weight": weights_N, "logprob": outputs.logprobs, "best_q": outputs.best_ratio}
        sums = {name: (value.detach() * real_N).sum() for name, value in stats.items()}
        return Loss((losses_N * real_N).sum(), sums)

    def count(self, batch: Batch) -> float:
        """Action tokens, without pseudo-actions."""
        return float(batch.fields["real"].sum())
