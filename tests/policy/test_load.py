"""Policies: from scratch, from folders, with adapters; what is saved reads back as it was."""

import shutil
import string

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmrl.errors import ModelError
from lmrl.policy.heads import HeadsSpec
from lmrl.policy.load import load_classifier, load_policy, load_weights, open_policy
from lmrl.policy.origins import spread_by_width
from lmrl.policy.passes import ForwardRequest
from lmrl.policy.policy import Policy
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.recipe import Lora, Model
from lmrl.trajectories.batch import to_batch
from lmrl.trajectories.trajectory import Segment, Trajectory
from tests.conftest import TINY_LLAMA


def episodes() -> list[Trajectory]:
    result = []
    for prompt, action in [([5, 6, 7], [8, 9]), ([5], [10, 11, 12, 13]), ([9, 9], [4])]:
        segment = Segment()
        segment.observe(prompt)
        segment.act(action, None, 0)
        result.append(Trajectory([segment], "", ""))
    return result


def plain_logprobs(lm, episode, temperature=1.0):
    tokens = torch.tensor([episode.segments[0].tokens])
    with torch.no_grad():
        logprobs = (lm(tokens).logits[0].float() / temperature).log_softmax(-1)
    return torch.stack([logprobs[at - 1, tokens[0, at]] for at in episode.segments[0].actions])


@pytest.mark.parametrize("microbatch_tokens", [1, 10, 1000])
def test_scores_equal_the_model_alone(tiny_policy, microbatch_tokens):
    tiny_policy.microbatch_tokens, tiny_policy.temperature = microbatch_tokens, 0.8
    fields = tiny_policy.score(to_batch(episodes()), ForwardRequest(values=True))
    for episode, logprobs in zip(episodes(), fields["logprobs"], strict=True):
        torch.testing.assert_close(logprobs, plain_logprobs(tiny_policy.causal_lm.eval(), episode, 0.8))
    assert [len(values) for values in fields["values"]] == [2, 4, 1]


def test_weights_are_float32_and_saved_folders_are_plain_transformers(tmp_path, tiny_folder):
    policy = load_policy(Model(path=str(tiny_folder)), heads=HeadsSpec())
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    torch.nn.init.normal_(policy.values.v.weight)
    policy.save(tmp_path / "saved")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer("hi!").input_ids == policy.tokenizer("hi!").input_ids
    torch.testing.assert_close(
        plain_logprobs(lm, episodes()[0]), plain_logprobs(policy.causal_lm.eval(), episodes()[0])
    )
    again = load_policy(Model(path=str(tiny_folder)), start=tmp_path / "saved", heads=HeadsSpec())
    assert torch.equal(again.values.v.weight, policy.values.v.weight)


def test_adapter_reference_and_saving(tmp_path, tiny_folder):
    """From a bare base the reference is the switched-off adapter; a later stage keeps a second one."""
    options = Model(path=str(tiny_folder), lora=Lora(r=2, alpha=4))
    policy = load_policy(options, reference=True)
    assert policy._reference == "adapter_off"
    assert set(policy.trainable()) == {name for name, _ in policy.named_parameters() if "lora_" in name}
    base = plain_logprobs(open_policy(str(tiny_folder)).causal_lm.eval(), episodes()[0])
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter += 0.3 * torch.randn_like(parameter)
    batch = to_batch(episodes())
    torch.testing.assert_close(policy.score(batch, reference=True)["logprobs"][0], base)
    moved = policy.score(batch)["logprobs"][0]
    assert (moved - base).abs().max() > 1e-3

    policy.save(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), tmp_path / "adapter")
    torch.testing.assert_close(plain_logprobs(plain.eval(), episodes()[0]), moved)
    torch.testing.assert_close(open_policy(str(tmp_path / "adapter")).score(batch)["logprobs"][0], moved)

    later = load_policy(options, start=tmp_path / "adapter", reference=True)
    assert later._reference == "adapter" and set(later.trainable()) == set(policy.trainable())
    with torch.no_grad():
        for parameter in later.trainable().values():
            parameter += 0.3 * torch.randn_like(parameter)
    torch.testing.assert_close(later.score(batch, reference=True)["logprobs"][0], moved)
    assert set(later.trainable()) == set(policy.trainable())  # switching back left the gradient where it was
    assert (later.score(batch)["logprobs"][0] - moved).abs().max() > 1e-3

    load_weights(later, tmp_path / "adapter")
    torch.testing.assert_close(later.score(batch)["logprobs"][0], moved)
    merged = load_policy(Model(path=str(tiny_folder)), start=tmp_path / "adapter")
    assert not merged.is_lora
    torch.testing.assert_close(merged.score(batch)["logprobs"][0], moved, rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="is an adapter with r=2 and alpha=4.*r=8"):
        load_policy(Model(path=str(tiny_folder), lora=Lora(r=8, alpha=4)), start=tmp_path / "adapter")


def test_full_reference_is_a_frozen_copy(tiny_folder):
    policy = load_policy(Model(path=str(tiny_folder)), reference=True)
    before = policy.score(to_batch(episodes()))["logprobs"]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(policy.score(to_batch(episodes()), reference=True)["logprobs"], before)
    assert not any("_reference" in name for name, _ in policy.named_parameters())


def test_bfloat16_base_has_float32_adapters(tiny_folder):
    policy = load_policy(Model(path=str(tiny_folder), dtype="bfloat16", lora=Lora(r=2)), heads=HeadsSpec())
    assert {parameter.dtype for parameter in policy.trainable().values()} == {torch.float32}
    assert policy.causal_lm.get_input_embeddings().weight.dtype == torch.bfloat16
    micro = to_batch(episodes()).microbatches(1000, 0)[0]
    outputs = policy(micro, ForwardRequest(values=True))
    assert outputs.logprobs.dtype == outputs.values.dtype == torch.float32
    (outputs.logprobs.sum() + outputs.values.sum()).backward()
    assert policy.values.v.weight.grad.dtype == torch.float32


CAPPED = {
    "model_type": "gemma2",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "final_logit_softcapping": 1.0,
}


def test_values_pull_at_a_trunk_below_capped_logits_no_more_than_allowed():
    """With a bound of 0 the trunk gets the policy's gradient alone; without one, both."""
    policy = load_policy(Model(config=dict(CAPPED)), texts=lambda: ["abcdefghijklmn"], heads=HeadsSpec()).double()
    torch.nn.init.normal_(policy.values.v.weight)
    micro = to_batch(episodes()).microbatches(1000, 0)[0]

    def gradient(limit, values=1.0):
        policy.zero_grad()
        outputs = policy(micro, ForwardRequest(values=True, value_pull=limit))
        (outputs.logprobs.sum() + values * outputs.values.sum()).backward()
        return policy.causal_lm.model.layers[0].mlp.up_proj.weight.grad

    alone = gradient(None, values=0.0)
    torch.testing.assert_close(gradient(0.0), alone, rtol=1e-12, atol=1e-12)
    assert float(policy.value_pull[0]) > 0
    torch.testing.assert_close(gradient(1e9), gradient(None), rtol=1e-12, atol=1e-12)
    assert (gradient(None) - alone).abs().max() > 1e-3


def test_a_second_model_of_probabilities_needs_plain_logits():
    with pytest.raises(ModelError, match="caps or scales its logits"):
        load_policy(
            Model(config=dict(CAPPED)), texts=lambda: ["abc"], heads=HeadsSpec(q="probability", trunk="separate")
        )


def test_a_model_with_capped_logits_goes_through_its_own_head():
    """Gemma 2 caps its logits, so projecting the hidden state by hand would be wrong."""
    torch.manual_seed(0)
    policy = load_policy(Model(config=dict(CAPPED)), texts=lambda: ["abcdefghijklmn"])
    with torch.no_grad():
        policy.causal_lm.get_output_embeddings().weight.mul_(100)
    policy = Policy(policy.model, policy.tokenizer)
    assert not policy.splits_head
    logprobs = policy.score(to_batch(episodes()))["logprobs"]
    for episode, found in zip(episodes(), logprobs, strict=True):
        torch.testing.assert_close(found, plain_logprobs(policy.causal_lm.eval(), episode))

    from lmrl.engines.base import Sampling
    from lmrl.engines.hf import HFEngine

    completion = HFEngine(policy).complete([[5, 6]], Sampling(max_new_tokens=5), [("a",)])[0]
    segment = Segment()
    segment.observe([5, 6])
    segment.act(completion.tokens, None, 0)
    expected = plain_logprobs(policy.causal_lm, Trajectory([segment], "", ""))
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-4, atol=1e-5)


def test_tokenizers_round_trip(tmp_path):
    char = build_tokenizer("char", ["hello, world\n"])
    assert char.decode(char("low world\n, e").input_ids) == "low world\n, e"
    assert char.convert_ids_to_tokens(char("z").input_ids) == ["<unk>"]
    word = build_tokenizer("word", ["move left", "move right"])
    assert len(word("move  right").input_ids) == 2 and word.decode(word("move  right").input_ids) == "move right"
    char.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("hello").input_ids == char("hello").input_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": {"model_type": "lama"}}, "cannot build 'lama'"),
        ({"config": {"hidden_size": 3}}, "needs a `model_type`"),
        ({"config": {"model_type": "llama", "hidden_sise": 3}}, "'llama' has no setting 'hidden_sise'"),
        ({"path": "nobody/nothing"}, "'nobody/nothing' is not a folder here, and the hub cannot be reached"),
    ],
)
def test_what_cannot_be_built_is_named(options, message):
    with pytest.raises(ModelError, match=message):
        load_policy(Model(**options), texts=lambda: ["abc"])


# -------------------------------------------------------------------------------------------------------- missing weights
@pytest.mark.parametrize(
    ("kind", "width", "stated", "deviation"),
    [("llama", 64, {}, 0.125), ("gpt2", 16, {}, 0.25), ("llama", 64, {"initializer_range": 0.02}, 0.02)],
)
def test_initial_weights_spread_by_width(kind, width, stated, deviation):
    """1 / sqrt(width), unless the recipe states it."""
    config = {"model_type": kind, "hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, **stated}
    torch.manual_seed(0)
    model = load_policy(Model(config=config), texts=lambda: [string.printable]).model
    assert model.config.initializer_range == deviation
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(deviation, rel=0.1)


def test_initial_weights_of_wide_models_spread_as_transformers_has_them():
    config = transformers.LlamaConfig(hidden_size=4096)
    spread_by_width(config)
    assert config.initializer_range == 0.02


def copied(folder, target, change):
    """A model folder whose weights have been changed."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("load", [lambda path: load_policy(Model(path=path)), open_policy, lambda path: load_classifier(Model(path=path))])  # fmt: skip
def test_a_model_without_all_its_weights_is_refused(tmp_path, tiny_folder, name, load):
    folder = copied(tiny_folder, tmp_path / "model", lambda tensors: tensors.pop(name))
    with pytest.raises(
        ModelError, match=f"(model.path|policy): '{folder}' has no weights for '{name}', which would be random"
    ):
        load(str(folder))


def test_a_missing_layer_is_refused(tmp_path, tiny_folder):
    def drop_layer(tensors):
        for name in [name for name in tensors if ".layers.1." in name]:
            del tensors[name]

    folder = copied(tiny_folder, tmp_path / "model", drop_layer)
    with pytest.raises(ModelError, match="has no weights for 'model.layers.1.input_layernorm.weight' and 8 more"):
        load_policy(Model(path=str(folder)))


def test_an_adapter_without_all_its_weights_is_refused(tmp_path, tiny_folder):
    policy = load_policy(Model(path=str(tiny_folder), lora=Lora(r=2)))
    policy.save(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(
        ModelError, match=r"the adapter '.*adapter' has no weights for '.*lora_A.*', which would be random"
    ):
        load_policy(Model(path=str(tmp_path / "adapter"), lora=Lora(r=2)))


def test_a_classifier_has_the_template_and_attention_of_its_recipe(tiny_folder):
    for origin in ({"path": str(tiny_folder)}, {"config": dict(TINY_LLAMA)}):
        options = Model(**origin, chat_template="{{ messages[0].content }}!", attention="eager")
        classifier = load_classifier(options, texts=lambda: ["ab"])
        assert classifier.tokenizer.chat_template == options.chat_template
        assert classifier.config._attn_implementation == "eager"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(tmp_path, tiny_folder, value):
    def spoil(tensors):
        tensors["model.norm.weight"][3] = value

    folder = copied(tiny_folder, tmp_path / "model", spoil)
    with pytest.raises(ModelError, match=f"(model.path|policy): '{folder}' has NaN or infinity in 'model.norm.weight'"):
        load_policy(Model(path=str(folder)))


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path, tiny_folder):
    folder = copied(tiny_folder, tmp_path / "model", lambda tensors: None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(
        ModelError, match=f"has {size + 1} tokens, but the model embeds {size}: .*resize_token_embeddings"
    ):
        load_policy(Model(path=str(folder)))


def test_a_run_folder_with_an_adapter_has_a_reference(tmp_path, tiny_folder):
    policy = load_policy(Model(path=str(tiny_folder), lora=Lora(r=2)))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    policy.save(tmp_path / "run/stages/main/final")
    again = load_policy(Model(path=str(tmp_path / "run"), lora=Lora(r=2)), reference=True)
    fields = [again.score(to_batch(episodes()), reference=which)["logprobs"] for which in (False, True)]
    for own, reference in zip(*fields, strict=True):
        torch.testing.assert_close(own, reference)
