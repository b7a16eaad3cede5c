"""Passes that run out of memory are repeated with smaller microbatches, and nothing else differs."""

import pytest
import torch

from lmrl.errors import MemoryShortError
from lmrl.policy.memory import is_out_of_memory
from tests.training.test_updater_memory import batch, limit_memory


def test_scores_do_not_depend_on_memory(tiny_policy):
    policy, whole = tiny_policy.double(), batch(9)
    policy.microbatch_tokens = 1000
    expected = policy.score(whole)["logprobs"]
    policy.train()
    with limit_memory(policy, 20):
        found = policy.score(whole)["logprobs"]
    assert policy.microbatch_tokens < 20 and policy.training
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)  # scores are float32


def test_no_size_is_left(tiny_policy):
    was = tiny_policy.training
    with (
        limit_memory(tiny_policy, 5),
        pytest.raises(MemoryShortError, match=r"over one sequence of 6 tokens.*gradient_checkp") as caught,
    ):
        tiny_policy.score(batch(9))
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value) and tiny_policy.training == was


def test_in_lockstep_no_rank_retries(tiny_policy):
    tiny_policy.synchronized = True
    with limit_memory(tiny_policy, 20), pytest.raises(MemoryShortError, match="lower training.microbatch_tokens=4096"):
        tiny_policy.score(batch(9))
    assert tiny_policy.microbatch_tokens == 4096


def test_other_errors_are_left_alone(tiny_policy):
    layer = tiny_policy.causal_lm.model.layers[0]

    def fail(*_):
        raise RuntimeError("shapes do not match")

    with layer.register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="shapes do not match"):
        tiny_policy.score(batch(3))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_count_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_the_real_allocator_says_so():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46, dtype=torch.float64)
    assert is_out_of_memory(caught.value)
