"""What each of several processes does in test_exchange.py: an update of its share of a batch, before and after the exchange."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from lmrl import distributed
from lmrl.errors import RunError
from lmrl.objectives import load_objective
from lmrl.policy.costs import pass_cost
from lmrl.policy.load import load_policy
from lmrl.recipe import DPOObjective, Model, Optimizer
from lmrl.recipe.files import load_recipe
from lmrl.recipe.objectives import OBJECTIVES
from lmrl.training.parallel.strategy import Strategy, all_reduce_gradients
from lmrl.training.train import join
from lmrl.training.updater import Updater
from lmrl.trajectories.balance import deal, joined, labelled
from lmrl.trajectories.trajectory import Segment, Trajectory

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.conftest import TINY_LLAMA  # noqa: E402
from tests.training.worker import by_one  # noqa: E402


def episodes() -> list[Trajectory]:
    """Six groups of four; the first are by far the longest, so that contiguous shares are uneven."""
    result = []
    for index in range(24):
        group = index // 4
        segment = Segment()
        segment.observe([3 + group, 4, 5])
        length = 30 - 5 * group + index % 4
        segment.act([6 + (index * step) % 20 for step in range(1, length)], None, 0)
        segment.rewards[-1] = float(index % 4 == group % 4) + 0.1 * (index % 3)
        result.append(Trajectory([segment], "", "", group=group, reward=segment.rewards[-1], terminated=True))
    return result


def options_of(name: str):
    if name == "dpo":
        return DPOObjective(name="dpo", loss="simpo")
    own = {"kl_coef": 0.0, "target_kl": None, "minibatches": 1}
    return OBJECTIVES[name](name=name, **own)


def update(name: str, mine: list[Trajectory], exchanged: bool) -> dict:
    torch.manual_seed(0)
    policy = load_policy(Model(config=dict(TINY_LLAMA)), texts=lambda: ["abcdefghijklmnopqrstuvwxyz .,!?"])
    policy.microbatch_tokens = 200
    objective, cost = load_objective(options_of(name)), pass_cost(policy)
    updater = Updater(policy, Optimizer(lr=1.0, eps=10.0, max_grad_norm=None), 10, Strategy())
    batch = objective.prepare(policy, mine)
    if exchanged:
        rng = np.random.default_rng(0)
        batch = joined(
            deal(labelled(batch, objective.index_fields), rng, 2, cost)
        )  # as an epoch of two minibatches does
        (batch,) = deal(batch, rng, 1, cost)
    load = sum(map(cost, batch.sequences))
    stats = updater.step(policy, objective, batch)
    return {"stats": stats, "load": load, "weights": {key: value.clone() for key, value in policy.state_dict().items()}}


def reduced() -> dict:
    """Gradients that all, one or none of the ranks has, and the collectives that their sum takes, in buckets of 10 elements."""
    rank, size = distributed.rank(), distributed.size()
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (4,), (5,), (25,), (1,))]
    for number, parameter in enumerate(parameters):
        if number != 2 and (number != 1 or rank == 0):  # the second is one rank's, the third nobody's
            parameter.grad = torch.full_like(parameter, number + rank + 1.0)
    count, original = [0], dist.all_reduce

    def counted(*args, **kwargs):
        count[0] += 1
        return original(*args, **kwargs)

    dist.all_reduce = counted
    try:
        all_reduce_gradients(parameters, bucket=10)
    finally:
        dist.all_reduce = original
    alike = [one.grad is None or bool((one.grad == one.grad.flatten()[0]).all()) for one in parameters]
    assert all(alike) and size == 2
    return {
        "collectives": count[0],
        "sums": [None if one.grad is None else float(one.grad.flatten()[0]) for one in parameters],
    }


def waited() -> str:
    """What a rank says that another keeps waiting in an update; elsewhere it is patient."""
    patience, distributed.PROMPTNESS = distributed.PROMPTNESS, timedelta(seconds=1)
    if not distributed.is_main():
        time.sleep(2)
    distributed.barrier()
    said = ""
    try:
        with distributed.prompt():
            distributed.barrier()  # builds the group
            if not distributed.is_main():
                time.sleep(3)
            distributed.barrier()
    except (RunError, RuntimeError) as error:  # the one that was given up finds its connection closed
        said = str(error)
    distributed.PROMPTNESS = patience
    return said


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    join(load_recipe("random_walks/ppo"))
    whole, found = episodes(), {}
    groups = distributed.shard(range(6))
    mine = [one for one in whole if one.group in groups]
    for name in ("dpo", "grpo", "rloo"):
        alone = by_one(lambda name=name: update(name, whole, False)) if distributed.is_main() else None
        distributed.barrier()
        apart, together = (update(name, mine, exchanged) for exchanged in (False, True))
        loads = [distributed.all_gather([one["load"]]) for one in (apart, together)]
        if distributed.is_main():
            gap = max(float((value - together["weights"][key]).abs().max()) for key, value in alone["weights"].items())
            moved = max(float((value - apart["weights"][key]).abs().max()) for key, value in alone["weights"].items())
            found[name] = {
                "gap": gap,
                "apart": moved,
                "losses": [one["stats"]["loss"] for one in (alone, together)],
                "norms": [one["stats"]["grad_norm"] for one in (alone, together)],
                "imbalance": [max(own) * len(own) / sum(own) for own in loads],
                "total": [sum(own) for own in loads],
            }
    parcels = [[(distributed.rank(), to)] * (to + 1) for to in range(distributed.size())]
    received = distributed.exchange(parcels)
    expected = [[(source, distributed.rank())] * (distributed.rank() + 1) for source in range(distributed.size())]
    assert received == expected, received
    found["reduced"] = reduced()
    found["waited"] = waited()
    if distributed.is_main():
        (folder / "found.json").write_text(json.dumps(found))
    distributed.barrier()  # of the patient group, which is whole


if __name__ == "__main__":
    main(Path(sys.argv[1]))
