"""What a call of `lmrl.train`, `lmrl.evaluate` or `lmrl.compare` must not take over from an earlier one in the same
process, as in a notebook: code in files that have been edited since, and models that have been trained further."""

from __future__ import annotations

from lmrl.plugins.loading import forget_edited
from lmrl.rewards.workers import close_pools
from lmrl.rollouts.parties import forget_parties


def forget_earlier_calls() -> None:
    """Load again, when they are next named: edited files of code, rewards in workers, and opponents. Within a call, all
    of them stay what they were."""
    forget_edited()
    close_pools()
    forget_parties()
