"""Adapters in one kernel compute what peft's own layers compute, and keep less."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lmrl.policy.lora_linear import take_lora


def adapted(dtype: torch.dtype, **options) -> tuple[nn.Module, nn.Module]:
    """A small model with an adapter that is no longer at its start, as peft runs it and as lmrl does."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=64)).to(dtype)
    lora = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options))
    plain = get_peft_model(model, lora)
    if dtype == torch.float64:
        plain = plain.double()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    own = copy.deepcopy(plain)
    take_lora(own)
    return plain.eval(), own.eval()


def passed(model: nn.Module, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of the adapter."""
    logits = model(input_ids=tokens_BT).logits
    logits.float().square().sum().backward()
    return logits.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


TOKENS = torch.arange(2, 26).view(2, 12)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"}, {"r": 30}],
    ids=["plain", "rslora", "dora", "lora_bias", "bias", "rank above the tokens"],
)
def test_outputs_and_gradients_are_those_of_peft(options):
    plain, own = adapted(torch.float64, **options)
    (expected, gradients), (found, own_gradients) = passed(plain, TOKENS), passed(own, TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert own_gradients.keys() == gradients.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(own_gradients[name], gradient, rtol=1e-10, atol=1e-10)


def test_dropout_falls_on_the_adapter_alone():
    plain, own = adapted(torch.float64, lora_dropout=0.5)
    found = []
    for model in (plain.train(), own.train()):
        torch.manual_seed(1)
        found.append(passed(model, TOKENS)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_adapters_are_switched_merged_and_mixed():
    plain, own = adapted(torch.float64)
    with plain.disable_adapter(), own.disable_adapter():
        base = plain(input_ids=TOKENS).logits
        assert torch.equal(own(input_ids=TOKENS).logits, base)
    adapted_logits = plain(input_ids=TOKENS).logits
    assert not torch.allclose(adapted_logits, base)
    mixed = own(input_ids=TOKENS, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed, torch.stack([adapted_logits[0], base[1]]))
    own.merge_adapter()
    torch.testing.assert_close(own(input_ids=TOKENS).logits, adapted_logits)


def kept(model: nn.Module) -> int:
    """Bytes that a pass keeps for its backward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=TOKENS)  # held, so that no storage's address is used twice
    assert output is not None
    return sum(size for place, size in found.items() if place not in weights)


def test_beside_a_bfloat16_base_less_is_kept():
    plain, own = adapted(torch.bfloat16)
    expected, found = passed(plain, TOKENS)[0], passed(own, TOKENS)[0]
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    assert kept(own) < 0.75 * kept(plain)
