"""peft's options of adapters: what is saved, merged, resumed from and referred to is what was trained."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lmrl.errors import ModelError
from lmrl.policy.export import save_plain
from lmrl.policy.load import load_policy, load_weights, open_policy
from lmrl.policy.merged import merged_weights
from lmrl.recipe import Lora, Model
from lmrl.trajectories.batch import to_batch
from lmrl.trajectories.trajectory import Segment, Trajectory
from tests.conftest import TINY_LLAMA

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?"
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "llama": TINY_LLAMA | {"tie_word_embeddings": False},
    "tied": TINY_LLAMA | {"tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "mixtral": TINY_LLAMA | EXPERTS,
}
OPTIONS = [
    ("llama", {}),
    ("llama", {"use_rslora": True}),
    ("llama", {"use_dora": True}),
    ("gpt2", {"use_dora": True}),
    ("llama", {"modules_to_save": ["lm_head"]}),
    ("llama", {"modules_to_save": ["embed_tokens", "lm_head"], "use_dora": True}),
    ("tied", {"modules_to_save": ["embed_tokens"]}),
    ("tied", {"modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    ("llama", {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]}),
    ("mixtral", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "use_rslora": True}),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name)
        load_policy(Model(config=dict(config)), texts=lambda: [LETTERS]).save(found[name])
    return found


def batch():
    episodes = []
    for prompt, action in [([5, 6, 7], [8, 9]), ([5], [10, 11, 12, 13]), ([9, 9], [4])]:
        segment = Segment()
        segment.observe(prompt)
        segment.act(action, None, 0)
        episodes.append(Trajectory([segment], "", ""))
    return to_batch(episodes)


def scores(policy, **options):
    return torch.cat(policy.score(batch(), **options)["logprobs"])


@torch.no_grad()
def train(policy):
    for parameter in policy.trainable().values():
        parameter += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_adapters_of_every_kind(tmp_path, folders, kind, options):
    torch.manual_seed(1)
    model = Model(path=str(folders[kind]), lora=Lora(r=4, **options))
    policy = load_policy(model, reference=True)
    names = set(policy.trainable())
    base = scores(open_policy(str(folders[kind])))
    torch.testing.assert_close(scores(policy), base)
    train(policy)
    moved = scores(policy)
    assert (moved - base).abs().max() > 1e-2
    # Switched off, an adapter leaves the base with its own embeddings and head.
    torch.testing.assert_close(scores(policy, reference=True), base)
    assert set(policy.trainable()) == names and policy.size == open_policy(str(folders[kind])).size

    policy.save(tmp_path / "adapter")
    opened = open_policy(str(tmp_path / "adapter"))
    assert torch.equal(scores(opened), moved)

    later = load_policy(model, start=tmp_path / "adapter", reference=True)
    train(later)
    assert torch.equal(scores(later, reference=True), moved)
    assert (scores(later) - moved).abs().max() > 1e-2 and set(later.trainable()) == names
    load_weights(later, tmp_path / "adapter")
    assert torch.equal(scores(later), moved)

    sent = {name: tensor.clone() for name, tensor in merged_weights(policy)}
    save_plain(opened, tmp_path / "plain")
    torch.testing.assert_close(scores(open_policy(str(tmp_path / "plain"))), moved, rtol=1e-5, atol=1e-5)
    written = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "plain").named_parameters())
    assert set(sent) == set(written)
    for name, tensor in written.items():
        torch.testing.assert_close(sent[name], tensor.detach())


def test_rslora_scales_by_the_root_of_the_rank(folders):
    for options, scale in (({}, 2.0), ({"use_rslora": True}, 4.0)):
        policy = load_policy(Model(path=str(folders["llama"]), lora=Lora(r=4, alpha=8, **options)))
        scales = {module.scaling["default"] for module in policy.modules() if hasattr(module, "get_delta_weight")}
        assert scales == {scale}


def test_a_layer_beside_the_adapter_is_trained_whole(folders):
    policy = load_policy(Model(path=str(folders["tied"]), lora=Lora(r=4, modules_to_save=["embed_tokens"])))
    whole = [one for name, one in policy.trainable().items() if ".lora_" not in name]
    assert [tuple(one.shape) for one in whole] == [(34, 16)]  # embeddings and head: one matrix
    policy(batch().microbatches(1000, 0)[0]).logprobs.sum().backward()
    assert (whole[0].grad.abs().sum(1) > 0).all()  # every token, by the head


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapters_are_added_without_warnings(folders, kind, recwarn):
    load_policy(Model(path=str(folders[kind]), lora=Lora()))
    assert not [str(one.message) for one in recwarn]


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", {"modules_to_save": ["lm_hed"]}, "lora.modules_to_save: the model has no 'lm_hed'.*mean 'lm_head'"),
        ("llama", {"target_parameters": ["experts.up"]}, "lora.target_parameters: the model has no 'experts.up'"),
        ("tied", {"target_modules": ["q_proj", "lm_head"]}, "one matrix.*name embed_tokens under"),
    ],
)
def test_layers_that_cannot_be_adapted(folders, kind, options, message):
    with pytest.raises(ModelError, match=message):
        load_policy(Model(path=str(folders[kind]), lora=Lora(**options)))


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_parameters": ["q_proj.weight"]},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ".*q_proj"},
    ],
)
def test_a_later_stage_adapts_as_the_first(tmp_path, folders, options):
    path = str(folders["llama"])
    load_policy(Model(path=path, lora=Lora(r=4))).save(tmp_path)
    name = next(iter(options))
    with pytest.raises(ModelError, match=f"model.lora.{name}: .* make them equal"):
        load_policy(Model(path=path, lora=Lora(r=4, **options)), start=tmp_path)


@pytest.mark.parametrize("same", [["v_proj", "self_attn.q_proj"], r".*\.[qv]_proj", "all-linear"])
def test_layers_may_be_named_in_other_ways(tmp_path, folders, same):
    path = str(folders["llama"])
    load_policy(Model(path=path, lora=Lora(r=4, target_modules=["q_proj", "v_proj"]))).save(tmp_path)
    later = load_policy(Model(path=path, lora=Lora(r=4, target_modules=same)), start=tmp_path)
    assert {name.split(".lora_")[0].split(".")[-1] for name in later.trainable()} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.5), (0.5, 0.0)])
def test_a_later_stage_has_its_own_dropout(tmp_path, folders, before, after):
    path = str(folders["llama"])
    load_policy(Model(path=path, lora=Lora(r=4, dropout=before))).save(tmp_path / "first")
    later = load_policy(Model(path=path, lora=Lora(r=4, dropout=after)), start=tmp_path / "first", reference=True)
    layer = later.causal_lm.model.layers[0].mlp.up_proj
    assert getattr(layer.lora_dropout["default"], "p", 0.0) == after
    later.save(tmp_path / "second")
    assert json.loads((tmp_path / "second/adapter_config.json").read_text())["lora_dropout"] == after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_parameters": ["a"], "use_dora": True}, "`target_parameters` cannot be combined with `use_dora`"),
        ({"target_parameters": ["a"], "dropout": 0.1}, "`target_parameters` cannot be combined with `dropout`"),
        ({"target_modules": []}, "`target_modules` names no layer"),
    ],
)
def test_options_that_exclude_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        Lora(**options)
