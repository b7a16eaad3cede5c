"""Episodes as coroutines: environments in threads, schedules with and without the clock, rewards beside the sampling."""

import asyncio
import random
import threading
import time

import pytest

from lmrl.coroutines import run
from lmrl.engines.base import Completion, Engine, Sampling
from lmrl.engines.hf import HFEngine
from lmrl.environments import TextEnvironment
from lmrl.errors import RecipeError, RewardError
from lmrl.plugins.foreign import CallTimedOut, foreign, runs_here, waited_for
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.recipe import Rollouts
from lmrl.recipe.files import load_recipe
from lmrl.rewards.rewards import RewardFunction
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.step_threads import StepThreads
from lmrl.rollouts.task import PromptEnvironment, Task
from lmrl.sources.fresh import FreshRollouts
from lmrl.training.interrupt import Interrupt
from lmrl.trajectories.render import Renderer


@pytest.fixture
def tokenizer():
    return build_tokenizer("char", ["abos0123456789"])


class Counted(TextEnvironment):
    """Takes `start + 1` turns, each after `pause(start)` seconds."""

    num_starts, threads = 8, set()

    def __init__(self, pause=lambda start: 0.0):
        self.pause = pause

    def reset(self, *, seed=None, options=None):
        self.start = self.left = options["start"]
        time.sleep(self.pause(self.start))
        return f"s{self.left}", {}

    def step(self, action):
        self.threads.add(threading.current_thread())
        time.sleep(self.pause(self.start))
        self.left -= 1
        return f"o{max(self.left, 0)}", 1.0, self.left < 0, False, {"metrics": {"left": self.left}}


class Batches(Engine):
    """Says `ab`; remembers the keys of each batch."""

    def __init__(self, tokenizer):
        super().__init__(None)
        self.tokens = tokenizer("ab", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        self.batches = []

    def sample(self, prompts, sampling, keys):
        self.batches.append(sorted(keys))
        return [Completion(list(self.tokens), [-0.1, -0.2, -0.3], "eos") for _ in prompts]


def sampler_of(tokenizer, pause=lambda start: 0.0, engine=None, deterministic=True, **options):
    task = Task(lambda: Counted(pause), Renderer(tokenizer), list(range(8)), [0], 10, **options)
    decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)  # noqa: E731
    return Sampler(task, engine or Batches(tokenizer), decode, deterministic)


# ------------------------------------------------------------------------------------------------------------ environments
def test_workers_step_environments_side_by_side(tokenizer):
    together = threading.Barrier(8, timeout=30)  # nobody goes on before all eight are there
    sampler = sampler_of(tokenizer, lambda start: together.wait() * 0.0, workers=8)
    Counted.threads.clear()
    played = sampler.play([0] * 8, 1, Sampling(), ("x",))
    assert [one.reward for one in played] == [1.0] * 8
    assert len(Counted.threads) == 8 and threading.main_thread() not in Counted.threads


def test_no_more_threads_than_workers(tokenizer):
    sampler = sampler_of(tokenizer, lambda start: 0.01, workers=3)
    Counted.threads.clear()
    sampler.play([1] * 8, 1, Sampling(), ("x",))
    assert len(Counted.threads) == 3
    for thread in Counted.threads:
        thread.join(5)  # they end with the rollout
        assert not thread.is_alive()


def test_a_step_over_its_limit_costs_its_episode(tokenizer):
    began = time.monotonic()
    sampler = sampler_of(tokenizer, lambda start: 60 if start == 1 else 0, workers=2, call_timeout=0.2)
    played = sampler.play([0, 1, 2], 1, Sampling(), ("x",))
    assert time.monotonic() - began < 10
    assert [one.reward for one in played] == [1.0, None, 3.0]
    assert played[1].failure == "environment timed out after 0.2 s (task.call_timeout)"
    assert sampler.threads.lost == 1


def test_waiting_for_a_thread_is_not_counted():
    threads = StepThreads(1)

    async def two():
        return await asyncio.gather(*[threads.run(lambda: time.sleep(0.4) or 1, 1.0) for _ in range(3)])

    assert run(two()) == [1, 1, 1]


def test_an_abandoned_thread_ends_with_its_call():
    threads, gate, seen = StepThreads(1), threading.Event(), []
    with pytest.raises(CallTimedOut, match="timed out after 0.1 s"):
        run(threads.run(lambda: seen.append(threading.current_thread()) or gate.wait(), 0.1))
    gate.set()
    seen[0].join(5)
    assert not seen[0].is_alive() and run(threads.run(lambda: 7, 1)) == 7


def test_a_signal_during_a_call_in_a_thread_is_left_to_check():
    """It may not break into whatever the main thread is doing."""
    started, gate = threading.Event(), threading.Event()

    def work():
        with foreign("the environment"):
            started.set()
            gate.wait(5)

    thread = threading.Thread(target=work)
    thread.start()
    started.wait(5)
    interrupt = Interrupt()
    interrupt.safe = True
    assert waited_for().startswith("the environment") and not runs_here()
    interrupt._catch(15, None)
    assert interrupt.number == 15
    gate.set()
    thread.join()


def test_an_episode_that_outgrows_the_model_is_truncated(tokenizer):
    sampler = sampler_of(tokenizer, positions=2 + 3 + 2 + 3 + 2 + 3)  # turn 2 has 12 tokens of context
    long, short = sampler.play([7, 1], 1, Sampling(max_new_tokens=4), ("x",))
    assert (len(long.turns), long.terminated, long.final_observation) == (2, False, "o5")
    assert tokenizer.decode(long.segments[-1].tokens) == "s7ab<eos>o6ab<eos>o5"
    assert long.reward == 2.0 and long.metrics == {"left": 5.0}
    assert (len(short.turns), short.terminated) == (2, True)


@pytest.mark.parametrize("turns", [1, 10])
@pytest.mark.parametrize("history", ["all", 1])
def test_a_last_observation_beyond_the_model_is_cut(tokenizer, monkeypatch, turns, history):
    """Its value is that of its beginning: a pass over more tokens than the model has positions for would fail."""
    monkeypatch.setattr(Counted, "step", lambda self, action: ("o" * 30, 1.0, False, False, {}))
    sampler = sampler_of(tokenizer, positions=12)
    sampler.task.max_turns, sampler.task.history = turns, history
    (episode,) = sampler.play([1], 1, Sampling(max_new_tokens=4), ("x",))
    assert (len(episode.turns), episode.terminated, episode.final_observation) == (1, False, "o" * 30)
    last = episode.segments[-1]
    assert tokenizer.decode(last.tokens) == ("s1ab<eos>ooooooo" if history == "all" else "o" * 12)
    assert {len(column) for column in (last.turns, last.logprobs, last.rewards)} == {12}


def test_a_first_observation_beyond_the_model_fails(tokenizer, monkeypatch):
    reset = Counted.reset

    def long(self, *, seed=None, options=None):
        observation, info = reset(self, seed=seed, options=options)
        return "s" * 9 if options["start"] == 7 else observation, info

    monkeypatch.setattr(Counted, "reset", long)
    sampler = sampler_of(tokenizer, positions=12)
    failed, played = sampler.play([7, 0], 1, Sampling(max_new_tokens=4), ("x",))
    assert failed.failure == (
        "model has 12 positions, but a first observation of 9 tokens and max_new_tokens=4 need 13"
    )
    assert (failed.reward, failed.turns) == (None, []) and (played.failure, len(played.turns)) == (None, 1)


# ---------------------------------------------------------------------------------------------------------------- schedule
def test_the_default_schedule_does_not_depend_on_the_clock(tokenizer):
    """Steps that take random times give the batches that steps without any time do."""
    starts, expected = [3, 0, 2, 1, 3, 2], sampler_of(tokenizer)
    expected.play(starts, 1, Sampling(), ("x",))
    for seed in range(3):
        rng = random.Random(seed)
        sampler = sampler_of(tokenizer, lambda start, rng=rng: rng.random() / 50, workers=4)
        sampler.play(starts, 1, Sampling(), ("x",))
        assert sampler.engine.batches == expected.engine.batches
    assert [len(batch) for batch in expected.engine.batches] == [6, 5, 4, 2]


def test_episodes_overtake_each_other_where_they_may(tokenizer):
    sampler = sampler_of(tokenizer, lambda start: 0.5 if start == 0 else 0, workers=4, deterministic=False)
    played = sampler.play([0, 3, 3], 1, Sampling(), ("x",))
    assert [one.reward for one in played] == [1.0, 4.0, 4.0]
    last = sampler.engine.batches[-1]
    assert last == [("x", 0, 0)]  # its reset took longer than all turns of the others


@pytest.mark.parametrize("slots", [3, 64])
def test_hf_samples_to_the_bit_however_long_steps_take(tiny_policy, slots):
    tiny_policy.causal_lm.generation_config.eos_token_id = [1, 7, 9]
    tokenizer = tiny_policy.tokenizer

    def play(pause, workers):
        sampler = sampler_of(tokenizer, pause, HFEngine(tiny_policy, slots), workers=workers)
        played = sampler.play([3, 0, 2, 1], 2, Sampling(max_new_tokens=6), ("x",))
        return [(one.segments, one.reward) for one in played]

    rng = random.Random(1)
    assert play(lambda start: 0.0, 0) == play(lambda start: rng.random() / 100, 5)


# ----------------------------------------------------------------------------------------------------------------- rewards
def prompt_task(tokenizer, rewards, rows=8):
    data = [{"prompt": f"s{row % 10}", "answer": str(row)} for row in range(rows)]
    return Task(
        lambda: PromptEnvironment(data, "prompt"), Renderer(tokenizer), None, None, rewards=rewards, judged_by="reward"
    )


class Slow(Batches):
    """Completes one prompt after the other, and notes when."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.done = []

    async def advance(self, arrived):
        for request in arrived:
            request.answer(Completion(list(self.tokens), [0.0] * 3, "eos", 1))
            self.done.append(request.key[1])
            time.sleep(0.02)
            await asyncio.sleep(0)


def test_remote_rewards_run_as_groups_complete(tokenizer):
    calls = []
    engine = Slow(tokenizer)

    def call(prompts, completions, answer, **_):
        calls.append((len(engine.done), list(answer)))
        return [float(one) for one in answer]

    remote = RewardFunction("r", "r", 1.0, call, is_remote=True)
    here = RewardFunction("h", "h", 1.0, lambda prompts, **_: [0.5] * len(prompts))
    sampler = Sampler(prompt_task(tokenizer, [remote, here], 16), engine, tokenizer.decode)
    played = sampler.play(list(range(16)), 2, Sampling(), ("x",))
    assert [one.reward for one in played] == [row + 0.5 for row in range(16) for _ in range(2)]
    assert [answers for _, answers in calls] == [  # eighths, of whole groups
        [str(row) for row in (first, first, first + 1, first + 1)] for first in range(0, 16, 2)
    ]
    assert calls[0][0] < 16 and all(early <= later for (early, _), (later, _) in zip(calls, calls[1:], strict=False))


def test_a_mistake_in_a_remote_reward_stops_the_rollout(tokenizer):
    remote = RewardFunction("r", "r", 1.0, lambda **_: [1.0], is_remote=True)
    sampler = Sampler(prompt_task(tokenizer, [remote]), Batches(tokenizer), tokenizer.decode)
    with pytest.raises(RewardError, match="reward r returned 1 value for 2 rows"):
        sampler.play([0, 1], 2, Sampling(), ("x",))


# ------------------------------------------------------------------------------------------------------------------ groups
def test_small_groups_are_dropped_and_counted(tokenizer):
    def fail(prompts, completions, answer, **_):
        return [None if one == "1" and row % 2 else 1.0 for row, one in enumerate(answer)]

    reward = RewardFunction("r", "r", 1.0, fail)
    task = prompt_task(tokenizer, [reward])
    task.min_group, task.max_failed, task.training = 2, 0.5, [0, 1, 2]
    sampler = Sampler(task, Batches(tokenizer), tokenizer.decode)
    batch = FreshRollouts(sampler, Rollouts(prompts=3, samples=2), 0, "main").next(1)
    assert (len(batch.played), batch.failed, batch.dropped) == (6, 1, 1)
    assert len(batch.learn) == 4 and {one.columns["answer"] for one in batch.learn} == {"0", "2"}
    task.min_group = 1
    batch = FreshRollouts(sampler, Rollouts(prompts=3, samples=2), 0, "main").next(1)
    assert (len(batch.learn), batch.failed, batch.dropped) == (5, 1, 0)


def test_a_group_cannot_be_asked_to_be_larger_than_it_is():
    with pytest.raises(RecipeError, match="`task.min_group`=3 keeps no group of rollouts.samples=2"):
        load_recipe("random_walks/ppo", ["task.min_group=3", "rollouts.samples=2"])
