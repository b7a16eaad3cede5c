"""What each of several processes does in test_processes.py: gradients of one batch, then a run that is resumed."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import lmrl
from lmrl import distributed
from lmrl.objectives.base import Loss, Objective
from lmrl.objectives.likelihood import Likelihood
from lmrl.policy.heads import HeadsSpec
from lmrl.policy.load import load_policy
from lmrl.policy.passes import ForwardRequest, Outputs
from lmrl.recipe import LikelihoodObjective, Lora, Model, Optimizer
from lmrl.recipe.files import load_recipe
from lmrl.training import build
from lmrl.training.listeners import Listener, gate
from lmrl.training.monitoring.bundle import keep_update
from lmrl.training.parallel.launch import build_strategy
from lmrl.training.parallel.strategy import Strategy
from lmrl.training.train import join, resume_run
from lmrl.training.updater import Updater
from lmrl.trajectories.batch import Batch, Microbatch, to_batch
from lmrl.trajectories.trajectory import Segment, Trajectory

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.conftest import TINY_LLAMA, TINY_WALKS  # noqa: E402

STEPS = [
    *(change for change in TINY_WALKS if not change.startswith("source.")),
    "stages.warmup.source.episodes=60",
    "stages.warmup.source.batch_size=8",
    "stages.warmup.training.steps=1",
    "rollouts.prompts=5",
    "rollouts.samples=2",
    "objective.kl_coef=0.05",
    "training.steps=2",
    "training.checkpoint_every=1",
    "training.keep_checkpoints=5",
    "training.try_worst_case=true",
]


def batch_of(count: int) -> Batch:
    """Sequences of uneven lengths."""
    trajectories = []
    for index in range(count):
        segment = Segment()
        segment.observe([3, 4, 5][: 1 + index % 3])
        segment.act([6 + index % 9, *range(7, 7 + 3 * (index % 5))], None, 0)
        trajectories.append(Trajectory([segment], "", ""))
    return to_batch(trajectories)


def fresh_policy():
    torch.manual_seed(0)
    return load_policy(
        Model(config=dict(TINY_LLAMA)), texts=lambda: ["abcdefghijklmnopqrstuvwxyz .,!?"], heads=HeadsSpec()
    )


def gradients(strategy: Strategy, mine: Batch) -> dict:
    """Loss, norm, and every weight after one step of a batch of which this process holds `mine`."""
    policy = fresh_policy()
    policy.microbatch_tokens = 24
    # An epsilon far above the gradient makes the step proportional to it, so that weights show the gradient itself.
    options = Optimizer(lr=1.0, eps=10.0, max_grad_norm=None)
    updater = Updater(policy, options, 10, strategy)
    objective = Likelihood(LikelihoodObjective(name="likelihood"))
    objective.dropout = False
    stats = updater.step(policy, objective, mine)
    weights = strategy.weights()
    with strategy.gathered_weights():
        weights = weights or {name: value.detach().clone() for name, value in policy.state_dict().items()}
        weights = {name: value.cpu() for name, value in weights.items()}
    strategy.close()
    return {"loss": stats["loss"], "norm": stats["grad_norm"], "weights": weights}


class InTurn(Objective):
    """Values alone, then a loss that is not finite, then all of it."""

    turn = 0

    @property
    def forward_request(self) -> ForwardRequest:
        return ForwardRequest(logprobs=self.turn > 0, values=True, detach_values=self.turn == 0)

    def loss(self, outputs: Outputs, batch: Microbatch) -> Loss:
        values = ((outputs.values - 1) ** 2).sum()
        return Loss(values) if self.turn == 0 else Loss((values - outputs.logprobs.sum()) * (1, math.nan, 1)[self.turn])


def adapted(strategy: Strategy, mine: Batch, model: Path) -> dict:
    """Every weight after three updates of adapters on a model of a folder, with passes of the reference in between."""
    torch.manual_seed(0)
    options = Model(path=str(model), lora=Lora(r=2))
    policy = load_policy(options, heads=HeadsSpec(), reference=True)
    policy.microbatch_tokens = 24
    updater = Updater(policy, Optimizer(lr=1.0, eps=10.0, max_grad_norm=None), 10, strategy)
    objective, norms = InTurn(), []
    for objective.turn in range(3):
        reference = policy.score(mine, reference=True)["logprobs"]
        norms.append(updater.step(policy, objective, mine)["grad_norm"])
    assert math.isnan(norms[1]) and updater.skipped == 1, norms
    weights = strategy.weights()
    with strategy.gathered_weights():
        weights = weights or {name: value.detach().clone() for name, value in policy.state_dict().items()}
    reference = torch.cat(distributed.all_gather(reference)) if distributed.size() > 1 else torch.cat(reference)
    strategy.close()
    return {"weights": {name: value.cpu() for name, value in weights.items()}, "reference": reference}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    recipe = load_recipe("random_walks/ppo", STEPS)
    accelerator = join(recipe)
    found = {"processes": distributed.size()}
    for name, count in (("many", 11), ("few", 1)):  # with one sequence, all but one process have none
        whole = batch_of(count)
        own = Batch(list(distributed.shard(whole.sequences)))
        alone = by_one(lambda whole=whole: gradients(Strategy(), whole)) if distributed.is_main() else None
        together = gradients(build_strategy(accelerator), own)
        if distributed.is_main():
            gap = max(float((alone["weights"][key] - value).abs().max()) for key, value in together["weights"].items())
            moved = max(
                float((alone["weights"][key] - value).abs().max()) for key, value in fresh_policy().state_dict().items()
            )
            found[name] = {"gap": gap, "moved": moved} | {key: [alone[key], together[key]] for key in ("loss", "norm")}
        distributed.barrier()

    whole = batch_of(11)
    if distributed.is_main():
        fresh_policy().save(folder / "model")
    distributed.barrier()
    alone = by_one(lambda: adapted(Strategy(), whole, folder / "model")) if distributed.is_main() else None
    together = adapted(build_strategy(accelerator), Batch(list(distributed.shard(whole.sequences))), folder / "model")
    if distributed.is_main():
        assert alone["weights"].keys() == together["weights"].keys()
        gaps = {
            name: float((value - together["weights"][name]).abs().max()) for name, value in alone["weights"].items()
        }
        size = max(float(value.abs().max()) for name, value in alone["weights"].items() if "lora_B" in name)
        apart = float((alone["reference"] - together["reference"]).abs().max())
        found["adapted"] = {"gap": max(gaps.values()), "moved": size, "reference": apart}
    distributed.barrier()

    lmrl.train(recipe, output=folder / "whole")
    if distributed.is_main():
        shutil.copytree(folder / "whole", folder / "torn")
        for gone in ("main/final", "main/checkpoints/step-000002"):
            shutil.rmtree(folder / "torn" / "stages" / gone)
    distributed.barrier()
    resume_run(folder / "torn")

    if build_strategy(accelerator).can_reload_weights:
        go_back(folder)
        give_up(folder)
    if distributed.is_main():
        (folder / "found.json").write_text(json.dumps(found))
    distributed.barrier()


def go_back(folder: Path) -> None:
    """A run that is taken back twice."""
    original = build.build_listeners
    build.build_listeners = lambda *args: [*original(*args), GoesBack()]
    lmrl.train(
        load_recipe(
            "random_walks/ppo",
            [*STEPS, "training.steps=4", "objective.value_warmup_steps=0", "objective.entropy_coef=0.1"],
        ),
        output=folder / "back",
    )


def give_up(folder: Path) -> None:
    """A run whose gate finds a loss at once: it is taken back, and ends with the policy that it began with."""
    breached, gate.breached = gate.breached, lambda *_: True
    changes = ["training.steps=3", "evaluation.gate={every: 1, max_rollbacks: 1}", "stages.warmup.evaluation.gate=null"]
    lmrl.train(load_recipe("random_walks/ppo", [*STEPS, *changes, "evaluation.episodes=4"]), output=folder / "gated")
    gate.breached = breached


class GoesBack(Listener):
    """Takes the main stage back to its first step after the second, of which it keeps a bundle, and to its beginning after the third."""

    name = "goes_back"

    def begin(self, stage, resumed: bool) -> None:
        stage.save()

    def after_step(self, stage, step: int) -> None:
        if stage.name == "main" and step == 2:
            stats = stage.updater.probe(stage.policy, stage.objective, stage.attempt.minibatch)
            keep_update(stage, step, "collapse", stage.attempt, stats, {"collapse": "as told", "best_step": 1})
        if stage.name == "main" and step in (2, 3):
            stage.roll_back({2: 1, 3: 0}[step])


def by_one(work: Callable[[], dict]) -> dict:
    """What this process does as if it were the only one."""
    size, distributed.size = distributed.size, lambda: 1
    try:
        return work()
    finally:
        distributed.size = size


if __name__ == "__main__":
    main(Path(sys.argv[1]))
