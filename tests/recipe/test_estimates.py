"""Estimates of a recipe's parameters and memory, compared with what is built."""

import json

import pytest
import torch

from lmrl.objectives import load_objective
from lmrl.policy import cache, heads
from lmrl.policy.load import load_policy
from lmrl.recipe import (
    ILQLObjective,
    LikelihoodObjective,
    Lora,
    MCObjective,
    Model,
    PPOObjective,
    QSFTObjective,
    estimates,
)
from lmrl.recipe.estimates import arithmetic_line, evaluation_line, memory, memory_lines
from lmrl.recipe.files import load_recipe
from lmrl.recipe.model_shape import model_shape
from lmrl.recipe.objectives.base import BINS
from tests.conftest import TINY_LLAMA

OBJECTIVES = [
    *(kind(name=name, q_head=q) for kind, name in ((ILQLObjective, "ilql"), (MCObjective, "mc")) for q in ("mlp", "linear", "tied")),
    ILQLObjective(name="ilql", value_loss="hl_gauss"),
    MCObjective(name="mc", value_loss="hl_gauss"),
    PPOObjective(name="ppo"),
    PPOObjective(name="ppo", value_loss="hl_gauss", value_range=(-1.0, 2.0)),
]  # fmt: skip


@pytest.mark.parametrize(
    "options", OBJECTIVES, ids=lambda one: f"{one.name}-{getattr(one, 'q_head', '')}-{one.value_loss}"
)
def test_parameters_of_heads(options):
    """As many as the policy holds; and heads of every kind can be calibrated."""
    objective = load_objective(options)
    policy = load_policy(Model(config=dict(TINY_LLAMA)), texts=lambda: ["abcdefgh"], heads=objective.heads)
    policy.values.calibrate(start=-1.0, mean=0.5, scale=1.0, low=-2.0, high=2.0)
    counts = {True: 0, False: 0}
    for parameter in policy.values.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    assert options.head_parameters(16, policy.values.tokens) == (counts[True], counts[False])
    if policy.values.v is not None:
        assert policy.values.value(torch.randn(1, 16))[0].item() == pytest.approx(0.5, abs=0.02)


def test_no_heads():
    for options in (LikelihoodObjective(name="likelihood"), QSFTObjective(name="q_sft")):
        assert options.head_parameters(16, 30) == (0, 0)
    assert BINS == heads.BINS


CONFIG = (
    "{model_type: llama, hidden_size: 256, intermediate_size: 512, num_hidden_layers: 2, num_attention_heads: 4, "
    "vocab_size: 50000}"
)


def items(*changes):
    """The line about the model, and the megabytes of each item of the one about memory."""
    recipe = load_recipe("random_walks/bc", [f"model.config={CONFIG}", *changes])
    model, memory = memory_lines(recipe)
    named = {}
    for part in memory.partition("(")[2].rstrip(")").split(", "):
        name, _, size = part.rpartition(" ")
        named[name] = float(size.replace(",", ""))
    assert float(memory.split()[2].replace(",", "")) == pytest.approx(sum(named.values()), abs=5)  # rounding
    return model, named


def test_memory_of_values():
    total = 2 * (4 * 256 * 256 + 3 * 256 * 512) + 2 * 50_000 * 256
    model, plain = items()
    assert model == f"model: {total / 1e6:.2f}M parameters, {total / 1e6:.2f}M trainable"
    assert "heads and their targets" not in plain and "second model and its target" not in plain
    model, named = items("objective={name: ilql, q_head: linear}")
    heads = 2 * 256 * 50_000
    assert named["heads and their targets"] == pytest.approx(heads * 20 / 2**20, abs=6)
    assert f"{total / 1e6:.2f}M parameters" in model and float(model.split()[-2][:-1]) == pytest.approx(
        (total + heads) / 1e6, abs=0.3
    )
    _, named = items("objective={name: ilql, q_head: tied, trunk: separate}")
    assert named["second model and its target"] == pytest.approx(total * 20 / 2**20, abs=1)
    model, named = items("objective={name: q_sft}")
    assert named["second model and its target"] == pytest.approx(total * 20 / 2**20, abs=1)
    assert "gradients and Adam" not in named and f"{total / 1e6:.2f}M trainable" in model


@pytest.mark.parametrize(
    ("objective", "held"),
    [
        ("{name: dpo}", True),
        ("{name: dpo, loss: simpo}", False),
        ("{name: dpo, cache_reference: true}", False),
        ("{name: likelihood}", False),
    ],
)
def test_memory_of_a_reference(objective, held):
    total = 2 * (4 * 256 * 256 + 3 * 256 * 512) + 2 * 50_000 * 256
    _, named = items(f"objective={objective}")
    assert named.get("reference") == (pytest.approx(total * 4 / 2**20, abs=1) if held else None)
    options = load_recipe("random_walks/bc", [f"objective={objective}"]).objective
    assert load_objective(options).uses_reference == options.holds_reference


def test_memory_of_a_reward_model(tmp_path):
    """Beside torch there is trl, and no projection onto the vocabulary."""
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "config.json").write_text('{"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 50000}')
    given = [f"model.path={tmp_path}", f"data.path={tmp_path / 'pairs.jsonl'}", "model.lora=null"]
    found = memory(load_recipe("rm", given))
    python = estimates.PROCESS_MB + estimates.TRL_MB + (estimates.CUDA_BUILD_MB if torch.version.cuda else 0)
    assert found["python"] == python and "gradients on their way" not in found


def test_memory_of_activations(tmp_path):
    """Three layers of width 64 and 256, with 4 of 8 heads of keys: numbers per token by hand."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"num_attention_heads": 8, "num_key_value_heads": 4}))

    def activations(model, *changes):
        given = [f"model={{path: {tmp_path}, {model}}}", "source.batch_size=64", "training.microbatch_tokens=128"]
        return memory(load_recipe("random_walks/bc", [*given, *changes]))["activations"] * 2**20

    assert activations("lora: null") == 128 * 4 * 3 * (8 * 64 + 2 * 32 + 4 * 256)
    assert activations("lora: {r: 5}") == 128 * 4 * 3 * (6 * 64 + 2 * 32 + 4 * 256 + 7 * 5)
    checkpointed = 128 * 4 * (3 * 64 + 8 * 64 + 2 * 32 + 4 * 256)  # the layers' inputs, and one layer
    assert activations("lora: null", "training.gradient_checkpointing=true") == checkpointed


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_activations_are_what_a_layer_keeps(tmp_path, lora):
    """Counted by autograd, but for a few numbers per token and head: the difference that a layer more makes."""
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 40,
    }

    def kept(layers):
        folder = tmp_path / f"{layers}"
        own = dict(TINY_LLAMA) | config | {"num_hidden_layers": layers}
        load_policy(Model(config=own), texts=lambda: ["abcdefgh"]).save(folder)
        policy, sizes = load_policy(Model(path=str(folder), lora=lora)), {}
        weights = {one.untyped_storage().data_ptr() for one in policy.parameters()}

        def keep(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = policy.causal_lm(input_ids=torch.arange(24)[None], use_cache=False).logits
        assert found.requires_grad
        return sum(size for place, size in sizes.items() if place not in weights)

    two, one = kept(2), kept(1)
    shape = model_shape(Model(path=str(tmp_path / "1")))
    expected = 24 * 4 * estimates._kept_by_a_layer(lora and Lora(**lora), shape)
    assert two - one == pytest.approx(expected, rel=0.05)


def test_memory_of_two_trunks():
    """Values on a separate trunk, with a policy that imitates: activations of both wait for one backward pass."""
    _, plain = items("objective={name: ilql, trunk: shared}")
    _, named = items("objective={name: ilql, trunk: separate}")
    _, second = items("objective={name: q_sft}")  # trains the second model alone
    assert named["activations"] == pytest.approx(2 * plain["activations"], abs=1)
    assert second["activations"] == plain["activations"]


def test_memory_of_gradients_on_their_way():
    """Of a second microbatch, beside those of the first: those of matrices over the vocabulary."""
    matrix = 50_000 * 256 * 4 / 2**20
    name = "gradients on their way"
    assert items()[1][name] == pytest.approx(matrix, abs=1)
    _, heads = items("objective={name: ilql, q_head: linear}")
    assert heads[name] == pytest.approx(3 * matrix, abs=2)  # its own, and those of a Q head's two uses
    assert items("objective={name: q_sft}")[1][name] == pytest.approx(matrix, abs=1)  # of the second model


def test_memory_of_the_optimizer():
    learned = 2 * (4 * 256 * 256 + 3 * 256 * 512) + 2 * 50_000 * 256
    _, plain = items()
    _, eight = items("optimizer.name=adamw_8bit")
    name = "gradients and Adam"
    assert plain[name] == pytest.approx(12 * learned / 2**20, abs=1)
    # one of the two matrices over the vocabulary is an embedding, whose moments stay as they are
    assert eight[name] == pytest.approx((6 * learned + 6 * 50_000 * 256) / 2**20, abs=1)


def test_memory_of_sampling():
    """Keys and values of the hf engine, where they take more than an update."""
    play = ["source={name: rollouts, best: 0.5}", "training.microbatch_tokens=64", "rollouts.prompts=32"]
    _, named = items(*play, "rollouts.max_new_tokens=1000")
    assert "activations" not in named
    assert named["keys and values"] == pytest.approx(32 * (1000 + 16 + 64) * 2 * 2 * 256 * 4 / 2**20, abs=1)
    _, fewer = items(*play, "rollouts.max_new_tokens=1000", "rollouts.cache_tokens=20000")
    assert fewer["keys and values"] == pytest.approx(20000 * 2 * 2 * 256 * 4 / 2**20, abs=1)
    _, few = items(*play, "rollouts.max_new_tokens=1000", "rollouts.slots=16")
    assert few["keys and values"] == pytest.approx(named["keys and values"] / 2, abs=1)
    _, other = items(*play, "rollouts.max_new_tokens=1000", "rollouts.engine=vllm-server")
    assert "keys and values" not in other and "activations" in other


def test_an_update_counts_with_what_its_kernels_add(monkeypatch):
    """Packed weights, which need no more in bfloat16, may be larger than an update's activations, but not than four times these."""
    recipe = load_recipe("random_walks/bc", ["source={name: rollouts, best: 0.5}", "training.precision=bfloat16"])
    update = sum(estimates._update_bytes(recipe, estimates.model_shape(recipe.model), 2).values())
    for packed, expected in ((2 * update, "activations"), (5 * update, estimates.PACKED)):
        monkeypatch.setattr(estimates, "_packed_bytes", lambda shape, width, packed=packed: packed)
        found = memory(recipe)
        assert expected in found and not {"activations", estimates.PACKED} - {expected} & found.keys()


def test_memory_of_an_accelerator():
    default = memory(load_recipe("random_walks/bc"), accelerator=True)
    recipe = load_recipe("random_walks/bc", ["training.precision=float32"])
    host, device = memory(recipe), memory(recipe, accelerator=True)
    assert default["activations"] == device["activations"] / 2  # bfloat16 is an accelerator's default
    assert host.keys() - device.keys() == {"python", "episodes"} and all(device[name] == host[name] for name in device)
    recipe = load_recipe("random_walks/bc", ["training.precision=bfloat16"])
    host, device = memory(recipe), memory(recipe, accelerator=True)
    passes = device["activations"] + device["vocabulary slices"]
    assert device["gradients on their way"] == host["gradients on their way"] > 0
    assert host["a CPU's bfloat16 kernels"] == pytest.approx((estimates.CPU_BFLOAT16 - 1) * passes)
    assert "a CPU's bfloat16 kernels" not in device
    assert estimates.SPARE == cache.SPARE


def test_arithmetic_of_a_mixture():
    source = "source={name: mixture, player: random, batch_size: 24, warmup_steps: 5}"
    recipe = load_recipe(
        "random_walks/bc",
        [source, "objective={name: ilql}", "rollouts.prompts=3", "rollouts.samples=2", "training.steps=20"],
    )
    assert recipe.arithmetic()["episodes"] == 24 and recipe.arithmetic()["updates"] == 15
    line = arithmetic_line(recipe)
    assert line.startswith(
        "a step: plays 3 prompts x 2 samples = 6 episodes into the replay buffer, learns from 24 -> "
    )
    assert line.endswith("20 steps = 15 updates")


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (
            "random_walks/ppo",
            [],
            "evaluation on suite random_walks: at the start, in between if the budget allows and at the end",
        ),
        ("random_walks/ppo", ["evaluation.every=0"], "evaluation on suite random_walks: at the start and the end"),
        ("random_walks/ppo", ["evaluation.suite=null"], "evaluation: none"),
        (
            "random_walks/ppo",
            ["evaluation.suite=task"],
            "evaluation on the stage's own task: 256 episodes each, at the start, every 20 steps and at the end",
        ),
        (
            "random_walks/bc",
            ["evaluation.suite=task"],
            "evaluation on the stage's own task: 64 episodes each, at the end, and at the start if it continues from another stage",
        ),
        (
            "random_walks/bc",
            ["evaluation.suite=task", "training.steps=2"],
            "evaluation: none, since the stage is too short to spare any (evaluation.every=0 asks for it)",
        ),
    ],
)
def test_evaluation_line(name, changes, expected):
    assert evaluation_line(load_recipe(name, changes)) == expected


def test_a_hub_model_is_looked_up_in_the_cache_by_revision(tmp_path, monkeypatch):
    """As huggingface_hub lays it out: refs/BRANCH holds the commit that names a snapshot."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--someone--tiny"
    for commit, width in (("aaa", 32), ("bbb", 64)):
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text(f'{{"hidden_size": {width}}}')
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("aaa")
    (folder / "refs" / "v2").write_text("bbb\n")
    found = {revision: model_shape(Model(path="someone/tiny", revision=revision)) for revision in (None, "v2", "bbb")}
    assert {name: shape["hidden"] for name, shape in found.items()} == {None: 32, "v2": 64, "bbb": 64}
    assert model_shape(Model(path="someone/tiny", revision="v3")) is None
    assert model_shape(Model(path="someone/other")) is None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
def test_parameters_of_adapters(tmp_path, tied, options):
    """As many are said to be trainable as are."""
    model = Model(config=dict(TINY_LLAMA) | {"tie_word_embeddings": tied, "vocab_size": 40})
    load_policy(model, texts=lambda: ["abcdefgh"]).save(tmp_path)
    lora = {"r": 4} | options
    policy = load_policy(Model(path=str(tmp_path), lora=lora))
    recipe = load_recipe("random_walks/bc", [f"model={{path: {tmp_path}, lora: {lora}}}"])
    learned, *_ = estimates._trained(recipe, model_shape(recipe.model))
    assert learned == sum(one.numel() for one in policy.trainable().values())
