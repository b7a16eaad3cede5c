"""Suggestions for an unknown key: a similar name, the right section, or the key for another tool's name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lmrl.errors import did_you_mean

ELSEWHERE = {
    "batch_size": ("source.batch_size", "rollouts.prompts"),
    "bf16": ("training.precision",),
    "bsz": ("source.batch_size", "rollouts.prompts"),
    "checkpoint": ("model.path",),
    "cliprange": ("objective.clip",),
    "cliprange_value": ("objective.value_clip",),
    "data": ("source.path", "task.prompts.path"),
    "dataset": ("source.path", "task.prompts.path"),
    "ent_coef": ("objective.entropy_coef",),
    "env": ("task.environment",),
    "epsilon": ("objective.clip", "optimizer.eps"),
    "eval_steps": ("evaluation.every",),
    "gradient_accumulation_steps": ("training.microbatch_tokens",),
    "group_size": ("rollouts.samples",),
    "kl": ("objective.kl_coef",),
    "learning_rate": ("optimizer.lr",),
    "lora_alpha": ("model.lora",),
    "lora_r": ("model.lora",),
    "lr_scheduler": ("optimizer.schedule",),
    "lr_scheduler_type": ("optimizer.schedule",),
    "max_completion_length": ("rollouts.max_new_tokens",),
    "max_steps": ("training.steps",),
    "max_tokens": ("rollouts.max_new_tokens",),
    "model.name": ("model.path",),
    "mini_batch_size": ("objective.minibatches",),
    "model_name": ("model.path",),
    "model_name_or_path": ("model.path",),
    "num_generations": ("rollouts.samples",),
    "num_train_epochs": ("training.steps",),
    "optim": ("optimizer.name",),
    "per_device_train_batch_size": ("training.microbatch_tokens",),
    "ppo_epochs": ("objective.epochs",),
    "rank": ("model.lora",),
    "report_to": ("tracking.trackers",),
    "reward": ("task.rewards",),
    "rewards": ("task.rewards",),
    "save_steps": ("training.checkpoint_every",),
    "save_total_limit": ("training.keep_checkpoints",),
    "task.name": ("task.environment",),
    "target_kl": ("objective.target_kl",),
    "total_steps": ("training.steps",),
    "vf_coef": ("objective.value_coef",),
    "wandb": ("tracking.trackers",),
    "warmup": ("optimizer.warmup_steps",),
    "warmup_ratio": ("optimizer.warmup_steps",),
}
"""Names of keys in trl, transformers, verl and stable-baselines, and the keys here, the most likely first."""


def suggest(name: str, section: Iterable[str], sections: Mapping[str, Iterable[str]], above: str = "") -> str:
    """`"; did you mean 'optimizer.lr'?"` for an unknown key.

    name: its last part. section: the valid keys of its section. sections: all keys, by dotted section ('' for the
    top level). above: dotted name of this section. Without a match: the list of the section's keys.
    """
    known = {f"{place}.{key}".lstrip("."): key for place, keys in sections.items() for key in keys}
    word = name.lower().replace("-", "_")
    named = ELSEWHERE.get(f"{above}.{word}", ELSEWHERE.get(word, ()))
    meant = [target for target in named if target in known]
    if not meant:
        same = [dotted for dotted, key in known.items() if key == word]
        least = min((dotted.count(".") for dotted in same), default=0)
        same = [dotted for dotted in same if dotted.count(".") == least]
        meant = same if len(same) == 1 else []
    if meant:
        own = [dotted for dotted in meant if dotted.rpartition(".")[0] == above]
        return f"; did you mean '{(own or meant)[0]}'?"
    hint = did_you_mean(word, section)
    if above:
        for key in sorted(section, key=len, reverse=True):
            hint = hint.replace(f"'{key}'", f"'{above}.{key}'")
    return hint
