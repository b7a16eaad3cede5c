"""A stage that trains a reward model from preferences, with trl's RewardTrainer in place of lmrl's own loop.

lmrl chooses the batches, the optimizer and what becomes of the folders, so that such a stage keeps the promises of the
others: its batches are a function of the seed, its checkpoints are whole, and a resumed run ends as it would have.
"""

from __future__ import annotations

import json
import math
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from lmrl import run as runs
from lmrl.accelerators import default_precision
from lmrl.errors import NonFiniteError
from lmrl.evaluation.scoring import Scores
from lmrl.policy.language_model import has_adapters, merged_model
from lmrl.policy.load import load_classifier
from lmrl.recipe import DatasetOptions, PromptTask, Recipe
from lmrl.recipe.objectives.preferences import RewardModelObjective
from lmrl.recipe.rates import with_rates
from lmrl.rollouts.task import build_task, starts_for, task_texts
from lmrl.seeding import key, seed_everything
from lmrl.sources.dataset import BAD_ROWS
from lmrl.training.agreement import COLUMNS, agreement
from lmrl.training.checkpoint import STATE, checkpoint_path, verify, write_checksums
from lmrl.training.display import Display
from lmrl.training.interrupt import Interrupt, Interrupted
from lmrl.training.monitoring.measures import SAMPLES_KEPT, peak_memory_mb
from lmrl.training.skipping_adamw import build_optimizer
from lmrl.training.tracking import StageTracking
from lmrl.training.updater import schedule
from lmrl.trajectories.files import Selection, quiet_datasets
from lmrl.trajectories.preference_pairs import Pair, read_pairs, split_pairs
from lmrl.trajectories.store import UNMATCHED
from lmrl.trajectories.trajectory import Messages

# trl 1.16 calls by their old names what transformers 5.24 renamed.
warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)

LABEL = "reward model"


class RewardModelStage:
    """A stage as `Stage` is, whose result is a sequence classifier. `start`: the checkpoint it begins from."""

    def __init__(
        self,
        run: runs.Run,
        name: str,
        recipe: Recipe,
        start: Path | None,
        device: torch.device,
        display: Display,
        interrupt: Interrupt,
        track: StageTracking = StageTracking(),
    ):
        self.run, self.name, self.recipe, self.device = run, name, recipe, device
        self.display, self.interrupt = display, interrupt
        self.track = track
        source, options = recipe.source, recipe.objective
        assert isinstance(source, DatasetOptions) and source.path is not None  # see RewardModelObjective.mistakes
        assert isinstance(options, RewardModelObjective)
        self.seed, self.source, self.options = recipe.training.seed, source, options
        if recipe.training.threads is not None:
            torch.set_num_threads(recipe.training.threads)
        self.pairs, self.notes = read_pairs(
            source.path, Selection.of(source), source.skip_bad_rows, run.folder / BAD_ROWS
        )
        seed_everything(self.seed, name, "build")
        self.classifier = load_classifier(recipe.model, start, lambda: task_texts(recipe), options.max_length)
        self.training, self.heldout = split_pairs(self.pairs, options.holdout, self._reserved())
        self.heldout = self.heldout[: recipe.evaluation.episodes]
        self.tokens = {index: self._tokens(self.pairs[index]) for index in [*self.training, *self.heldout]}
        limit = self.classifier.max_tokens
        full = sum(max(map(len, self.tokens[index])) == limit for index in self.tokens)
        self.notes += [f"{full} of {len(self.tokens)} pairs reach {limit} tokens; of a longer text the end is kept"] * (
            full > 0
        )

    def _reserved(self) -> Callable[[str | Messages], bool]:
        """True if the task holds a prompt out for evaluation."""
        if not isinstance(self.recipe.task, PromptTask):
            return lambda prompt: False
        task = build_task(self.recipe.task.model_copy(update={"rewards": []}), self.classifier.tokenizer)
        keys = task.heldout_prompts()
        if keys and all(task.renderer.keys(pair.prompt).isdisjoint(keys) for pair in self.pairs):
            self.notes.append(f"{self.source.path}: {UNMATCHED}")
        return lambda prompt: not task.renderer.keys(prompt).isdisjoint(keys)

    def _tokens(self, pair: Pair) -> tuple[list[int], list[int]]:
        task = self.recipe.task
        special_tokens = "text" if task is None else task.special_tokens
        chosen, rejected = (
            self.classifier.tokens(pair.prompt, answer, special_tokens=special_tokens)
            for answer in (pair.chosen, pair.rejected)
        )
        return chosen, rejected

    # -------------------------------------------------------------------------------------------------------- training
    def train(self) -> None:
        """Run the remaining steps and leave `final/`."""
        steps, found = self.recipe.training.steps, self.run.checkpoints(self.name)
        done = int(found[-1].name.removeprefix("step-")) if found else 0
        if found:
            verify(found[-1], found[:-1], needed=(Path("trainer_state.json"),))
            self.display.say(f"resumed stage {self.name} at step {done}")
        self.run.cut(self.name, done if found else -1)
        undo = self.classifier.compute_in_bfloat16() if self._in_bfloat16 else None
        trainer = self._trainer()
        self.display.begin(self.name, LABEL, steps, done)
        try:
            trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
        finally:
            self.display.end()
        if self.interrupt.number is not None:
            self.display.say(f"saved a checkpoint at step {trainer.state.global_step} of stage {self.name}")
            raise Interrupted(self.interrupt.number)
        if undo:
            undo()
        self._finish()

    @property
    def _in_bfloat16(self) -> bool:
        precision = self.recipe.training.precision or default_precision(self.device)
        return "bfloat16" in (self.recipe.model.dtype, precision)

    def _trainer(self) -> RewardTrainer:
        recipe, tokens = self.recipe, self.tokens
        steps, size = recipe.training.steps, self.source.batch_size
        rows = starts_for(self.training, 0, steps * size, self.seed, self.name, "rows")
        position: dict[int | None, int] = {index: number for number, index in enumerate(self.training)}
        dataset = quiet_datasets().Dataset.from_dict(
            {
                "chosen_ids": [tokens[index][0] for index in self.training],
                "rejected_ids": [tokens[index][1] for index in self.training],
            }
        )
        longest = max(max(map(len, tokens[index])) for index in self.training)
        micro = pairs_at_once(size, longest, recipe.training.microbatch_tokens)
        folder = self.run.stage_folder(self.name) / "checkpoints"
        for torn in folder.glob("checkpoint-*"):
            shutil.rmtree(torn)
        options = with_rates(recipe, *self.classifier.size)
        limit = options.max_grad_norm
        assert not isinstance(limit, str)  # `with_rates` leaves nothing open
        arguments = RewardConfig(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=size // micro,
            train_sampling_strategy="sequential",
            max_grad_norm=math.inf if limit is None else limit,
            center_rewards_coefficient=self.options.center_coef or None,
            max_length=None,
            seed=key(self.seed, self.name) % 2**32,
            bf16=False,  # the classifier has its own way to compute in bfloat16
            gradient_checkpointing=False,
            use_cpu=self.device.type == "cpu",
            dataloader_pin_memory=self.device.type != "cpu",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        if arguments.n_gpu > 1:
            arguments._n_gpu = 1  # one process trains on one device, however many it sees
        optimizer = build_optimizer(self.classifier, options)
        trainer = _Trainer(
            self.classifier.model,
            arguments,
            train_dataset=dataset.select([position[index] for index in rows]),
            processing_class=self.classifier.tokenizer,
            callbacks=[_Loop(self)],
            optimizers=(
                optimizer,
                torch.optim.lr_scheduler.LambdaLR(
                    optimizer, lambda done: schedule(options, min(done + 1, steps), steps)
                ),
            ),
        )
        trainer.remove_callback(PrinterCallback)
        self.optimizer = optimizer
        return trainer

    def after_step(self, step: int, logs: dict[str, float], seconds: float) -> None:
        """Record a step, stop if training has broken down, and evaluate if it is due."""
        names = {"loss": "loss", "accuracy": "accuracy", "margin": "margin", "reward": "mean_reward"}
        metrics = {name: logs[given] for name, given in names.items()}
        metrics |= {"grad_norm": logs["grad_norm"], "skipped": self.optimizer.skipped}
        size = self.source.batch_size
        times = {"step_s": round(seconds, 3), "pairs_per_s": round(size / seconds, 3)}
        times["peak_memory_mb"] = peak_memory_mb()
        self.run.record({"stage": self.name, "step": step, "kind": "train", **metrics, "time": times})
        self.track({f"{self.name}/{name}": value for name, value in (metrics | times).items()}, step)
        self.display.step(step, metrics)
        limit = self.recipe.training.max_nonfinite
        if self.optimizer.skipped_in_a_row >= limit:
            raise NonFiniteError(
                f"stage {self.name}, step {step}: {limit} updates in a row had a non-finite loss or gradient: lower "
                "optimizer.lr, or set training.precision=float32"
            )
        every = self.recipe.evaluation.every
        if every and step % every == 0 and step < self.recipe.training.steps:
            self._evaluate(step)

    def keep(self, step: int, written: Path) -> None:
        """Give a checkpoint that the trainer has finished writing its place among the stage's checkpoints."""
        (written / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
        target = checkpoint_path(self.run, self.name, step)
        if target.exists():
            shutil.rmtree(written)
        else:
            write_checksums(written)
            self.run.publish(written, target)
        self.run.prune(self.name, self.recipe.training.keep_checkpoints)

    # ---------------------------------------------------------------------------------------------------------- result
    def _evaluate(self, step: int) -> Scores:
        """Score the held-out pairs with the model as it is."""
        if not self.heldout:
            return {}
        sides = [self.tokens[index][side] for side in (0, 1) for index in self.heldout]
        rewards_N = self.classifier.logits(sides, self.recipe.training.microbatch_tokens)[:, 0]
        chosen_N, rejected_N = rewards_N.chunk(2)
        scores = agreement((chosen_N - rejected_N).tolist())
        self.run.record({"stage": self.name, "step": step, "kind": "eval", **scores})
        lines = zip(self.heldout[:SAMPLES_KEPT], chosen_N.tolist(), rejected_N.tolist(), strict=False)
        self.run.record_samples(
            [
                {"stage": self.name, "step": step, "kind": "eval", **vars(self.pairs[index]), "rewards": [high, low]}
                for index, high, low in lines
            ]
        )
        self.track({f"{self.name}/eval/{name}": score["mean"] for name, score in scores.items()}, step)
        self.display.score(step, {name: scores[name] for name in COLUMNS})
        return scores

    def _finish(self) -> None:
        """Merge the adapter, measure what is about to be saved, and save it."""
        if has_adapters(self.classifier.model):
            # In float32: rounded to the base's bfloat16, most of what an adapter has learned would be lost.
            self.classifier.model = merged_model(self.classifier.model.float())
        scores = self._evaluate(self.recipe.training.steps)

        def write(folder: Path) -> None:
            self.classifier.model.save_pretrained(str(folder))
            self.classifier.tokenizer.save_pretrained(folder)
            (folder / STATE).mkdir()
            state = {
                "stage": self.name,
                "step": self.recipe.training.steps,
                "best": None,
                "scores": {"last": scores} if scores else {},
                "label": LABEL,
                "columns": COLUMNS if scores else [],
            }
            (folder / STATE / "trainer.json").write_text(json.dumps(state, indent=2) + "\n")

        self.run.write_folder(self.run.final(self.name), write)


class _Trainer(RewardTrainer):
    def create_model_card(self, *_: Any, **__: Any) -> None:
        """A run folder says by itself what it holds."""


class _Loop(TrainerCallback):
    """The stage's own work between the trainer's steps."""

    def __init__(self, stage: RewardModelStage):
        self.stage, self.began = stage, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        logs: dict[str, float] = given["logs"]
        if "loss" in logs:  # the trainer also logs a summary at its end
            self.stage.after_step(state.global_step, logs, time.monotonic() - self.began)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = self.stage.recipe.training.checkpoint_every
        interrupted = self.stage.interrupt.number is not None
        control.should_save = interrupted or bool(every and state.global_step % every == 0)
        control.should_training_stop = control.should_training_stop or interrupted

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step
        self.stage.keep(step, Path(args.output_dir) / f"checkpoint-{step}")


def pairs_at_once(batch_size: int, longest: int, microbatch_tokens: int) -> int:
    """Pairs in a microbatch: the largest divisor of the batch whose texts fit, so that all weigh the same; at least one."""
    fitting = max(microbatch_tokens // (2 * longest), 1)
    return max(size for size in range(1, min(fitting, batch_size) + 1) if batch_size % size == 0)
