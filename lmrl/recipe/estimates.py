"""Estimates of a recipe, computed without torch: batch arithmetic and memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from lmrl.errors import counted
from lmrl.process_memory import limit_bytes
from lmrl.recipe import (
    OWN_TASK,
    Lora,
    MixtureSource,
    Model,
    PromptTask,
    Recipe,
)
from lmrl.recipe.evaluations import is_imitation, own_plan
from lmrl.recipe.held_episodes import held_bytes
from lmrl.recipe.model_shape import model_shape
from lmrl.recipe.rates import UNKNOWN_SIZE, default_rates, with_rates

PROCESS_MB, CUDA_BUILD_MB = 580, 200
"""Python with all imports of a run, before any model; and what a build of torch for CUDA adds, also on a machine without a GPU."""
TRL_MB = 140
"""Added by trl's imports; trl's loop trains reward models."""
VLLM_PROCESS_MB = 300
"""Memory of vLLM's imports in MB, without its copy and cache."""
CPU_BFLOAT16 = 4
"""Factor on the tensors of a pass for a CPU that computes in bfloat16. oneDNN caches kernels for every new shape; the rest of the
growth is unexplained. Fitted to long runs (see docs/memory.md); float32 does not show it."""
SLICE = 8192
"""Vocabulary entries that lmrl.policy.logprobs projects at a time."""
VLLM_CACHE_GIB = 1.0
"""Default size of vLLM's keys and values, as in lmrl.engines.vllm on a CPU."""
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Bytes of a weight in 4 bits: 64 weights share an 8-bit scale, and 256 scales share a 32-bit one (arXiv 2305.14314, section 3)."""
ON_THEIR_WAY = "gradients on their way"
PACKED = "weights packed for sampling"
SMALLEST_PACKED, PACKED_SHARE = 100_000, 8
"""Which weights a CPU packs, and at most which part of its memory for all of them, as in lmrl.policy.packed_weights."""
OBSERVATION = 16
"""A guess at the tokens of an observation, which only playing tells."""
SPARE = 64
"""Columns of keys and values ahead of need, as in lmrl.policy.cache."""


def arithmetic_line(recipe: Recipe) -> str:
    """Prompts x samples -> minibatches -> microbatches -> updates."""
    a = recipe.arithmetic()
    if not recipe.objective.leaves_policy:
        longest = (recipe.objective.tokens_a_row() or 0) // 2
        return (
            f"a step: {counted(a['episodes'], 'pair')} of texts of at most {longest} tokens each -> microbatches of "
            f"about {recipe.training.microbatch_tokens} tokens -> 1 update; {counted(a['steps'], 'step')} = "
            f"{counted(a['updates'], 'update')}"
        )
    width = _tokens_an_episode(recipe)
    micro = math.ceil(a["episodes_per_minibatch"] * width / recipe.training.microbatch_tokens)
    episodes = _played(a["prompts"], a["samples"], a["episodes"])
    if isinstance(recipe.source, MixtureSource):
        played = recipe.rollouts.prompts * recipe.rollouts.samples
        episodes = (
            f"plays {_played(recipe.rollouts.prompts, recipe.rollouts.samples, played)} into the replay buffer, learns "
            f"from {a['episodes']}"
        )
    return (
        f"a step: {episodes} -> {counted(a['minibatches'], 'minibatch', 'minibatches')} of {a['episodes_per_minibatch']} -> about "
        f"{counted(micro, 'microbatch', 'microbatches')} of at most {recipe.training.microbatch_tokens} tokens each -> "
        f"{counted(a['epochs'], 'epoch')} = {counted(a['updates_per_step'], 'update')}; {counted(a['steps'], 'step')} = "
        f"{counted(a['updates'], 'update')}"
    )


def _played(prompts: int, samples: int, episodes: int) -> str:
    return f"{counted(prompts, 'prompt')} x {counted(samples, 'sample')} = {counted(episodes, 'episode')}"


def evaluation_line(recipe: Recipe) -> str:
    """One line that says when a stage is scored, and on what."""
    options = recipe.evaluation
    if not recipe.objective.leaves_policy:
        return "evaluation: on held-out pairs, at the end" + (f" and {_every(options.every)}" if options.every else "")
    if options.suite is None:
        return "evaluation: none"
    if options.suite != OWN_TASK:
        between = "in between if the budget allows" if options.every is None else _every(options.every)
        return f"evaluation on suite {options.suite}: {_when(between)}"
    if not recipe.scores_own_task:
        return "evaluation: none, since nothing judges held-out episodes of this task"
    plan = own_plan(recipe)
    if plan is None:
        return "evaluation: none, since the stage is too short to spare any (evaluation.every=0 asks for it)"
    when = _when(_every(plan.every))
    if is_imitation(recipe) and recipe.model.path is None and recipe.evaluation.gate is None:
        when = "at the end, and at the start if it continues from another stage"
    return f"evaluation on the stage's own task: {counted(plan.episodes, 'episode')} each, {when}"


def _every(steps: int) -> str:
    """When something happens that is due every so many steps; nothing for 0, which is never."""
    return f"every {counted(steps, 'step')}" if steps else ""


def _when(between: str) -> str:
    return f"at the start, {between} and at the end" if between else "at the start and the end"


def rate_line(recipe: Recipe) -> str:
    """The learning rates, and where they come from."""
    shape, stated = model_shape(recipe.model), recipe.optimizer
    if shape is None and stated.lr is None:
        return "learning rate: depends on the size of the model, which is not known here yet (lmrl/recipe/rates.py)"
    sizes = (shape["parameters"], shape["hidden"]) if shape else (int(UNKNOWN_SIZE), 1024)
    chosen, rates = with_rates(recipe, *sizes), default_rates(recipe, *sizes)
    reason = "as stated" if stated.lr is not None else rates.reason
    heads = f", heads {chosen.head_lr:g}" if recipe.objective.head_parameters(1, 1)[0] else ""
    by = "" if stated.name else {"namo": " with NAMO", "muon": " with Muon"}.get(chosen.name or "", "")
    return f"learning rate: {chosen.lr:g}{by}{heads} ({reason})"


def memory_lines(recipe: Recipe) -> list[str]:
    """The model's size and an estimate of peak memory, item by item, or why there is none."""
    shape, items = model_shape(recipe.model), memory(recipe)
    if shape is None or items is None:
        return [f"memory: unknown, because the sizes of '{recipe.model.path or 'model.config'}' are not known here yet"]
    parts = ", ".join(f"{name} {size:,.0f}" for name, size in items.items() if round(size))
    learned, copy, heads, _ = _trained(recipe, shape)
    count = f"{shape['parameters'] / 1e6:,.2f}M parameters, {(learned + copy + heads) / 1e6:,.2f}M trainable"
    return [f"model: {count}", f"memory: about {sum(items.values()):,.0f} MB ({parts})"]


def memory(recipe: Recipe, accelerator: bool = False) -> dict[str, float] | None:
    """Estimate of peak memory in MB, item by item; None if the model's sizes are not known on this machine.

    It is for one process, without sharding. accelerator: only the accelerator's memory; else that of a process on a CPU.
    """
    shape = model_shape(recipe.model)
    if shape is None:
        return None
    lora, total = recipe.model.lora, shape["parameters"]
    learned, copy, heads, targets = _trained(recipe, shape)
    base_bytes = _frozen_bytes(recipe.model, shape)
    items = {"weights": base_bytes + (_adapter(lora, shape) * 4 if lora else 0)}
    moments = _moments_bytes(recipe, shape)
    items["gradients and Adam"] = learned * 4 + moments(learned)
    items["second model and its target"] = copy * 12 + moments(copy)  # weight, gradient, target
    items["heads and their targets"] = heads * 8 + targets * 4 + moments(heads, heads)
    if recipe.objective.holds_reference and lora is None:
        items["reference"] = base_bytes
    if recipe.rollouts.engine == "vllm":
        vllm = recipe.rollouts.vllm
        copied = total * (4 if vllm.dtype == "float32" else 2)
        items["vLLM's copy and cache"] = copied + round((vllm.memory or VLLM_CACHE_GIB) * 2**30)
    width = 2 if "bfloat16" in (recipe.model.dtype, recipe.training.precision or (accelerator and "bfloat16")) else 4
    update, sampling = _update_bytes(recipe, shape, width), _sampling_bytes(recipe, shape, width)
    if sampling and not accelerator:
        sampling[PACKED] = _packed_bytes(shape, width)
    if not accelerator and "bfloat16" in (recipe.model.dtype, recipe.training.precision):
        for passes in (update, sampling):
            computed = sum(size for name, size in passes.items() if name not in (ON_THEIR_WAY, PACKED))
            passes["a CPU's bfloat16 kernels"] = (CPU_BFLOAT16 - 1) * computed
    # They do not happen at the same time, and each reuses the memory that the other has freed.
    passes = update if sum(update.values()) >= sum(sampling.values()) else sampling
    megabytes = {name: size / 2**20 for name, size in (items | passes).items() if size}
    if accelerator:
        return megabytes
    python = PROCESS_MB + (CUDA_BUILD_MB if is_cuda_build() else 0)
    python += VLLM_PROCESS_MB if recipe.rollouts.engine == "vllm" else 0
    python += 0 if recipe.objective.leaves_policy else TRL_MB
    episodes = held_bytes(recipe, recipe.rollouts.max_new_tokens + OBSERVATION) / 2**20
    return megabytes | ({"episodes": episodes} if episodes else {}) | {"python": python}


@cache
def is_cuda_build() -> bool:
    """True if the installed torch has CUDA's libraries; torch is not imported."""
    torch = find_spec("torch")
    folders = torch.submodule_search_locations if torch else None
    return any(file for folder in folders or () for file in Path(folder, "lib").glob("*torch_cuda.*"))


def _frozen_bytes(model: Model, shape: dict[str, int]) -> int:
    """Bytes of the frozen weights and, if they are quantized, of the one matrix that is dequantized at a time."""
    width = 2 if model.dtype == "bfloat16" else 4
    if model.quantization is None:
        return shape["parameters"] * width
    layers = shape["parameters"] - shape["embeddings"]  # not the head
    return round(layers * NF4_BYTES) + (shape["embeddings"] + shape["hidden"] * shape["intermediate"]) * width


def _trained(recipe: Recipe, shape: dict[str, int]) -> tuple[int, int, int, int]:
    """Numbers of parameters trained in the policy, in a second model and in heads, and of the heads' targets."""
    lora, total = recipe.model.lora, shape["parameters"]
    heads, targets = recipe.objective.head_parameters(shape["hidden"], shape["vocabulary"])
    learned = total if lora is None else _adapter(lora, shape)
    return *recipe.resolved_objective.trained_parameters(learned, total), heads, targets


def _adapter(lora: Lora, shape: dict[str, int]) -> int:
    """Parameters of an adapter on every linear layer, plus embeddings and head if they are trained too."""
    magnitudes = shape["dora"] if lora.use_dora else 0
    return lora.r * shape["lora_per_rank"] + magnitudes + _copied_embeddings(lora, shape)


def _copied_embeddings(lora: Lora, shape: dict[str, int]) -> int:
    """Parameters of embeddings and head that are trained in full; they are one matrix if the model ties them."""
    copies = {name.rpartition(".")[2] for name in lora.modules_to_save or ()} & {"embed_tokens", "lm_head", "wte"}
    return min(len(copies) * shape["vocabulary"] * shape["hidden"], shape["embeddings"])


def _moments_bytes(recipe: Recipe, shape: dict[str, int]) -> Callable[..., int]:
    """Bytes of the optimizer's state as a function of the number of parameters, and of those in heads.

    AdamW has two moments, of which those of embeddings stay in float32 with 8 bits; Muon and NAMO have one per matrix, and their last step.
    """
    lora, name = recipe.model.lora, recipe.optimizer.name
    embeddings = _copied_embeddings(lora, shape) if lora else shape["vocabulary"] * shape["hidden"]

    def moments(parameters: int, heads: int = 0) -> int:
        if name != "adamw_8bit":
            return 8 * parameters
        return 2 * parameters + 6 * (0 if heads else min(embeddings, parameters))

    return moments


def _update_bytes(recipe: Recipe, shape: dict[str, int], width: int) -> dict[str, int]:
    """Bytes that a pass of an update keeps for its backward pass. width: bytes per number."""
    tokens = min(recipe.training.microbatch_tokens, recipe.arithmetic()["episodes"] * _tokens_an_episode(recipe))
    per_token = shape["layers"] * _kept_by_a_layer(recipe.model.lora, shape) * width
    # With checkpointing only the layers' inputs are kept, and one layer is computed again at a time.
    kept = shape["layers"] * shape["hidden"] * width + per_token // shape["layers"]
    learned, copy, *_ = _trained(recipe, shape)
    trunks = (learned > 0) + (copy > 0)  # the policy's, and that of a second model for values
    items = {"activations": trunks * tokens * (kept if recipe.training.gradient_checkpointing else per_token)}
    if recipe.objective.leaves_policy:
        items["vocabulary slices"] = 3 * tokens * min(SLICE, shape["vocabulary"]) * 4
        items[ON_THEIR_WAY] = 4 * _largest_gradients(recipe, shape)
    return items


def _kept_by_a_layer(lora: Lora | None, shape: dict[str, int]) -> int:
    """Numbers that a layer keeps for each token until its backward pass."""
    # The inputs of both norms, their outputs, q, the attended values; k and v; gate, its activation, up and their product.
    kept = 6 * shape["hidden"] + 2 * shape["keys"] + 4 * shape["intermediate"]
    # Trained norms keep what they scale; adapters keep the r numbers between their two matrices.
    return kept + (2 * shape["hidden"] if lora is None else 7 * lora.r)


def _largest_gradients(recipe: Recipe, shape: dict[str, int]) -> int:
    """Numbers in gradients of vocabulary matrices that a second microbatch holds in addition to those of the first, before they are
    summed: of the projection, and of one Q head for its two uses, the value of the action and the push-down."""
    own = shape["vocabulary"] * shape["hidden"] if recipe.model.lora is None else 0
    heads, twins = recipe.objective.head_parameters(shape["hidden"], shape["vocabulary"])[0], recipe.objective.twins
    return own + (2 * heads // twins if twins else 0)


def _sampling_bytes(recipe: Recipe, shape: dict[str, int], width: int) -> dict[str, int]:
    """Bytes that engine `hf` holds while it samples. width: bytes per number."""
    options = recipe.rollouts
    if not recipe.source.plays or options.engine != "hf":
        return {}
    rows = min(options.slots, options.prompts * options.samples)
    tokens = rows * (_tokens_an_episode(recipe) + SPARE)
    if options.cache_tokens is not None:
        tokens = min(tokens, options.cache_tokens)
    return {
        "keys and values": tokens * 2 * shape["layers"] * shape["keys"] * width,
        "logits of sampling": 3 * rows * shape["vocabulary"] * 4,
    }


def _packed_bytes(shape: dict[str, int], width: int) -> int:
    """Bytes of the copies of weights that a CPU multiplies by while it samples. width: bytes per number."""
    head = shape["vocabulary"] * shape["hidden"]
    layers = (
        shape["parameters"] - shape["embeddings"] if shape["hidden"] * shape["intermediate"] >= SMALLEST_PACKED else 0
    )
    packed = (layers + (head if head >= SMALLEST_PACKED else 0)) * width
    return packed if packed <= limit_bytes() // PACKED_SHARE else 0


def _tokens_an_episode(recipe: Recipe) -> int:
    """Maximum tokens of an episode; a guess if it is only known from playing."""
    if (stated := recipe.objective.tokens_a_row()) is not None:
        return stated
    logged = getattr(recipe.source, "max_tokens", None)
    if not recipe.source.plays and logged is not None:
        return int(logged) * recipe.objective.episodes_a_row
    prompt = recipe.task.prompts.max_tokens if isinstance(recipe.task, PromptTask) else OBSERVATION
    return recipe.rollouts.max_new_tokens + prompt
