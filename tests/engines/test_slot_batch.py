"""Dialogues with kept keys and values: the same tokens as without, and only new tokens are computed."""

import asyncio
import gc
import weakref

import numpy as np
import pytest
import torch

from lmrl.coroutines import run
from lmrl.engines.base import Sampling
from lmrl.engines.hf import HFEngine
from lmrl.engines.slot_batch import WORTHWHILE
from lmrl.errors import MemoryShortError
from tests.engines.test_hf import assert_same, logprobs_of

SAMPLING = Sampling(max_new_tokens=7)


def observation(name, turn):
    """1 to 5 tokens that answer a turn."""
    rng = np.random.default_rng([name, turn])
    return rng.integers(3, 30, size=rng.integers(1, 6)).tolist()


async def dialogue(engine, name, tokens, turns, sampling=SAMPLING):
    """Some turns of an episode; the context and the completion of each."""
    said = []
    for turn in range(turns):
        completion = await engine.generate(tokens, sampling, ("x", name, turn))
        said.append((list(tokens), completion))
        tokens = tokens + completion.tokens + observation(name, turn)
        await asyncio.sleep(0)
    return said


def together(engine, prompts, turns, sampling=SAMPLING):
    """Dialogues of so many turns each, side by side; everything that was said, in order."""

    async def all_of_them():
        calls = [dialogue(engine, name, prompt, turns[name], sampling) for name, prompt in enumerate(prompts)]
        return await asyncio.gather(*calls)

    return [turn for said in run(all_of_them()) for turn in said]


def anew(policy, said, names):
    """The same contexts, each by an engine that has seen nothing."""
    return [
        HFEngine(policy).complete([tokens], SAMPLING, [name])[0] for (tokens, _), name in zip(said, names, strict=True)
    ]


def names_of(turns):
    return [("x", name, turn) for name, count in enumerate(turns) for turn in range(count)]


@pytest.fixture
def policy(tiny_policy):
    tiny_policy.causal_lm.generation_config.eos_token_id = [1, 7, 9]  # so that turns differ in length
    assert tiny_policy.holds_slots
    return tiny_policy


@pytest.mark.parametrize("slots", [1, 3, 5, 64])
@pytest.mark.parametrize("limit", [None, 400])
def test_dialogues_equal_those_sampled_alone(policy, slots, limit):
    """Some prompts are equal, some begin alike; dialogues end at different turns."""
    beginning = [index % 20 + 3 for index in range(WORTHWHILE + 2)]
    prompts = [[5, 6, 7]] * 3 + [beginning + [token] for token in (4, 5, 6)] + [[8], [9, 10, 11, 12]]
    turns = [2, 1, 3, 2, 2, 1, 3, 1]
    said = together(HFEngine(policy, slots=slots, cache_tokens=limit), prompts, turns)
    assert_same([completion for _, completion in said], anew(policy, said, names_of(turns)))


def test_later_turns_compute_only_new_tokens(policy):
    prompts, turns = [[5, 6, 7], [9, 10, 11, 12], [8]], [4, 2, 3]
    engine = HFEngine(policy)
    said = together(engine, prompts, turns)
    # Of a later turn: what was observed, and the token that was sampled last, which nothing has followed yet.
    later = sum(len(observation(name, turn)) + 1 for name, count in enumerate(turns) for turn in range(count - 1))
    assert engine.batch.computed_tokens == sum(map(len, prompts)) + later
    assert sum(len(tokens) for tokens, _ in said) > 2 * engine.batch.computed_tokens


def test_a_rewritten_dialogue_keeps_its_beginning(policy):
    """For instance if a template renders earlier turns differently."""
    engine, opening = HFEngine(policy), [index % 20 + 3 for index in range(WORTHWHILE)]

    async def two_turns():
        first = await engine.generate(opening + [4, 5], SAMPLING, ("a", 0))
        before = engine.batch.computed_tokens
        second = await engine.generate(opening + [6, 7, 8], SAMPLING, ("a", 1))
        return first, second, engine.batch.computed_tokens - before

    _, second, computed = run(two_turns())
    assert computed == 3
    assert_same([second], HFEngine(policy).complete([opening + [6, 7, 8]], SAMPLING, [("a", 1)]))


def test_a_group_that_arrives_in_parts_shares_its_prompt(policy):
    """Two of four samples find a place; the others need only the prompt's last token, for what follows it."""
    prompt = [5, 6, 7, 8, 9, 10]
    engine = HFEngine(policy, slots=2)

    async def group():
        return await asyncio.gather(*[engine.generate(prompt, SAMPLING, ("s", number, 0)) for number in range(4)])

    found = run(group())
    assert engine.batch.computed_tokens == 6 + 1  # the second two join together here
    alone = [HFEngine(policy).complete([prompt], SAMPLING, [("s", number, 0)])[0] for number in range(4)]
    assert_same(found, alone)


def test_a_prompt_is_copied_while_its_slot_moves(policy):
    """A dialogue goes on in the slot that a new one shares its prompt with, and another slot moves to where it was."""
    engine, prompt, one = HFEngine(policy), [5, 6, 8], Sampling(max_new_tokens=1)

    async def two_rounds():
        opening = [[20, 21, 22, 23, 24], [20, 21, 22, 23], prompt]
        first = await asyncio.gather(
            *[engine.generate(tokens, one, ("x", name, 0)) for name, tokens in enumerate(opening)]
        )
        contexts = [prompt + first[2].tokens + [10], prompt]
        found = [
            engine.generate(tokens, SAMPLING, name)
            for tokens, name in zip(contexts, [("x", 2, 1), ("x", 3, 0)], strict=True)
        ]
        return list(zip(contexts, await asyncio.gather(*found), strict=True))

    said = run(two_rounds())
    assert_same([completion for _, completion in said], anew(policy, said, [("x", 2, 1), ("x", 3, 0)]))


def test_a_prompt_is_copied_from_a_slot_that_is_dropped(policy):
    """The long dialogue that begins with it no longer fits beside the others."""
    policy.causal_lm.generation_config.eos_token_id = policy.tokenizer.eos_token = None  # it is long
    policy.causal_lm.config.max_position_embeddings = 128
    engine, prompt = HFEngine(policy, cache_tokens=204), [5, 6, 8]

    async def one_after_the_other():
        await engine.generate(prompt, Sampling(max_new_tokens=70), ("long", 0))
        await engine.generate([20, 21, 22], Sampling(max_new_tokens=1), ("other", 0))
        return await engine.generate(prompt, Sampling(max_new_tokens=1), ("short", 0))

    found = run(one_after_the_other())
    assert found.logprobs == pytest.approx(logprobs_of(policy.eval(), prompt, found.tokens).tolist(), rel=1e-4)


def test_new_weights_drop_kept_slots(policy):
    engine = HFEngine(policy)

    async def turn(tokens, number):
        return await engine.generate(tokens, SAMPLING, ("a", number))

    first = run(turn([5, 6, 7], 0))
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    engine.stale = True
    context = [5, 6, 7, *first.tokens, 8]
    second = run(turn(context, 1))
    assert (first.version, second.version) == (1, 2)
    expected = logprobs_of(policy.eval(), context, second.tokens)
    torch.testing.assert_close(torch.tensor(second.logprobs), expected, rtol=1e-4, atol=1e-5)


def test_compiled_layers_do_not_sample(policy):
    """They are compiled for passes over whole sequences; a pass for every token would compile them again and again."""
    layer, passes = policy.causal_lm.model.layers[0], []
    plain = layer.forward
    policy.layers._compiled = {layer: lambda *args, **options: passes.append(len(passes)) or plain(*args, **options)}
    layer.forward = policy.layers._compiled[layer]
    del policy.holds_slots  # found by trial, with the engine
    run(dialogue(HFEngine(policy), 0, [5, 6], 2))
    assert passes == [] and layer.forward is policy.layers._compiled[layer]
    logprobs_of(policy, [5, 6], [7])
    assert passes == [0]


def test_memory_is_released(policy):
    engine = HFEngine(policy)
    run(dialogue(engine, 0, [5, 6], 2))
    assert engine.batch.store.slots
    keys = weakref.ref(engine.batch.store.cache.layers[0].keys)
    gc.disable()  # at once, not when the garbage collector comes: an update needs the memory
    try:
        engine.release_memory()
        assert keys() is None
    finally:
        gc.enable()
    assert engine.batch.store.cache is None and not engine.batch.store.slots and not engine.batch.store.by_name


def test_buffers_grow_by_doubling(policy):
    policy.causal_lm.generation_config.eos_token_id = 1
    engine, columns = HFEngine(policy), []
    own = engine.batch._decode
    engine.batch._decode = lambda: (own(), columns.append(engine.batch.store.cache.extent.columns))
    policy.microbatch_tokens = 10_000
    long = Sampling(max_new_tokens=59)

    async def longest():
        return await asyncio.gather(*[engine.generate([5], long, (number,)) for number in range(20)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmrl.engines.slot_store.COLUMNS", 4)
        run(longest())
    assert list(dict.fromkeys(columns)) == [5, 10, 20, 40, 60]  # 60: more is never needed


def test_requests_of_different_kinds_are_completed_one_kind_after_the_other(policy):
    engine = HFEngine(policy)
    kinds = [Sampling(7), Sampling(7, temperature=0.5), Sampling(3), Sampling(7, temperature=0)]

    async def all_kinds():
        return await asyncio.gather(*[engine.generate([5, 6], kind, ("k", n)) for n, kind in enumerate(kinds)])

    found = run(all_kinds())
    alone = [HFEngine(policy).complete([[5, 6]], kind, [("k", n)])[0] for n, kind in enumerate(kinds)]
    assert_same(found, alone)
    assert found[0].tokens[:3] != [] and len(found[2].tokens) <= 3


def test_requests_of_different_lengths_are_completed_together(policy):
    policy.causal_lm.generation_config.eos_token_id = 1
    engine = HFEngine(policy)

    async def both():
        return await asyncio.gather(*[engine.generate([5], Sampling(n), ("l", n)) for n in (3, 9)])

    assert [len(one.tokens) for one in run(both())] == [3, 9]
    assert engine.batch.passes == 9  # and not 3 + 9


def test_a_cancelled_request_leaves_the_batch(policy):
    policy.causal_lm.generation_config.eos_token_id = 1
    engine = HFEngine(policy)

    async def cancel_one():
        doomed = asyncio.ensure_future(engine.generate([5, 6], Sampling(50), ("doomed", 0)))
        other = asyncio.ensure_future(engine.generate([7, 8], Sampling(20), ("other", 0)))
        while not engine.batch.running:
            await asyncio.sleep(0)
        doomed.cancel()
        await asyncio.sleep(0)
        return await other

    found = run(cancel_one())
    assert not engine.busy
    assert_same([found], HFEngine(policy).complete([[7, 8]], Sampling(20), [("other", 0)]))


def test_other_code_runs_with_gradients_between_the_passes(policy):
    policy.train()
    seen = []

    async def watch():
        task = asyncio.ensure_future(HFEngine(policy).generate([5, 6], Sampling(20), ("a", 0)))
        while not task.done():
            seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            await asyncio.sleep(0)

    run(watch())
    assert set(seen) == {(True, False)} and policy.training


def test_eager_attention(policy):
    """Its mask is added to the scores."""
    policy.causal_lm.config._attn_implementation = "eager"
    turns = [3, 2]
    said = together(HFEngine(policy), [[5, 6, 7], [8]], turns)
    for tokens, completion in said:
        expected = logprobs_of(policy.eval(), tokens, completion.tokens)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [(3, 9, 9), (3, 3, 3)])
def test_memory_shortage_while_slots_move_is_reported(policy, lengths):
    """Moving the slots of running sequences may need memory: the shortage is reported, and the engine continues."""
    policy.causal_lm.generation_config.eos_token_id = 1
    engine = HFEngine(policy)
    original = engine.batch.store.arrange

    def fails_as_they_leave(order, most):
        if any(slot.logprobs and slot.pending is None for slot in order):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        original(order, most)

    async def several():
        calls = [engine.generate([5 + n], Sampling(length), ("m", n, 0)) for n, length in enumerate(lengths)]
        return await asyncio.gather(*calls, return_exceptions=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.batch.store, "arrange", fails_as_they_leave)
        found = run(several())
    failed = [one for one in found if isinstance(one, Exception)]
    assert len(failed) == len(set(lengths) - {3}) * 2  # those that had ended have their answers
    assert all(isinstance(one, MemoryShortError) and "rollouts.cache_tokens" in str(one) for one in failed)
    assert [len(one.tokens) for one in run(several())] == list(lengths)
