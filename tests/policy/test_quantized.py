"""A base in 4 bits under adapters: what is sampled, exported and resumed from is what was trained."""

import importlib.util
import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lmrl.errors import LmrlError, ModelError, RecipeError
from lmrl.evaluation.export import export
from lmrl.policy import quantized
from lmrl.policy.load import load_policy, load_weights, open_policy
from lmrl.policy.merged import merged_weights
from lmrl.policy.passes import ForwardRequest
from lmrl.policy.reference_cache import model_key
from lmrl.recipe import Lora, Model, estimates
from lmrl.recipe.files import load_recipe
from lmrl.training import resume_run, train
from lmrl.training.parallel.launch import check_launch
from tests.conftest import TINY_LLAMA
from tests.policy.test_lora import batch, scores
from tests.policy.test_lora import train as move
from tests.runs import metrics, stopped_before

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    letters = "\n" + "".join(chr(code) for code in range(32, 127))
    load_policy(Model(config=TINY_LLAMA | SIZES), texts=lambda: [letters]).save(folder)
    return folder


def nf4(folder, **lora):
    return Model(path=str(folder), quantization="nf4", lora=Lora(r=4, **lora))


@pytest.mark.parametrize("options", [{}, {"use_dora": True, "modules_to_save": ["lm_head"]}])
def test_reference_saving_and_merging(tmp_path, folder, options):
    torch.manual_seed(1)
    full = open_policy(str(folder))
    policy = load_policy(nf4(folder, **options), reference=True)
    held = [one for one in policy.causal_lm.parameters() if quantized.is_quantized(one)]
    assert len(held) == 14 and policy.size == full.size  # seven matrices in each of two layers
    rounded = scores(policy)
    assert 1e-4 < (rounded - scores(full)).abs().max() < 0.1
    move(policy)
    moved = scores(policy)
    assert torch.equal(scores(policy, reference=True), rounded) and (moved - rounded).abs().max() > 1e-2

    policy.save(tmp_path / "adapter")
    opened = open_policy(str(tmp_path / "adapter"))
    assert opened.quantization == "nf4" and torch.equal(scores(opened), moved)
    later = load_policy(nf4(folder, **options), start=tmp_path / "adapter", reference=True)
    move(later)
    assert torch.equal(scores(later, reference=True), moved) and (scores(later) - moved).abs().max() > 1e-2
    load_weights(later, tmp_path / "adapter")
    assert torch.equal(scores(later), moved)
    assert model_key(later) != model_key(load_policy(nf4(folder)))

    # In float32 a merged model computes the same; its own stage may train all of its weights.
    merged = load_policy(Model(path=str(folder)), start=tmp_path / "adapter")
    assert not merged.is_lora and merged.trainable()
    torch.testing.assert_close(scores(merged), moved, rtol=1e-5, atol=1e-5)
    assert {name for name, _ in merged_weights(policy)} == {name for name, _ in full.causal_lm.named_parameters()}

    with pytest.raises(
        ModelError, match="adapter of a base in nf4, but the recipe asks for None: set model.quantization=nf4"
    ):
        load_policy(Model(path=str(folder), lora=Lora(r=4, **options)), start=tmp_path / "adapter")


def test_an_export_is_an_ordinary_model(tmp_path, folder):
    torch.manual_seed(1)
    policy = load_policy(nf4(folder))
    move(policy)
    policy.save(tmp_path / "adapter")
    export(tmp_path / "adapter", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    found = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    for name, tensor in merged_weights(policy):
        assert torch.equal(found.pop(name), tensor.to(torch.bfloat16)), name
    assert not found
    torch.testing.assert_close(scores(open_policy(str(tmp_path / "out"))), scores(policy), rtol=0, atol=2e-2)
    export(tmp_path / "adapter", tmp_path / "alone", adapter_only=True)
    assert torch.equal(scores(open_policy(str(tmp_path / "alone"))), scores(policy))


def test_gradients_are_those_of_the_rounded_weights(folder):
    """After a pass without gradient, too."""
    torch.manual_seed(1)
    policy = load_policy(nf4(folder))
    move(policy)
    plain = load_policy(Model(path=str(folder), lora=Lora(r=4)))
    own = {name: one for name, one in policy.named_parameters()}
    with torch.no_grad():
        for name, one in plain.named_parameters():
            one.copy_(quantized.dequantized(own[name]))
    scores(policy)
    for each in (policy, plain):
        each.begin_update(dropout=False)
        outputs = each(batch().microbatches(1000, 0)[0], ForwardRequest(logprobs=True))
        outputs.logprobs.sum().backward()
    expected = plain.trainable()
    for name, one in policy.trainable().items():
        torch.testing.assert_close(one.grad, expected[name].grad, rtol=1e-4, atol=1e-5)


def test_weights_keep_their_layout(folder):
    """On CPUs with bfloat16 products bitsandbytes would pack them, and then compute no gradient."""
    modules = load_policy(nf4(folder)).modules()
    assert {
        module.support_avx512bf16_for_cpu for module in modules if hasattr(module, "support_avx512bf16_for_cpu")
    } == {False}


def test_engines_are_given_an_ordinary_configuration(folder):
    policy = load_policy(nf4(folder))
    assert hasattr(policy.causal_lm.config, "quantization_config")
    config = quantized.plain_config(policy.causal_lm)
    assert "quantization_config" not in config.to_dict() and config.hidden_size == 64
    assert hasattr(policy.causal_lm.config, "quantization_config")


# ------------------------------------------------------------------------------------------------------------------ runs
def recipe_of(tmp_path, folder, **changes):
    rows = [{"prompt": f"say {i}", "completion": "aaaa"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(
        "def vowels(completions, **_): return [sum(c < 'P' for c in t) for t in completions]"
    )
    data = {
        "model": {"path": str(folder), "lora": {"r": 4, "alpha": 8}, "quantization": "nf4"},
        "task": {"prompts": {"path": "rows.jsonl"}, "rewards": [{"function": "mine.py:vowels"}]},
        "source": {"name": "dataset", "path": "rows.jsonl", "batch_size": 8},
        "objective": {"name": "likelihood"},
        "optimizer": {"lr": 1e-2, "schedule": "constant"},
        "evaluation": {"suite": None},
        "training": {"steps": 4, "checkpoint_every": 1, "threads": 1},
    } | changes
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    return load_recipe(tmp_path / "mine.yaml")


def steps(run, name):
    return [line[name] for line in metrics(run) if line["kind"] == "train"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_imitation_learns_and_is_exported(tmp_path, folder, dtype):
    recipe = recipe_of(tmp_path, folder)
    recipe.model.dtype = dtype
    recipe.training.gradient_checkpointing = dtype == "bfloat16"
    result = train(recipe, output=tmp_path / "run")
    losses = steps(tmp_path / "run", "loss")
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.1
    export(tmp_path / "run", tmp_path / "out")
    trained = open_policy(str(result.checkpoint))
    assert trained.quantization == "nf4"
    torch.testing.assert_close(scores(open_policy(str(tmp_path / "out"))), scores(trained), rtol=0, atol=2e-2)


def test_ppo_learns_and_resumes_to_the_bit(tmp_path, folder):

    recipe = recipe_of(
        tmp_path,
        folder,
        source={"name": "rollouts"},
        rollouts={"prompts": 8, "samples": 4, "max_new_tokens": 6},
        objective={"name": "ppo", "kl_coef": 0.01, "epochs": 2, "target_kl": None},
    )
    train(recipe, output=tmp_path / "whole")
    with stopped_before(3):
        train(recipe, output=tmp_path / "torn")
    resume_run(tmp_path / "torn")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "torn")
    for file in (tmp_path / "whole").glob("stages/main/final/**/*.safetensors"):
        other = tmp_path / "torn" / file.relative_to(tmp_path / "whole")
        assert file.read_bytes() == other.read_bytes(), file
    rewards, kls = steps(tmp_path / "whole", "reward"), steps(tmp_path / "whole", "kl")
    assert rewards[-1] > rewards[0] and kls[0] == pytest.approx(0, abs=1e-5) and abs(kls[-1]) > 1e-3


# ------------------------------------------------------------------------------------------------------------- estimates
def test_memory_of_the_weights(folder):
    """As many bytes as bitsandbytes holds, but for the one matrix that is turned back at a time."""
    recipe = load_recipe("random_walks/bc", [f"model={{path: {folder}, quantization: nf4, lora: {{r: 4}}}}"])
    shape = estimates.model_shape(recipe.model)
    policy = load_policy(recipe.model)
    held = 0
    for name, tensor in policy.causal_lm.state_dict().items():
        small = ".lora_" in name or ".quant_map" in name or ".nested_quant_map" in name or ".quant_state" in name
        held += 0 if small else tensor.numel() * tensor.element_size()
    matrix = shape["hidden"] * shape["intermediate"] * 4
    assert estimates._frozen_bytes(recipe.model, shape) - matrix == pytest.approx(held, rel=0.03)


# --------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "`quantization: nf4` is for frozen weights, so it needs `lora`"),
        ({"path": "a.gguf", "lora": {"r": 4}}, "a GGUF file, which is quantized already: give a folder"),
    ],
)
def test_models_that_cannot_be_quantized(changes, message):
    with pytest.raises(ValueError, match=message):
        Model(**({"path": "some/model", "quantization": "nf4"} | changes))


def test_reward_models_are_not_quantized(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    (tmp_path / "mine.yaml").write_text(
        "model: {path: some/model, lora: {r: 4}, quantization: nf4}\nsource: {name: dataset, path: pairs.jsonl}\nobjective: {name: reward_model}\n"
    )
    with pytest.raises(
        LmrlError, match="`model.quantization=nf4` is for policies, and 'reward_model' trains a reward model"
    ):
        load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize("feature", ["FSDP", "DEEPSPEED"])
def test_sharded_launches_are_refused(monkeypatch, feature):
    recipe = load_recipe("random_walks/bc", ["model={path: some/model, quantization: nf4, lora: {r: 4}}"])
    monkeypatch.setenv(f"ACCELERATE_USE_{feature}", "true")

    class Accelerator:
        class distributed_type:
            value = feature

    with pytest.raises(RecipeError, match=f"model.quantization=nf4: .* cannot be sharded by {feature}"):
        check_launch(Accelerator(), recipe)


def test_without_bitsandbytes(folder, monkeypatch):
    monkeypatch.setattr("lmrl.extras.find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match="quantization=nf4 needs bitsandbytes, which is not installed: .*'quantization'"
    ):
        load_policy(nf4(folder))
