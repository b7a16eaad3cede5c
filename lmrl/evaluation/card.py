"""The model card of an export: a README.md with the metadata that the hub expects and what readers need."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lmrl import __version__
from lmrl.errors import counted
from lmrl.local_names import HUB_NAME
from lmrl.plugins.objects import PREFIX, is_object
from lmrl.recipe import MAIN_STAGE, AgentTask, PromptTask, Recipe
from lmrl.recipe.files import stages_of, to_yaml
from lmrl.run import RESULTS_FILE
from lmrl.run_folders import VERSIONS_FILE, read_recipe
from lmrl.training.display import interval, scope_of

CARD = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for `--max-lora-rank`."""


def write_card(
    folder: Path,
    run: Path | None,
    name: str,
    checkpoint: str = "final",
    beta: float | None = None,
    distilled: bool = False,
) -> None:
    """Write the card of an exported folder.

    run: the run that it comes from (None: unknown). name: what the card's code loads, a hub name or the folder.
    checkpoint: the run's `final`, `best` or `step-N`. beta: weight of the Q values that were folded in. distilled: True
    if the model was instead fitted to the policy that they guide.
    """
    recipe = read_recipe(run) if run else None
    base = _base(folder, recipe)
    parts = [
        _front_matter(folder, recipe, base),
        f"# {name.rsplit('/', 1)[-1]}",
        _summary(folder, recipe, base, checkpoint, beta, distilled),
    ]
    if run and recipe:
        parts += [_training(recipe), _metrics(run, checkpoint)]
    parts.append(_loading(folder, name, base, chat=_has_template(folder)))
    if run and recipe:
        parts += [_recipe(recipe), _versions(run)]
    (folder / CARD).write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def _base(folder: Path, recipe: Recipe | None) -> str | None:
    """The model that training began from; None for one from scratch."""
    if _is_adapter(folder):
        found: str | None = json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
        return found
    return (
        next((stage.model.path for stage in stages_of(recipe).values() if stage.model.path), None) if recipe else None
    )


def _shown(path: str) -> str:
    """A file's or folder's name for publication: without the folders above it, which are specific to this machine."""
    if is_object(path):
        return f"{path.removeprefix(PREFIX)} (given in Python)"
    if not path.startswith(("/", "~")):
        return path
    file, colon, attribute = path.rpartition(":")
    return f"{Path(file).name}:{attribute}" if colon and file.endswith(".py") else Path(path).name


def _is_hub_name(path: str | None) -> bool:
    return path is not None and "/" in path and HUB_NAME.fullmatch(path) is not None


def _front_matter(folder: Path, recipe: Recipe | None, base: str | None) -> str:
    data: dict[str, Any] = {"library_name": "peft" if _is_adapter(folder) else "transformers"}
    data["pipeline_tag"] = "text-generation"
    data["tags"] = ["lmrl"]
    if recipe:
        stages = stages_of(recipe)
        data["tags"] += dict.fromkeys(_shown(stage.objective.name) for stage in stages.values())
        if datasets := [path for path in dict.fromkeys(_data_of(stages).values()) if _is_hub_name(path)]:
            data["datasets"] = datasets
    if _is_hub_name(base):
        data["base_model"] = base
    return f"---\n{yaml.safe_dump(data, sort_keys=False).rstrip()}\n---"


def _data_of(stages: Mapping[str, Recipe]) -> dict[str, str]:
    """Files and datasets by what they contain, once per stage."""
    found: dict[str, str] = {}
    for name, stage in stages.items():
        place = "" if name == MAIN_STAGE else f" of stage {name}"
        source = getattr(stage.source, "path", None)
        if source:
            found[f"logged data{place}"] = source
        prompts = stage.task.prompts.path if isinstance(stage.task, PromptTask) else getattr(stage.task, "data", None)
        if prompts and prompts != source:
            found[f"prompts{place}"] = prompts
    return {
        what: path for number, (what, path) in enumerate(found.items()) if path not in list(found.values())[:number]
    }


def _summary(
    folder: Path, recipe: Recipe | None, base: str | None, checkpoint: str, beta: float | None, distilled: bool
) -> str:
    kind = "A LoRA adapter" if _is_adapter(folder) else "A language model"
    what = f"{kind}, trained with lmrl {__version__}" + (
        f": {recipe.description}." if recipe and recipe.description else "."
    )
    origin = f"It began from `{_shown(base)}`." if base else "It was built from scratch." if recipe else ""
    which = "" if checkpoint == "final" else f"It is checkpoint `{checkpoint}` of its run."
    guided = f"Q values of weight {beta:g} are folded into its vocabulary matrix." if beta else ""
    if distilled:
        guided = f"It was distilled from the policy guided by Q values of weight {beta:g}."
    return " ".join(part for part in (what, origin, which, guided) if part)


def _training(recipe: Recipe) -> str:
    lines = ["## Training", ""]
    for name, stage in stages_of(recipe).items():
        task = stage.task
        what = [
            f"objective `{_shown(stage.objective.name)}`",
            counted(stage.training.steps, "step"),
            f"seed {stage.training.seed}",
        ]
        if isinstance(task, AgentTask):
            tools = ", ".join(one if isinstance(one, str) else ", ".join(one) for one in task.tools)
            program = task.agent or (task.agent_command or [""])[0]
            what.append(f"tools `{_shown(tools)}`" if tools else f"program `{_shown(program)}`")
        if isinstance(task, PromptTask | AgentTask) and stage.judges:
            what += [f"reward `{_shown(reward.what)}` (weight {reward.weight:g})" for reward in task.rewards]
        elif task is not None and not isinstance(task, PromptTask | AgentTask):
            what.append(f"environment `{_shown(task.environment)}`")
        what.append("LoRA" if stage.model.lora else "all weights")
        lines.append(f"- {'' if name == MAIN_STAGE else f'stage {name}: '}{', '.join(what)}")
    for what_, path in _data_of(stages_of(recipe)).items():
        hub = f"[{path}](https://huggingface.co/datasets/{path})"
        lines.append(f"- {what_}: {hub if _is_hub_name(path) else f'`{_shown(path)}`'}")
    return "\n".join(lines)


def _metrics(run: Path, checkpoint: str) -> str:
    """The run's final table with its intervals; "" if it has none."""
    path = run / RESULTS_FILE
    rows: dict[str, Any] = {
        label: row for label, row in (json.loads(path.read_text()) if path.is_file() else {}).items() if row
    }
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = ["## Metrics", "", f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [
        f"| {label} | {' | '.join(interval(row[name]) if name in row else '' for name in names)} |"
        for label, row in rows.items()
    ]
    scope = scope_of(rows)
    lines += ["", "Means with 95 % intervals" + (f", which hold for {scope}." if scope else ".")]
    if checkpoint != "final":
        lines.append("The table shows the policies that the run compared at its end, not this checkpoint.")
    return "\n".join(lines)


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(json.loads(path.read_text()).get("chat_template"))


def _loading(folder: Path, name: str, base: str | None, chat: bool) -> str:
    """Code that loads the export in transformers, peft and vLLM."""
    ask = (
        'messages = [{"role": "user", "content": "..."}]\n'
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)'
        if chat
        else 'inputs = tokenizer("...", return_tensors="pt")'
    )
    say = "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))"
    if _is_adapter(folder):
        shown = _shown(base or "BASE")
        note = "" if _is_hub_name(base) else f"`{shown}` has to be where the adapter's `adapter_config.json` says.\n\n"
        return (
            f"## Loading\n\n{note}With peft:\n\n```python\nfrom peft import AutoPeftModelForCausalLM\nfrom transformers import "
            f'AutoTokenizer\n\ntokenizer = AutoTokenizer.from_pretrained("{name}")\nmodel = AutoPeftModelForCausalLM.from_pretrained('
            f'"{name}")\n{ask}\n{say}\n```\n\n{_in_vllm(json.loads((folder / ADAPTER_CONFIG).read_text()), shown, name)}'
        )
    return (
        "## Loading\n\nWith transformers:\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\nmodel = AutoModelForCausalLM.from_pretrained("{name}")\n{ask}\n{say}\n```\n\n'
        f"With vLLM:\n\n```bash\nvllm serve {name}\n```\n\nTo train it further with lmrl or peft, name it as the model: "
        f"`model.path={name}`."
    )


def _in_vllm(adapter: dict[str, Any], base: str, name: str) -> str:
    """How vLLM loads an adapter, or that it cannot. adapter: its configuration."""
    rank = next((rank for rank in VLLM_RANKS if rank >= adapter["r"]), None)
    if rank is None or adapter.get("use_dora") or adapter.get("modules_to_save"):
        return "vLLM cannot load an adapter of this kind: export the merged model for it, without `--adapter-only`."
    command = f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules adapter={name}"
    return f"With vLLM:\n\n```bash\n{command}\n```"


def _recipe(recipe: Recipe) -> str:
    data = _with_short_paths(yaml.safe_load(to_yaml(recipe)))
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    return f"## Recipe\n\n<details>\n<summary>The resolved recipe (lmrl train FILE)</summary>\n\n```yaml\n{text}```\n\n</details>"


def _with_short_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_short_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_short_paths(one) for one in value]
    return _shown(value) if isinstance(value, str) else value


def _versions(run: Path) -> str:
    path = run / VERSIONS_FILE
    if not path.is_file():
        return ""
    made = json.loads(path.read_text())
    packages = {name: version for name, version in made["packages"].items() if version}
    listed = ", ".join(f"{name} {version}" for name, version in ({"python": made["python"]} | packages).items())
    commit = f", commit `{made['git_commit']}` of lmrl" if made.get("git_commit") else ""
    return f"## Versions\n\n{listed}{commit}."
