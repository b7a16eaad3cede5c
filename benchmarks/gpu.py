"""lmrl's learner on one GPU: precision, speed, memory and learning, with random weights in the shapes of Qwen2.5. No network.

    python benchmarks/gpu.py all --out gpu.jsonl                  # goes on where it stopped; one JSON line a measurement
    python benchmarks/gpu.py head attention --out gpu.jsonl       # some of: parity head attention update decode step fsdp1 learn
    python benchmarks/gpu.py table --out gpu.jsonl                # what was measured, as Markdown
    python benchmarks/gpu.py wheels FOLDER                        # wheels that a bare machine with torch and transformers lacks
    python benchmarks/gpu.py all --tiny --out FILE                # tiny shapes, also on a CPU: that it runs, not how fast

What is measured:

parity     log-probabilities, gradients and one update of PPO's surrogate against float32 on the CPU, by way of computing
head       log-probabilities of 8,192 tokens over the whole vocabulary, forward and backward: against full logits and plain products
attention  an update's passes over groups of samples that share prompts: padded, end to end, and with each prompt computed once
update     tokens a second and share of the card's peak (MFU) of GRPO's and DPO's update, by checkpointing and compilation
decode     tokens a second of the `hf` engine, against transformers' `generate`
step       a whole GRPO step by its phases
fsdp1      FSDP2 with a single rank: the same loss as without
learn      the same final score of small runs on CPU in float32 and on the GPU in bfloat16

MFU counts 6 FLOPs a parameter (embeddings left out, the vocabulary projection counted) and token, and causal attention; what
checkpointing computes again is not counted. Peak: 989 TFLOP/s, the dense bfloat16 rate of the H100 and H200.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
PEAK = 989e12
VOCABULARY = 151936
SHAPES = {
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
}
WHEELS = (
    "pydantic==2.14.4", "pydantic-core==2.50.5", "annotated-types", "typing-inspection", "gymnasium>=1.2,<2",
    "farama-notifications", "cloudpickle", "datasets==5.2.0", "multiprocess", "dill", "trl==1.16.0", "peft>=0.21,<0.22",
)  # fmt: skip
MEASUREMENTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {}


def measurement(function: Callable[[argparse.Namespace], Iterator[dict[str, Any]]]) -> Callable:
    MEASUREMENTS[function.__name__] = function
    return function


# --------------------------------------------------------------------------------------------------------------- building
def recipe_of(options: argparse.Namespace, shape: str, objective: dict[str, Any], **training: Any) -> Any:
    """A recipe for a model of this shape, from whose objective and options the measured parts are built."""
    from lmrl.recipe import Recipe

    sizes = SHAPES["tiny" if options.tiny else shape]
    vocabulary = 256 if options.tiny else VOCABULARY
    task = {"prompts": {"path": prompts(options)}, "rewards": [f"{HERE / 'gpu.py'}:length_reward"]}
    config = {
        "model_type": "qwen2",
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        **sizes,
    }
    lora = training.pop("lora", None)
    return Recipe.model_validate(
        {
            "model": {"config": config},
            "task": task,
            "source": {"name": "rollouts"},
            "rollouts": {"prompts": 16, "samples": 8, "max_new_tokens": 256},
            "objective": objective,
            "training": {"gradient_checkpointing": False, **training},
            "evaluation": {"suite": None},
        }
    ), lora


@cache
def prompts_file(length: int) -> str:
    """A file of 64 prompts of so many characters, which are its tokens."""
    import random

    draw = random.Random(0)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", delete=False) as file:
        atexit.register(os.unlink, file.name)
        for _ in range(64):
            file.write(json.dumps({"prompt": "".join(draw.choices("abcdefghij ", k=length))}) + "\n")
    return file.name


def prompts(options: argparse.Namespace) -> str:
    return prompts_file(8 if options.tiny else 128)


def policy_of(
    options: argparse.Namespace,
    recipe: Any,
    lora: dict[str, Any] | None = None,
    spread: float = 0.02,
    reference: bool = False,
) -> Any:
    """A policy with random weights on the device, built there; the frozen base of an adapter in bfloat16."""
    import transformers

    from lmrl.policy.policy import Policy
    from lmrl.policy.tokenizers import build_tokenizer

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        **{name: value for name, value in recipe.model.config.items() if name != "model_type"}, initializer_range=spread
    )
    with torch.device(options.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if lora else torch.float32)
    kept = copy.deepcopy(model).requires_grad_(False) if reference and not lora else None
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**lora, target_modules="all-linear", task_type="CAUSAL_LM"))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        kept = "adapter_off"
    policy = Policy(model, build_tokenizer("char", ["ab"]), reference=kept).to(options.device)
    policy.configure(recipe)
    return policy


def trajectories_of(sizes: list[tuple[int, int]], groups: int, samples: int, vocabulary: int) -> list[Any]:
    """Random episodes of one turn: `samples` of each of `groups` prompts. sizes: tokens of prompt and completion of each."""
    from lmrl.trajectories.trajectory import CONTEXT, Segment, Trajectory

    generator = torch.Generator().manual_seed(0)
    found = []
    for group in range(groups):
        prompt = torch.randint(vocabulary, (sizes[group * samples][0],), generator=generator).tolist()
        for sample in range(samples):
            new = torch.randint(vocabulary, (sizes[group * samples + sample][1],), generator=generator).tolist()
            rewards = [None] * len(prompt) + [0.0] * (len(new) - 1) + [float(sample % 2)]
            turns = [CONTEXT] * len(prompt) + [0] * len(new)
            logprobs = [0.0] * len(prompt) + [-5.0] * len(new)
            segment = Segment(prompt + new, turns, logprobs, rewards)
            found.append(Trajectory([segment], "", "", group=group, reward=float(sample % 2)))
    return found


def drawn_lengths(options: argparse.Namespace, groups: int, samples: int) -> list[tuple[int, int]]:
    """Prompts of 512 tokens on average, and completions as of a reasoning model: log-normal, 64 to 1,536 tokens, median 300."""
    generator = torch.Generator().manual_seed(1)
    small = 32 if options.tiny else 1
    prompts = torch.randint(256, 769, (groups,), generator=generator) // small
    new = (300 * torch.exp(0.8 * torch.randn(groups * samples, generator=generator))).clamp(64, 1536).long() // small
    return [(int(prompts[index // samples]), int(new[index])) for index in range(groups * samples)]


def matrix_parameters(policy: Any) -> int:
    """Parameters of a token's products: all of the layers, and the projection to the vocabulary."""
    own = sum(
        one.numel() for name, one in policy.causal_lm.named_parameters() if "layers." in name and ".lora_" not in name
    )
    return own + policy.vocabulary.numel()


def flops(policy: Any, tokens: int, squares: float, actions: int, trained: bool = True) -> float:
    """Of a forward and a backward pass. squares: sum of the squared lengths of the sequences. trained: all weights, else an adapter's."""
    config = policy.causal_lm.config
    layers = matrix_parameters(policy) - policy.vocabulary.numel()
    each = 6 if trained else 4
    attention = (
        6
        * config.num_hidden_layers
        * config.num_attention_heads
        * (config.hidden_size // config.num_attention_heads)
        * squares
    )
    return each * (layers * tokens + policy.vocabulary.numel() * actions) + attention


# ----------------------------------------------------------------------------------------------------------------- timing
def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def seconds(options: argparse.Namespace, work: Callable[[], Any], repeats: int = 5, warm: int = 2) -> float:
    """Median time of a call, after some that are not counted."""
    times = []
    for number in range(warm + repeats):
        synchronize(options.device)
        started = time.perf_counter()
        work()
        synchronize(options.device)
        if number >= warm:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def reset_peak(options: argparse.Namespace) -> None:
    if options.device.type == "cuda":
        import gc

        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(options: argparse.Namespace) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if options.device.type == "cuda" else None


def length_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


# ----------------------------------------------------------------------------------------------------------- measurements
@measurement
def parity(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from lmrl.objectives.groups import grouped_batch
    from lmrl.trajectories.batch import to_batch

    recipe, _ = recipe_of(options, "0.5b", {"name": "grpo"}, precision="float32")
    samples, groups = 4, 2
    lengths = [(12, 5 + n) if options.tiny else (48, 40 + 30 * n) for n in range(samples * groups)]
    cpu = torch.device("cpu")
    base = policy_of(argparse.Namespace(**vars(options) | {"device": cpu}), recipe, spread=0.03)
    start = flat([one.detach() for one in base.parameters()], options.device)

    def measured(way: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of the actions, the gradient of PPO's surrogate, and the weights' change by one step of AdamW."""
        policy = copy.deepcopy(base).to(device)
        policy.autocast_dtype = torch.bfloat16 if "bfloat16" in way else None
        torch.set_float32_matmul_precision("highest" if way == "float32" else "high")
        packed = "end to end" in way or "shared" in way
        policy.attention = "sdpa" if not packed else "auto" if device.type == "cuda" else "varlen"
        assert policy.packs == packed
        if "compiled" in way:
            from lmrl.policy.policy import decoder_layers

            for layer in decoder_layers(policy.causal_lm):
                layer.forward = torch.compile(layer.forward, dynamic=True)
        trajectories = trajectories_of(lengths, groups, samples, recipe.model.config["vocab_size"])
        split = [trajectories[:samples], trajectories[samples:]]
        batch = grouped_batch(split, policy, share=True, whole=False) if "shared" in way else to_batch(trajectories)
        count = batch.num_actions
        batch.set("advantages", torch.randn(count, generator=torch.Generator().manual_seed(2)))
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, fused=device.type == "cuda" or None)
        policy.begin_update(False)
        logprobs = [torch.zeros(0)] * len(batch.lengths)
        for micro in batch.microbatches(policy.microbatch_tokens, policy.pad_id, policy.packs):
            micro.to(device)
            logprobs_N = policy(micro).logprobs
            (-(logprobs_N - logprobs_N.detach()).exp() * micro.fields["advantages"]).sum().div(count).backward()
            for index, part in zip(micro.indices, logprobs_N.detach().float().split(micro.lengths), strict=True):
                logprobs[index] = part
        gradient = flat([one.grad for one in policy.parameters()], options.device)
        optimizer.step()
        moved = flat([one.detach() for one in policy.parameters()], options.device) - start
        return torch.cat(logprobs).to(options.device), gradient, moved

    reference = measured("float32", cpu)
    ways = ["float32", "float32 with TF32", "bfloat16 padded", "bfloat16 end to end", "bfloat16 shared prompts"]
    ways.append("bfloat16 end to end, compiled")
    for way in ways if options.device.type == "cuda" else ["float32 shared prompts", "bfloat16 padded"]:
        logprobs, gradient, moved = measured(way, options.device)
        yield {
            "way": way,
            "logprob_mean_abs": float((logprobs - reference[0]).abs().mean()),
            "logprob_max_abs": float((logprobs - reference[0]).abs().max()),
            "logprob_std": float(reference[0].std()),
            "gradient_relative": float((gradient - reference[1]).norm() / reference[1].norm()),
            "gradient_cosine": cosine(gradient, reference[1]),
            "update_cosine": cosine(moved, reference[2]),
        }
        torch._dynamo.reset()


def flat(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.cat([one.to(device).flatten() for one in tensors])


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of long vectors, with sums in double."""

    def dot(a: torch.Tensor, b: torch.Tensor) -> float:
        parts = zip(a.split(2**24), b.split(2**24), strict=True)
        return sum(float(x.double() @ y.double()) for x, y in parts)

    return dot(one, other) / (dot(one, one) * dot(other, other)) ** 0.5


@measurement
def head(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from lmrl.policy.logprobs import token_logprobs

    rows, width, vocabulary = (64, 32, 512) if options.tiny else (8192, 1536, VOCABULARY)
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=options.device, dtype=torch.bfloat16, requires_grad=True)
    weight = (0.05 * torch.randn(vocabulary, width, device=options.device)).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=options.device)
    product = 2 * rows * width * vocabulary
    half = weight.detach().bfloat16()[:8192]
    plain = seconds(options, lambda: [hidden.detach() @ half.T for _ in range(8)], 10) / 8
    yield {
        "way": "a plain product of 8,192 columns",
        "seconds": plain,
        "tflops": 2 * rows * width * len(half) / plain / 1e12,
    }
    if options.device.type == "cuda":
        wide = (
            seconds(options, lambda: [torch.mm(hidden.detach(), half.T, out_dtype=torch.float32) for _ in range(8)], 10)
            / 8
        )
        yield {
            "way": "the same with its result in float32",
            "seconds": wide,
            "tflops": 2 * rows * width * len(half) / wide / 1e12,
        }
    coefficients = torch.randn(rows, device=options.device)

    def chunked(slice_size: int, entropy: bool = False, frozen: bool = False) -> None:
        hidden.grad = weight.grad = None
        matrix = weight.detach() if frozen else weight
        with torch.autocast(options.device.type, dtype=torch.bfloat16):
            logprobs, entropies = token_logprobs(hidden, matrix, None, targets, 1.0, slice_size)
        (logprobs * coefficients + (entropies * 0.01 if entropy else 0.0)).sum().backward()

    def full() -> None:
        hidden.grad = weight.grad = None
        with torch.autocast(options.device.type, dtype=torch.bfloat16):
            logits = hidden @ weight.T
        logprobs = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        (logprobs * coefficients).sum().backward()

    def forward_only() -> None:
        with torch.no_grad(), torch.autocast(options.device.type, dtype=torch.bfloat16):
            token_logprobs(hidden, weight, None, targets)

    sizes = (128,) if options.tiny else (8192, 16384, 32768)
    ways = {f"chunks of {size:,}": lambda size=size: chunked(size) for size in sizes}
    ways |= {"chunks, with an entropy term": lambda: chunked(sizes[0], entropy=True)}
    ways |= {
        "chunks, the matrix frozen": lambda: chunked(sizes[0], frozen=True),
        "chunks, forward alone": forward_only,
        "full logits": full,
    }
    counted = {"chunks, forward alone": 1, "chunks, the matrix frozen": 2}
    for name, work in ways.items():
        reset_peak(options)
        before = torch.cuda.memory_allocated() if options.device.type == "cuda" else 0
        taken = seconds(options, work, 5)
        peak = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2) if options.device.type == "cuda" else None
        yield {"way": name, "seconds": taken, "tflops": counted.get(name, 3) * product / taken / 1e12, "peak_gib": peak}


@measurement
def attention(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from lmrl.objectives.groups import grouped_batch
    from lmrl.trajectories.batch import to_batch

    groups, samples = (2, 2) if options.tiny else (8, 8)
    recipe, _ = recipe_of(options, "0.5b", {"name": "grpo"}, precision="bfloat16", microbatch_tokens=16384)
    policy = policy_of(options, recipe)
    lengths = drawn_lengths(options, groups, samples)
    trajectories = trajectories_of(lengths, groups, samples, recipe.model.config["vocab_size"])
    tokens = sum(map(sum, lengths))
    for way in ("padded", "end to end", "shared prompts"):
        policy.attention = "sdpa" if way == "padded" else "varlen" if options.device.type == "cpu" else "auto"
        policy.__dict__.pop("packs", None)
        policy.__dict__.pop("shares_prompts", None)
        split = [trajectories[start : start + samples] for start in range(0, len(trajectories), samples)]
        batch = (
            grouped_batch(split, policy, share=True, whole=False) if way == "shared prompts" else to_batch(trajectories)
        )
        policy.begin_update(False)
        micros = batch.microbatches(policy.microbatch_tokens, policy.pad_id, policy.packs)
        for micro in micros:
            micro.to(options.device)

        def passes(micros: list[Any] = micros) -> None:
            policy.zero_grad(set_to_none=True)
            for micro in micros:
                policy(micro).logprobs.sum().backward()

        reset_peak(options)
        taken = seconds(options, passes, 3)
        yield {
            "way": way,
            "packs": policy.packs,
            "seconds": taken,
            "tokens_per_s": tokens / taken,
            "computed_tokens": sum(micro.tokens_BT.numel() for micro in micros),
            "tokens": tokens,
            "microbatches": len(micros),
            "peak_gib": peak_gib(options),
        }


@measurement
def update(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    cases = [
        ("1.5b", "grpo", 16384, {"gradient_checkpointing": True}),
        ("1.5b", "grpo", 16384, {"gradient_checkpointing": True, "compile": True}),
        ("1.5b", "grpo", 8192, {}),
        ("1.5b", "grpo", 8192, {"compile": True}),
        ("1.5b", "dpo", 8192, {}),
        ("0.5b", "grpo", 16384, {}),
        ("7b", "grpo", 8192, {"gradient_checkpointing": True, "lora": {"r": 16, "lora_alpha": 32}}),
    ]
    if options.tiny:
        cases = [("tiny", "grpo", 512, {}), ("tiny", "dpo", 512, {"gradient_checkpointing": True})]
    for shape, name, micro, training in cases:
        reset_peak(options)
        yield update_of(options, shape, name, micro, training)


def update_of(
    options: argparse.Namespace, shape: str, name: str, micro: int, training: dict[str, Any]
) -> dict[str, Any]:
    """An update of 16 sequences of 2,048 tokens. training: options of that section, and `lora`."""
    from lmrl.objectives import load_objective
    from lmrl.objectives.correction import Correction
    from lmrl.recipe.rates import with_rates
    from lmrl.training.updater import Updater

    recipe, lora = recipe_of(options, shape, {"name": name}, precision="bfloat16", microbatch_tokens=micro, **training)
    policy = policy_of(options, recipe, lora, reference=name == "dpo")
    objective = load_objective(recipe.resolved_objective)
    objective.correction = Correction.of(recipe.rollouts)
    length = 64 if options.tiny else 2048
    lengths = [(length // 32, length - length // 32)] * 16
    trajectories = trajectories_of(lengths, 8, 2, recipe.model.config["vocab_size"])
    for one in trajectories:
        one.chosen = one.reward > 0 if name == "dpo" else None
    updater = Updater(policy, with_rates(recipe, *policy.size), 10)

    def one_update() -> dict[str, float]:
        updater.begin(1)  # a step's first update is never taken back
        return updater.step(policy, objective, batch)

    prepared = seconds(options, lambda: objective.prepare(policy, trajectories), 1)
    batch = objective.prepare(policy, trajectories)
    taken = seconds(options, one_update, 3)
    tokens, actions = length * len(lengths), sum(new for _, new in lengths)
    done = flops(policy, tokens, tokens * length, actions, trained=lora is None)
    return {
        "case": f"{shape} {name}" + (" LoRA" if lora else ""),
        "microbatch_tokens": policy.microbatch_tokens,
        "checkpointing": bool(training.get("gradient_checkpointing")),
        "layers": "compiled" if training.get("compile") else "plain",
        "packs": policy.packs,
        "prepare_s": prepared,
        "seconds": taken,
        "tokens_per_s": tokens / taken,
        "mfu": done / taken / PEAK,
        "peak_gib": peak_gib(options),
    }


@measurement
def decode(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from lmrl.engines.base import Sampling
    from lmrl.engines.hf import HFEngine

    recipe, _ = recipe_of(options, "0.5b", {"name": "grpo"}, precision="bfloat16")
    policy = policy_of(options, recipe)
    policy.causal_lm.generation_config.eos_token_id = None
    prompt, new = (8, 8) if options.tiny else (128, 64)
    for rows in (4,) if options.tiny else (64, 256):
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(5, 200, (prompt,), generator=generator).tolist() for _ in range(rows)]
        engine = HFEngine(policy, slots=rows)
        keys = [("gpu", index) for index in range(rows)]
        reset_peak(options)
        sample = partial(engine.complete, prompts, Sampling(new), keys)
        taken = seconds(options, sample, 2, 1)
        drawn = sum(len(one.tokens) for one in sample())
        yield {
            "way": "hf engine",
            "rows": rows,
            "tokens_per_s": drawn / taken,
            "seconds": taken,
            "peak_gib": peak_gib(options),
        }
        batch = torch.tensor(prompts, device=options.device)

        def generate(batch: torch.Tensor = batch) -> None:
            with torch.no_grad(), torch.autocast(options.device.type, dtype=torch.bfloat16):
                policy.causal_lm.generate(
                    batch,
                    attention_mask=torch.ones_like(batch),
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=True,
                    top_k=0,
                )

        reset_peak(options)
        taken = seconds(options, generate, 2, 1)
        yield {
            "way": "generate",
            "rows": rows,
            "tokens_per_s": rows * new / taken,
            "seconds": taken,
            "peak_gib": peak_gib(options),
        }


@measurement
def step(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    recipe, _ = recipe_of(options, "0.5b", {"name": "grpo"}, steps=4, checkpoint_every=0)
    sizes = (2, 2, 8) if options.tiny else (16, 8, 256)
    recipe.rollouts.prompts, recipe.rollouts.samples, recipe.rollouts.max_new_tokens = sizes
    recipe.training.final = "last"
    with tempfile.TemporaryDirectory() as folder:
        _, lines = run(recipe, Path(folder) / "run")
    steps = [line for line in lines if line.get("kind") == "train"][1:]
    names = sorted({name for line in steps for name in line.get("time", {})})
    yield {"case": "0.5b grpo", "episodes": sizes[0] * sizes[1], "new_tokens": sizes[2]} | {
        name: statistics.median(line["time"][name] for line in steps) for name in names
    }


@measurement
def fsdp1(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    import torch.distributed as dist

    from lmrl.training.parallel.sharded import FSDPStrategy
    from lmrl.training.parallel.strategy import Strategy

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("nccl" if options.device.type == "cuda" else "gloo")
    try:
        for name, build in (("one process", Strategy), ("FSDP2, one rank", lambda: FSDPStrategy(options.device))):
            reset_peak(options)
            yield {"way": name} | sharded_updates(options, build())
    finally:
        dist.destroy_process_group()


def sharded_updates(options: argparse.Namespace, strategy: Any) -> dict[str, Any]:
    """Three updates of a 0.5B model by a strategy, and the time of another."""
    from lmrl.objectives import load_objective
    from lmrl.objectives.correction import Correction
    from lmrl.recipe.rates import with_rates
    from lmrl.training.updater import Updater

    recipe, _ = recipe_of(options, "0.5b", {"name": "grpo"}, precision="bfloat16", microbatch_tokens=8192)
    policy = policy_of(options, recipe)
    objective = load_objective(recipe.resolved_objective)
    objective.correction = Correction.of(recipe.rollouts)
    length = 32 if options.tiny else 1024
    trajectories = trajectories_of([(length // 4, length)] * 16, 4, 4, recipe.model.config["vocab_size"])
    updater = Updater(policy, with_rates(recipe, *policy.size), 10, strategy)
    batch = objective.prepare(policy, trajectories)

    def one_update() -> dict[str, float]:
        updater.begin(1)
        return updater.step(policy, objective, batch)

    stats = [one_update() for _ in range(3)]
    return {
        "losses": [one["loss"] for one in stats],
        "grad_norms": [one["grad_norm"] for one in stats],
        "seconds": seconds(options, one_update, 3, 1),
        "peak_gib": peak_gib(options),
    }


@measurement
def learn(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Small runs in processes of their own; those of a CPU beside those of the GPU."""
    steps = 20 if options.tiny else 300
    small = [f"training.steps={steps}", "training.checkpoint_every=0"]
    cases = {"tiny BC, CPU float32": (["training.precision=float32"], True)}
    if options.device.type == "cuda":
        sizes = [f"model.config.{name}={value}" for name, value in SHAPES["0.5b"].items()]
        large = [*sizes, "optimizer.lr=1e-4", "training.steps=100", "training.threads=null"]
        cases |= {
            "tiny BC, GPU bfloat16": ([], False),
            "0.5b BC, GPU float32": ([*large, "training.precision=float32"], False),
            "0.5b BC, GPU bfloat16": (large, False),
        }
    with tempfile.TemporaryDirectory() as scratch:
        on_cpu = [start_run(Path(scratch), name, small + more, cpu) for name, (more, cpu) in cases.items() if cpu]
        for name, (more, cpu) in cases.items():
            if not cpu:
                yield finished_run(*start_run(Path(scratch), name, small + more, cpu))
        for started in on_cpu:
            yield finished_run(*started)


def start_run(scratch: Path, name: str, overrides: list[str], cpu: bool) -> tuple[str, Path, subprocess.Popen, float]:
    """`random_walks/bc` in a process of its own: its name, folder, process, and when it began."""
    folder = scratch / name.replace(" ", "-")
    code = f"import lmrl; lmrl.train('random_walks/bc', overrides={overrides!r}, output={str(folder)!r})"
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})
    with open(folder.with_suffix(".log"), "w") as log:
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=log, stderr=log)
    return name, folder, process, time.perf_counter()


def finished_run(name: str, folder: Path, process: subprocess.Popen, started: float) -> dict[str, Any]:
    """What a run came to, once it has ended."""
    if process.wait():
        return {"case": name, "error": folder.with_suffix(".log").read_text()[-500:]}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if line.get("kind") == "eval"]
    losses = [line["loss"] for line in lines if line.get("kind") == "train"]
    return {
        "case": name,
        "score": scores[-1] if scores else None,
        "loss": statistics.mean(losses[-20:]),
        "seconds": time.perf_counter() - started,
    }


def run(recipe: Any, folder: Path) -> tuple[Any, list[dict[str, Any]]]:
    """A run in this process, and its rows of metrics."""
    import lmrl

    result = lmrl.train(recipe, output=folder)
    return result, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------------ lines
def execute(options: argparse.Namespace, names: list[str]) -> int:
    """Run the measurements that the file does not hold yet; each says in a last line that it is done."""
    lines = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.is_file() else []
    done = {line["measurement"] for line in lines if line.get("done")}
    card = torch.cuda.get_device_name() if options.device.type == "cuda" else "CPU"
    failed = 0
    for name in names:
        if name in done:
            continue
        base = {"measurement": name, "device": card, "torch": torch.__version__}
        started = time.perf_counter()
        try:
            for found in MEASUREMENTS[name](options):
                write(options.out, base | found)
            write(options.out, base | {"done": True, "seconds": time.perf_counter() - started})
        except Exception as error:  # the others are still worth their time
            import traceback

            failed += 1
            write(
                options.out,
                base | {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-1500:]},
            )
        torch._dynamo.reset()
        reset_peak(options)
    return failed


def write(path: Path, line: dict[str, Any]) -> None:
    line = {name: round(value, 6) if isinstance(value, float) else value for name, value in line.items()}
    print(json.dumps(line), flush=True)
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def table(path: Path) -> None:
    """What was measured, as Markdown."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for name in MEASUREMENTS:
        rows = [line for line in lines if line["measurement"] == name and not line.get("done") and "error" not in line]
        if not rows:
            continue
        columns = list(
            dict.fromkeys(key for row in rows for key in row if key not in ("measurement", "device", "torch"))
        )
        print(f"\n### {name} ({rows[0]['device']}, torch {rows[0]['torch']})\n\n| {' | '.join(columns)} |")
        print(f"|{'---|' * len(columns)}")
        for row in rows:
            cells = [f"{row[key]:.4g}" if isinstance(row.get(key), float) else str(row.get(key, "")) for key in columns]
            print(f"| {' | '.join(cells)} |")


def wheels(folder: Path) -> None:
    """Fetch the wheels for Python 3.12 on x86-64."""
    platforms = [f"--platform=manylinux{name}_x86_64" for name in ("_2_28", "_2_17", "2014")]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version=3.12",
    ]
    subprocess.run([*command, *platforms, "-d", str(folder), *WHEELS], check=True)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    print(f"{len(list(folder.iterdir()))} wheels, {size:.1f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help=f"all, table, wheels FOLDER, or some of {', '.join(MEASUREMENTS)}")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", type=torch.device, help="default: the accelerator")
    options = parser.parse_args()
    if options.what[0] == "wheels":
        return wheels(Path(options.what[1]))
    if options.what == ["table"]:
        return table(options.out)
    names = list(MEASUREMENTS) if options.what == ["all"] else options.what
    if unknown := set(names) - set(MEASUREMENTS):
        parser.error(f"'{sorted(unknown)[0]}' is not measured here: name some of {', '.join(MEASUREMENTS)}")
    sys.path.insert(0, str(HERE.parent))
    options.device = options.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sys.exit(min(execute(options, names), 1))


if __name__ == "__main__":
    main()
