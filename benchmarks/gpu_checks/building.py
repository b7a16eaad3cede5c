"""Recipes, policies with random weights in the shapes of Qwen2.5, and random episodes, to measure with."""

from __future__ import annotations

import argparse
import atexit
import copy
import json
import os
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

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


def recipe_of(options: argparse.Namespace, shape: str, objective: dict[str, Any], **training: Any) -> Any:
    """A recipe for a model of this shape, from whose objective and options the measured parts are built."""
    from lmrl.recipe import Recipe

    sizes = SHAPES["tiny" if options.tiny else shape]
    vocabulary = 256 if options.tiny else VOCABULARY
    task = {
        "prompts": {"path": prompts(options)},
        "rewards": [f"{Path(__file__).with_name('reward.py')}:length_reward"],
    }
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
            "optimizer": {"name": "adamw"},  # as large models are trained by default
            "training": {"gradient_checkpointing": False, **training},
            "evaluation": {"suite": None},
        }
    ), lora


@cache
def prompts_file(length: int) -> str:
    """A file of 64 prompts of so many characters, which are its tokens."""
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
