"""What SECURITY.md says runs no code."""

import json

import pytest

from lmrl.errors import LmrlError, ModelError, RunError
from lmrl.policy.load import open_policy
from lmrl.recipe.files import load_recipe
from lmrl.rewards.serve import RewardServer
from lmrl.trajectories.render import Renderer
from tests.conftest import TINY_LLAMA, save_tiny_model
from tests.launcher import launch

RECIPE = {
    "model": {"config": dict(TINY_LLAMA)},
    "task": {"prompts": {"path": "prompts.jsonl"}, "rewards": [{"function": "evil.py:f"}]},
    "rollouts": {"prompts": 2, "samples": 2, "max_new_tokens": 2},
    "objective": {"name": "grpo"},
}
EVIL = "from pathlib import Path\nPath(__file__).with_name('ran').write_text('')\ndef f(prompts, completions): return [1.0]\n"


def test_show_imports_nothing_that_a_recipe_names(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "evil.py").write_text(EVIL)
    (tmp_path / "mine.yaml").write_text(json.dumps(RECIPE))
    assert launch("show", str(tmp_path / "mine.yaml")).returncode == 0
    assert not (tmp_path / "ran").exists()
    launch("train", str(tmp_path / "mine.yaml"), "--dry-run")
    assert (tmp_path / "ran").exists()  # which training does, of course


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{% set x = messages.append(1) %}",
    ],
)
def test_chat_templates_are_sandboxed(tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    save_tiny_model(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    tokenizer = open_policy(str(tmp_path / "model")).tokenizer
    with pytest.raises(LmrlError, match="is unsafe|undefined"):
        Renderer(tokenizer, chat=True).first([{"role": "user", "content": "a"}])
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_refused(tmp_path):
    import torch

    save_tiny_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_policy(str(tmp_path / "model"))


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['touch ran']", "!!python/name:os.system"])
def test_yaml_holds_plain_values_alone(tmp_path, monkeypatch, tag):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(f"description: {tag}\n")
    with pytest.raises(LmrlError, match="not valid YAML: could not determine a constructor"):
        load_recipe(tmp_path / "mine.yaml")
    assert not (tmp_path / "ran").exists()


def test_a_server_that_others_reach_needs_a_token():
    with pytest.raises(RunError, match="others could reach this server; give it a token"):
        RewardServer(None, host="0.0.0.0", port=0)
