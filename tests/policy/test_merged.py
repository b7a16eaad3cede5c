"""Weights as a plain checkpoint holds them."""

import torch

from lmrl.policy.load import load_policy
from lmrl.policy.merged import merged_weights
from lmrl.recipe import Lora, Model


def test_merged_weights_are_those_of_a_merged_model(tiny_folder):
    torch.manual_seed(0)
    policy = load_policy(Model(path=str(tiny_folder), lora=Lora(r=4)))
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    found = {name: tensor.clone() for name, tensor in merged_weights(policy)}
    merged = policy.model.merge_and_unload()
    expected = dict(merged.named_parameters())
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_without_an_adapter_they_are_the_parameters(tiny_folder):
    policy = load_policy(Model(path=str(tiny_folder)))
    found = dict(merged_weights(policy))
    assert set(found) == {name for name, _ in policy.causal_lm.named_parameters()}
    assert all(tensor.data_ptr() == found[name].data_ptr() for name, tensor in policy.causal_lm.named_parameters())
