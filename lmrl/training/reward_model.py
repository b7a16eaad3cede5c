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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from trl import RewardConfig, RewardTrainer

from lmrl import run as runs
from lmrl.accelerators import default_precision
from lmrl.errors import DataError, NonFiniteError
from lmrl.evaluation.scoring import Scores
from lmrl.evaluation.statistics import UNIT, UNLIMITED, bootstrap, summarize
from lmrl.policy.classifier import Classifier
from lmrl.policy.load import load_classifier
from lmrl.recipe import Optimizer, PromptTask, Recipe
from lmrl.recipe.objectives.base import LONG_MEMORY
from lmrl.recipe.rates import with_rates
from lmrl.rollouts.task import build_task, starts_for, task_texts
from lmrl.seeding import key, seed_everything, stream
from lmrl.sources.dataset import BAD_ROWS
from lmrl.training.checkpoint import STATE, checkpoint_path, verify, write_checksums
from lmrl.training.display import Display
from lmrl.training.interrupt import Interrupt, Interrupted
from lmrl.training.monitoring.measures import SAMPLES_KEPT, peak_memory_mb
from lmrl.training.tracking import StageTracking
from lmrl.training.updater import schedule
from lmrl.trajectories.files import Malformed, Selection, open_rows, quiet_datasets
from lmrl.trajectories.formats import preference
from lmrl.trajectories.store import UNMATCHED, report_bad_rows
from lmrl.trajectories.trajectory import Messages, prompt_key

# trl 1.16 calls by their old names what transformers 5.24 renamed.
warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)

LABEL = "reward model"
COLUMNS = ["accuracy", "margin", "ece", "brier"]
"""Metrics of held-out pairs in the closing table; see `agreement`."""
ECE_BINS = 10
BOOTSTRAP = 1000


@dataclass
class Pair:
    """A preference: two completions of a prompt, all text or all messages."""

    prompt: str | Messages
    chosen: str | Messages
    rejected: str | Messages


# ------------------------------------------------------------------------------------------------------------------ data
def read_pairs(
    path: str, part: Selection = Selection(), skip_bad_rows: bool = False, bad_rows: Path | None = None
) -> tuple[list[Pair], list[str]]:
    """The preferences in a file of any format of rows.py that has them, and notes on what was left out.

    Raises DataError with file, line, field and what was expected, unless malformed rows are to be skipped.
    """
    rows, pairs, bad = open_rows(path, part), [], []
    for number, row in enumerate(rows.scan()):
        try:
            if isinstance(row, Malformed):
                raise row
            pairs.append(Pair(*preference(row)))
        except Malformed as error:
            if not skip_bad_rows:
                raise DataError(f"{rows.where(number)}: {error}") from error
            bad.append((number, str(error)))
    notes = [f"{path}: left out {len(bad)} malformed {rows.unit}s (see {bad_rows})"] if bad else []
    if bad and bad_rows is not None:
        report_bad_rows(rows, bad, bad_rows)
    return pairs, notes


def split_pairs(
    pairs: Sequence[Pair], share: float, is_reserved: Callable[[str | Messages], bool] = lambda prompt: False
) -> tuple[list[int], list[int]]:
    """Positions of the pairs to train on and to hold out: that share of the prompts, with all their pairs.

    Reserved prompts are held out first, and further ones by a fixed draw that depends on nothing but their number.
    Raises DataError where nothing is left to train on.
    """
    by_prompt: dict[str, list[int]] = {}
    for position, pair in enumerate(pairs):
        by_prompt.setdefault(prompt_key(pair.prompt), []).append(position)
    held = {name for name, found in by_prompt.items() if is_reserved(pairs[found[0]].prompt)}
    others = [name for name in by_prompt if name not in held]
    missing = round(share * len(by_prompt)) - len(held)
    if share > 0 and not held:
        missing = max(missing, 1)
    if missing > 0:
        order = stream("holdout", len(others)).permutation(len(others))
        held |= {others[index] for index in order[:missing]}
    train = sorted(position for name, found in by_prompt.items() if name not in held for position in found)
    if not train:
        raise DataError(
            f"none of {len(pairs)} pairs is left to train on, because {len(held)} of {len(by_prompt)} prompts are held "
            "out: lower objective.holdout or task.prompts.holdout, or give more pairs"
        )
    return train, sorted(position for name in held for position in by_prompt[name])


# ----------------------------------------------------------------------------------------------------------- measurement
def agreement(margins: Sequence[float]) -> Scores:
    """How well a reward model's margins (chosen minus rejected) agree with held-out preferences.

    accuracy: share of pairs with the chosen completion above (a tie counts half). margin: mean margin. ece: expected
    calibration error of the probability sigmoid(margin), in ten bins of equal width, biased upwards where there are few
    pairs (Guo et al., arXiv 1706.04599); its interval is a bootstrap over pairs. brier: mean squared error of that
    probability (0.25: a coin). nll: its negative log-likelihood, the training loss without centring.
    """
    margins_N = torch.tensor(margins, dtype=torch.float64)
    wins_N = (margins_N > 0).double() + 0.5 * (margins_N == 0).double()
    confidence_N = torch.sigmoid(margins_N.abs())
    return {
        "accuracy": summarize(wins_N.tolist(), limits=UNIT, unit="pair"),
        "margin": summarize(margins_N.tolist(), limits=UNLIMITED, unit="pair"),
        "ece": bootstrap(lambda rows: calibration_error(confidence_N[rows], wins_N[rows]), len(margins), BOOTSTRAP),
        "brier": summarize(torch.sigmoid(-margins_N).square().tolist(), limits=UNIT, unit="pair"),
        "nll": summarize((-torch.nn.functional.logsigmoid(margins_N)).tolist(), limits=(0.0, math.inf), unit="pair"),
    }


def calibration_error(confidence_N: torch.Tensor, wins_N: torch.Tensor) -> float:
    """Expected calibration error of confidences in [0.5, 1]: mean gap between confidence and share of wins in a bin."""
    bins_N = ((confidence_N - 0.5) * 2 * ECE_BINS).long().clamp(max=ECE_BINS - 1)
    gaps = torch.zeros(ECE_BINS, dtype=torch.float64).index_add_(0, bins_N, wins_N - confidence_N)
    return float(gaps.abs().sum()) / len(confidence_N)


# ----------------------------------------------------------------------------------------------------------------- stage
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
        self.seed, source, options = recipe.training.seed, recipe.source, recipe.objective
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
            self.notes.append(f"{self.recipe.source.path}: {UNMATCHED}")
        return lambda prompt: not task.renderer.keys(prompt).isdisjoint(keys)

    def _tokens(self, pair: Pair) -> tuple[list[int], list[int]]:
        task = self.recipe.task
        special_tokens = "text" if task is None else task.special_tokens
        answers = (pair.chosen, pair.rejected)
        return tuple(self.classifier.tokens(pair.prompt, one, special_tokens=special_tokens) for one in answers)

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
        steps, size = recipe.training.steps, recipe.source.batch_size
        rows = starts_for(self.training, 0, steps * size, self.seed, self.name, "rows")
        position = {index: number for number, index in enumerate(self.training)}
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
        arguments = RewardConfig(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=size // micro,
            train_sampling_strategy="sequential",
            max_grad_norm=math.inf if limit is None else limit,
            center_rewards_coefficient=recipe.objective.center_coef or None,
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
        """Record a step, stop where training has broken down, and evaluate where it is due."""
        names = {"loss": "loss", "accuracy": "accuracy", "margin": "margin", "reward": "mean_reward"}
        metrics = {name: logs[given] for name, given in names.items()}
        metrics |= {"grad_norm": logs["grad_norm"], "skipped": self.optimizer.skipped}
        size = self.recipe.source.batch_size
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
        model = self.classifier.model
        if hasattr(model, "peft_config"):
            # In float32: rounded to the base's bfloat16, most of what an adapter has learned would be lost.
            self.classifier.model = model.float().merge_and_unload()
        scores = self._evaluate(self.recipe.training.steps)

        def write(folder: Path) -> None:
            self.classifier.model.save_pretrained(folder)
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

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
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


# ------------------------------------------------------------------------------------------------------------- optimizer
class SkippingAdamW(torch.optim.AdamW):
    """AdamW that leaves an update with a non-finite gradient out, and counts it; the counts are part of its state."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        gradients = [one.grad for each in self.param_groups for one in each["params"] if one.grad is not None]
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            group["skipped_in_a_row"] = 0
            super().step(closure)
        else:
            group["skipped"] = self.skipped + 1
            group["skipped_in_a_row"] = self.skipped_in_a_row + 1

    @property
    def skipped(self) -> int:
        return self.param_groups[0].get("skipped", 0)

    @property
    def skipped_in_a_row(self) -> int:
        return self.param_groups[0].get("skipped_in_a_row", 0)


def build_optimizer(classifier: Classifier, options: Optimizer) -> SkippingAdamW:
    """The optimizer of a reward model; `head_lr` is for its classification head."""
    trunk = {id(parameter) for parameter in classifier.trunk.parameters()}
    trained = [parameter for parameter in classifier.model.parameters() if parameter.requires_grad]
    head_lr = options.lr if options.head_lr is None else options.head_lr
    groups = [
        {"params": [one for one in trained if id(one) in trunk], "lr": options.lr},
        {"params": [one for one in trained if id(one) not in trunk], "lr": head_lr},
    ]
    return SkippingAdamW(groups, betas=options.betas or LONG_MEMORY, eps=options.eps, weight_decay=options.weight_decay)


def pairs_at_once(batch_size: int, longest: int, microbatch_tokens: int) -> int:
    """Pairs in a microbatch: the largest divisor of the batch whose texts fit, so that all weigh the same; at least one."""
    fitting = max(microbatch_tokens // (2 * longest), 1)
    return max(size for size in range(1, min(fitting, batch_size) + 1) if batch_size % size == 0)
