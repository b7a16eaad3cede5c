"""The engine interface: requests that wait at the same time are served together, from coroutines and from synchronous code."""

import asyncio
import threading
import time

import pytest
import torch

from lmrl.coroutines import in_thread, run, watched
from lmrl.engines.base import Completion, Engine, Sampling
from lmrl.engines.hf import HFEngine
from lmrl.errors import ModelError

SAMPLING = Sampling(max_new_tokens=4)


class Recorded(Engine):
    """Says the first token of a prompt again; remembers the batches it was given."""

    def __init__(self, check=lambda: None):
        super().__init__(None, check)
        self.batches, self.threads = [], set()

    def sample(self, prompts, sampling, keys):
        self.batches.append([(prompt[0], key) for prompt, key in zip(prompts, keys, strict=True)])
        self.threads.add(threading.current_thread())
        return [Completion(prompt[:1], [-0.5], "length") for prompt in prompts]


class Remote(Recorded):
    is_remote = True


async def play(engine, number, turns):
    """Ask `turns` times, each time with what came back."""
    tokens = [number]
    for turn in range(turns):
        tokens = (await engine.generate(tokens, SAMPLING, (number, turn))).tokens
    return tokens


@pytest.mark.parametrize("kind", [Recorded, Remote])
def test_coroutines_that_wait_at_the_same_time_form_a_batch(kind):
    engine = kind()

    async def all_of_them():
        return await asyncio.gather(play(engine, 7, 1), play(engine, 8, 3), play(engine, 9, 2))

    assert run(all_of_them()) == [[7], [8], [9]]
    assert engine.batches == [
        [(7, (7, 0)), (8, (8, 0)), (9, (9, 0))],
        [(8, (8, 1)), (9, (9, 1))],
        [(8, (8, 2))],
    ]
    assert (threading.main_thread() in engine.threads) == (kind is Recorded)


def test_coroutines_inside_others_join_the_batch_too():
    engine = Recorded()

    async def two(first):
        return await asyncio.gather(play(engine, first, 2), play(engine, first + 1, 2))

    async def four():
        return await asyncio.gather(two(0), two(2))

    run(four())
    assert [len(batch) for batch in engine.batches] == [4, 4]


def test_different_sampling_is_served_separately():
    engine = Recorded()

    async def both():
        calls = [engine.generate([n], Sampling(max_new_tokens=1 + n % 2), (n,)) for n in range(4)]
        return await asyncio.gather(*calls)

    run(both())
    assert [[token for token, _ in batch] for batch in engine.batches] == [[0, 2], [1, 3]]


def test_a_held_engine_waits():
    engine = Recorded()

    async def late():
        with engine.held():
            await in_thread(lambda: time.sleep(0.05))
        return await engine.generate([1], SAMPLING, (1,))

    async def both():
        return await asyncio.gather(late(), engine.generate([0], SAMPLING, (0,)))

    run(both())
    assert engine.batches == [[(0, (0,)), (1, (1,))]]


def test_a_completion_carries_the_version_of_the_weights():
    engine = Recorded()
    assert [one.version for one in engine.complete([[1], [2]], SAMPLING, [(1,), (2,)])] == [1, 1]
    engine.stale = True
    assert [one.version for one in engine.complete([[1]], SAMPLING, [(1,)])] == [2]


def test_an_error_ends_all_requests_and_the_engine_goes_on():
    engine = Recorded()

    def fail(prompts, sampling, keys):
        raise OSError("gone")

    async def both():
        return await asyncio.gather(play(engine, 1, 1), play(engine, 2, 1), return_exceptions=True)

    engine.sample = fail
    assert [str(error) for error in run(both())] == ["gone", "gone"]
    del engine.sample
    assert run(both()) == [[1], [2]]


@pytest.mark.parametrize("kind", [Recorded, Remote])
def test_check_abandons_running_requests(kind):
    class Stop(BaseException):
        pass

    calls = []

    def check():
        calls.append(1)
        if len(calls) > 1:
            raise Stop

    engine = kind(check)
    with pytest.raises(Stop):
        run(play(engine, 1, 2))


def test_synchronous_calls_work_inside_a_running_loop():
    """As in a notebook."""
    engine = Recorded()

    async def cell():
        found = engine.complete([[3], [4]], SAMPLING, [(0,), (1,)])
        await asyncio.sleep(0)
        return found

    assert [one.tokens for one in asyncio.run(cell())] == [[3], [4]]


def test_watched_gives_up_if_the_check_raises():
    def check():
        raise TimeoutError("enough")

    with pytest.raises(TimeoutError, match="enough"):
        run(watched(in_thread(lambda: time.sleep(30)), check))


def test_an_engine_that_cannot_score_says_so():
    with pytest.raises(ModelError, match=r"'Recorded' cannot score given tokens"):
        Recorded().score_all([[1, 2]])


# ------------------------------------------------------------------------------------------------------------ the hf engine
def test_scores_are_those_of_a_plain_pass(tiny_policy):
    tiny_policy.temperature = 0.5  # of a recipe, for what it samples: not for scores
    engine, sequences = HFEngine(tiny_policy), [[5, 6, 7, 8, 9], [5], [10, 11], [5, 6, 7]]
    found = engine.score_all(sequences)
    assert [len(one) for one in found] == [4, 0, 1, 2] and tiny_policy.temperature == 0.5
    for tokens, scores in zip(sequences, found, strict=True):
        with torch.no_grad():
            logits = tiny_policy.eval().causal_lm(torch.tensor([tokens])).logits[0, :-1]
        expected = logits.log_softmax(-1)[torch.arange(len(tokens) - 1), tokens[1:]]
        torch.testing.assert_close(torch.tensor(scores), expected, rtol=1e-4, atol=1e-5)


def test_one_request_that_does_not_fit_is_refused_alone(tiny_policy):
    engine = HFEngine(tiny_policy)

    async def both():
        calls = [
            engine.generate([5] * 62, SAMPLING, (0,)),
            engine.generate([5], SAMPLING, (1,)),
            engine.score([5] * 65),
        ]
        return await asyncio.gather(*calls, return_exceptions=True)

    long, short, scored = run(both())
    assert isinstance(long, ModelError) and "need 66 positions, but the model has 64" in str(long)
    assert len(short.tokens) <= 4
    assert isinstance(scored, ModelError) and "65 tokens cannot be scored: the model has 64 positions" in str(scored)
