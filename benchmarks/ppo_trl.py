"""Time trl 1.12.0's PPO (`trl.experimental.ppo`), with VADER as a programmatic reward.

Requirements (Python 3.11; a separate virtual environment):
    torch==2.13.0
    trl==1.12.0
    transformers==5.19.0
    peft==0.21.2
    accelerate==1.15.0
    datasets==5.2.0
    vadersentiment==3.3.2

The policy is a causal LM with a LoRA adapter (the reference is the same model, adapter off) and the value
model is a whole second network trained in full, as in trl's own PPO example. Every completion has exactly
--new-tokens tokens: trl's default is no stop token. The options that cost trl time without changing the
result are off: gradient checkpointing, the key-value cache outside generation, sample completions, trackers,
checkpoints.

The last line printed is a JSON object. The first step is a warm-up: it is left out of `step_seconds`,
`rollout_seconds` and `update_seconds`, but not out of `mean_reward`. `rollout_seconds` is generation, the
log-probability, reference, value and reward passes and the advantages; `update_seconds` is the rest.

License: Apache-2.0
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

PACKAGES = ("torch", "trl", "transformers", "peft", "accelerate", "datasets", "vadersentiment")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a causal LM in Hugging Face format")
    parser.add_argument("--prompts", required=True, type=Path, help='JSONL of {"prompt": text}')
    parser.add_argument("--prompt-tokens", type=int, default=16, help="keep at most this many tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=24, help="tokens in every completion")
    parser.add_argument("--batch", type=int, default=32, help="prompts per step")
    parser.add_argument("--microbatch", type=int, default=8, help="sequences in one forward and backward pass")
    parser.add_argument("--epochs", type=int, default=2, help="PPO epochs over each batch")
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32", "autocast"),
        default="bfloat16",
        help="of the weights; autocast is float32 weights with accelerate's bf16 mixed precision",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="including the warm-up step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--json", type=Path, help="also write the JSON object here")
    args = parser.parse_args()
    if args.batch % args.microbatch:
        parser.error("--batch must be a multiple of --microbatch")
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first one is the warm-up")
    return args


ARGS = parse_args() if __name__ == "__main__" else None
if ARGS:  # These are read while the libraries below are imported or set up.
    os.environ["OMP_NUM_THREADS"] = str(ARGS.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    # PPOTrainer makes its own Accelerator and never hands it `bf16=True`; only this variable reaches it.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if ARGS.dtype == "autocast" else "no"

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # noqa: E402


class VaderReward(torch.nn.Module):
    """A reward function in the shape of the reward model that trl's `get_reward` calls.

    `get_reward` calls the backbone on prompt and completion together, scores the last hidden state and reads
    the score at the last token. Here the "hidden state" is already the reward, the same at every position.
    """

    base_model_prefix = "backbone"

    def __init__(self, tokenizer, new_tokens: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.new_tokens = new_tokens
        self.analyzer = SentimentIntensityAnalyzer()

    def backbone(self, input_ids: torch.Tensor, **_) -> SimpleNamespace:
        """Reward the last `new_tokens` tokens of each row."""
        texts = self.tokenizer.batch_decode(input_ids[:, -self.new_tokens :], skip_special_tokens=True)
        rewards = [self.analyzer.polarity_scores(text)["compound"] for text in texts]
        rewards = torch.tensor(rewards, dtype=torch.float32, device=input_ids.device)
        return SimpleNamespace(hidden_states=[rewards[:, None, None].expand(*input_ids.shape, 1)])

    def score(self, hidden: torch.Tensor) -> torch.Tensor:
        """Pass the reward through."""
        return hidden


class StepClock(TrainerCallback):
    """Note when each step ends, and when its rollout ends: at the first call of policy and value together."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.rollout_ends: list[float] = []

    def on_train_begin(self, *_, **__) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_, **__) -> None:
        self.ends.append(time.perf_counter())

    def before_forward(self, *_) -> None:
        """A hook before the forward pass that only the update calls."""
        if len(self.rollout_ends) < len(self.ends):
            self.rollout_ends.append(time.perf_counter())

    def seconds(self) -> tuple[list[float], list[float], list[float]]:
        """Seconds of each step, of its rollout and of its update."""
        whole = [end - start for start, end in zip(self.ends, self.ends[1:])]
        rollout = [end - start for start, end in zip(self.ends, self.rollout_ends)]
        return whole, rollout, [w - r for w, r in zip(whole, rollout)]


def load_prompts(path: Path, tokenizer, prompt_tokens: int, at_least: int) -> Dataset:
    """Tokenize the prompts, repeated until there are `at_least`.

    While the last batch of a pass over the data is in use, accelerate ends gradient accumulation at every
    microbatch, which would give trl more optimizer steps than asked for; so no run reaches that batch.
    """
    with path.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["prompt"] for line in lines if line.strip()]
    ids = [row[:prompt_tokens] for row in tokenizer(texts)["input_ids"] if row]
    if not ids:
        raise SystemExit(f"no prompts in {path}")
    return Dataset.from_dict({"input_ids": ids * -(-at_least // len(ids))})


def make_trainer(args: argparse.Namespace, output_dir: str, clock: StepClock) -> PPOTrainer:
    """Set up trl's trainer as it is documented, without what only slows it down."""
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # as trl's example does; the model never sees its id
    dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    value = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype=dtype)
    policy.config.use_cache = value.config.use_cache = False
    policy.generation_config.use_cache = True
    config = PPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        seed=args.seed,
        learning_rate=args.lr,
        bf16=args.dtype == "autocast",
        gradient_checkpointing=False,
        per_device_train_batch_size=args.microbatch,
        gradient_accumulation_steps=args.batch // args.microbatch,
        local_rollout_forward_batch_size=args.batch,
        total_episodes=args.steps * args.batch,
        num_mini_batches=1,
        num_ppo_epochs=args.epochs,
        response_length=args.new_tokens,
        temperature=1.0,
        gamma=1.0,
        lam=0.95,
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    lora = LoraConfig(
        r=args.lora_r, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=VaderReward(tokenizer, args.new_tokens),
        value_model=value,
        train_dataset=load_prompts(args.prompts, tokenizer, args.prompt_tokens, (args.steps + 2) * args.batch),
        callbacks=[clock],
        peft_config=lora,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.model.register_forward_pre_hook(clock.before_forward)
    return trainer


def main(args: argparse.Namespace) -> None:
    """Train for a few steps and report how long they took."""
    torch.set_num_threads(args.threads)
    set_seed(args.seed)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(args, output_dir, clock)
        trainer.train()
    whole, rollout, update = ([round(second, 3) for second in part] for part in clock.seconds())
    report = {
        "peer": "trl",
        "versions": {name: version(name) for name in PACKAGES},
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "batch": args.batch,
        "microbatch": args.microbatch,
        "epochs": args.epochs,
        "lora_r": args.lora_r,
        "seed": args.seed,
        "lr": args.lr,
        "warmup_seconds": whole[:1],
        "step_seconds": whole[1:],
        "rollout_seconds": rollout[1:],
        "update_seconds": update[1:],
        "samples_per_second": round(args.batch / statistics.median(whole[1:]), 3),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),  # KiB on Linux
        "mean_reward": [round(log["objective/scores"], 4) for log in trainer.state.log_history],
    }
    line = json.dumps(report)
    if args.json:
        args.json.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main(ARGS)
