"""Asynchronous rollouts: what is played, with which weights, at the same time as what, and what a resumed run keeps."""

import copy
import json
import os
import signal
import threading
import time

import pytest
import yaml

from lmrl import distributed
from lmrl.engines.base import Engine
from lmrl.engines.hf import HFEngine
from lmrl.errors import EngineError, RecipeError, RunError
from lmrl.policy.load import load_policy
from lmrl.recipe.files import load_recipe
from lmrl.rollouts.task import task_texts
from lmrl.sources.async_rollouts import STATE_FILE, AsyncRollouts
from lmrl.sources.base import SourceBatch
from lmrl.training import dry_run, resume_run, train
from lmrl.training.interrupt import Interrupted
from lmrl.training.monitoring.sampler_check import logprob_differences, pick_segments
from lmrl.training.stage import Stage
from lmrl.training.updater import Updater
from lmrl.trajectories.trajectory import Trajectory
from tests.conftest import TINY_WALKS
from tests.engines.vllm_server.fake_server import FakeServer
from tests.launcher import launch
from tests.runs import assert_same_run, metrics, stopped_before


def recipe_of(tmp_path, overrides=(), **changes):
    """Four steps of PPO; some samples are not judged, and the reward follows running statistics."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(12)))
    (tmp_path / "mine.py").write_text(
        "def digits(completions, **_): return [None if t[:1] in (*'say01',) else sum(c.isdigit() for c in t) for t in completions]\n"
        "def length(completions, **_): return [len(t) for t in completions]\n"
    )
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.02}
    data = {
        "model": {"config": config},
        "task": {
            "prompts": {"path": "prompts.jsonl"},
            "rewards": [{"function": "mine.py:digits", "normalize": "running"}],
            "max_failed": 0.9,
        },
        "rollouts": {"prompts": 6, "samples": 2, "max_new_tokens": 6, "ahead": 1},
        "objective": {"name": "ppo", "epochs": 2},
        "optimizer": {"lr": 2e-2},
        "training": {"steps": 4, "checkpoint_every": 1, "keep_checkpoints": 9, "threads": 1},
    } | changes
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    return load_recipe(tmp_path / "mine.yaml", list(overrides))


class Apart(HFEngine):
    """Samples from a copy of the policy, as an engine in another process does. `before` is called with the step whose
    episodes are about to be sampled."""

    is_remote = True
    own = None
    before = staticmethod(lambda engine, step: None)

    def sync(self):
        if self.own is None:
            self.own = HFEngine(copy.deepcopy(self.policy), self.slots)
        self.own.policy.load_state_dict(self.policy.state_dict())

    busy, advance = Engine.busy, Engine.advance  # batch by batch, in a thread

    def sample(self, prompts, sampling, keys):
        type(self).before(self, keys[0][3])
        return self.own.complete(prompts, sampling, keys)


@pytest.fixture
def remote_engine(monkeypatch):
    """Runs sample with Apart; give it a `before` by calling the fixture."""
    monkeypatch.setattr("lmrl.engines.hf.HFEngine", Apart)
    return lambda before: monkeypatch.setattr(Apart, "before", staticmethod(before))


def trained(folder):
    return [line for line in metrics(folder) if line["kind"] == "train"]


def pending(folder, step):
    return folder / f"stages/main/checkpoints/step-{step:06d}/state"


def weights(folder):
    return (folder / "stages/main/final/model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------------------- staleness
def test_a_step_trains_on_episodes_of_the_previous_weights(tmp_path, monkeypatch):
    seen, learn = [], Stage._learn

    def look(self, step, source_batch):
        seen.append((copy.deepcopy(self.policy), source_batch.played))
        return learn(self, step, source_batch)

    monkeypatch.setattr(Stage, "_learn", look)
    train(recipe_of(tmp_path, ["rollouts.check_every=1", "objective.value_warmup_steps=0"]), output=tmp_path / "run")
    policies, played = zip(*seen, strict=True)  # of each step, before it is learned from
    for step in range(4):
        segments = pick_segments(played[step])
        assert logprob_differences(policies[max(step - 1, 0)], segments, 1.0).abs().max() < 1e-4
        if step > 0:
            assert logprob_differences(policies[step], segments, 1.0).abs().mean() > 1e-3
    lines = trained(tmp_path / "run")
    assert [line["staleness"] for line in lines] == [0, 1, 1, 1]
    assert lines[0]["correction_mean"] == pytest.approx(1, abs=1e-4) != pytest.approx(lines[1]["correction_mean"])
    # What is compared was played by the learner as it is: ahead; at the last step there is no such episode.
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    checks = [line for line in found if line["kind"] == "check"]
    assert [line["step"] for line in checks] == [1, 2, 3] and all(line["gap_max"] < 1e-4 for line in checks)


@pytest.fixture
def updated(monkeypatch):
    """Set where the step under way has made an update."""
    event, begin, update = threading.Event(), Updater.begin, Updater.step

    def step(self, *args):
        stats = update(self, *args)
        event.set()
        return stats

    monkeypatch.setattr(Updater, "begin", lambda self, step: (event.clear(), begin(self, step)))
    monkeypatch.setattr(Updater, "step", step)
    return event


def test_sampling_during_training_equals_sampling_before_it(tmp_path, remote_engine, updated, monkeypatch):
    """Steps 3 and 4 are sampled only once the step before has made an update; weights and metrics are those of `hf`."""
    overlapped = []

    def before(engine, step):
        if step > 2:
            assert engine.weights_pinned and threading.current_thread() is not threading.main_thread()
            overlapped.append(updated.wait(60))

    remote_engine(before)
    train(recipe_of(tmp_path), output=tmp_path / "beside")
    assert overlapped == [True, True]
    monkeypatch.undo()
    train(recipe_of(tmp_path), output=tmp_path / "before")
    assert metrics(tmp_path / "beside") == metrics(tmp_path / "before")
    assert weights(tmp_path / "beside") == weights(tmp_path / "before")


def test_servers_sample_beside_the_training_with_weights_one_step_old(tmp_path, updated):
    server, stamps, overlapped = FakeServer(), [], []
    rollouts = {"prompts": 6, "samples": 2, "max_new_tokens": 6, "ahead": 1, "tolerance": 1e9}
    rollouts |= {"engine": "vllm-server", "server": {"urls": [server.url]}}
    task = {"prompts": {"path": "prompts.jsonl"}, "rewards": [{"function": "mine.py:length"}]}
    recipe = recipe_of(tmp_path, rollouts=rollouts, task=task)
    policy = load_policy(recipe.model, texts=lambda: task_texts(recipe))
    said = server.lmrl_describe
    server.lmrl_describe = lambda: said() | {"vocabulary": policy.causal_lm.config.vocab_size}

    def answer(number):
        stamps.append(server.stamp)
        if number > 24:  # of steps 3 and 4
            overlapped.append(updated.wait(60))

    server.on_generate = answer
    try:
        train(recipe, output=tmp_path / "run")
    finally:
        server.close()
    versions = list(dict.fromkeys(stamps))
    assert [stamps.count(version) for version in versions] == [24, 12, 12] and overlapped == [True] * 24
    assert len(server.loaded) == 4  # once a step
    assert [line["staleness"] for line in trained(tmp_path / "run")] == [0, 1, 1, 1]


# ---------------------------------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "objective": {"name": "grpo", "epochs": 2},
            "source": {"name": "rollouts", "resample": 2},
            "rollouts": {"prompts": 4, "samples": 2, "max_new_tokens": 2, "ahead": 1},
        },
    ],
    ids=["ppo", "resampled groups"],
)
def test_a_resumed_run_uses_the_episodes_played_ahead(tmp_path, changes):
    recipe = recipe_of(tmp_path, **changes)
    train(recipe, output=tmp_path / "whole")
    with stopped_before(3):
        train(recipe, output=tmp_path / "torn")
    state = json.loads((pending(tmp_path / "torn", 2) / STATE_FILE).read_text())
    assert state["step"] == 3 and state["staleness"] == 1 and state["failed"] > 0
    resume_run(tmp_path / "torn")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "torn")
    assert (tmp_path / "whole/samples.jsonl").read_text() == (tmp_path / "torn/samples.jsonl").read_text()
    assert weights(tmp_path / "whole") == weights(tmp_path / "torn")
    assert not (pending(tmp_path / "whole", 4) / STATE_FILE).exists()  # nothing is played beyond the last step


def test_killed_while_playing_several_turns(tmp_path):
    """SIGKILL between two checkpoints, and in the middle of writing one; in a mixture, whose buffer takes what is played."""
    small = ["task.nodes=8", "model.config.hidden_size=16", "model.config.intermediate_size=32", "training.threads=1"]
    small += ["source={name: mixture, player: random, episodes: 30, batch_size: 6, replay: 10}", "rollouts.ahead=1"]
    small += ["rollouts.prompts=3", "rollouts.max_new_tokens=10", "objective={name: ilql, q_head: tied}"]
    small += ["training.steps=5", "training.checkpoint_every=2", "evaluation.episodes=2", "evaluation.every=2"]
    whole, torn, kill = tmp_path / "whole", tmp_path / "torn", int(signal.SIGKILL)
    train(load_recipe("random_walks/bc", small), output=whole)
    assert [line["staleness"] for line in trained(whole)] == [0, 1, 1, 1, 1]
    done = launch("train", "random_walks/bc", *small, "--output", str(torn), stop=("record", 7, kill))
    assert done.returncode == -kill and metrics(torn)[-1]["step"] > 2, done.stderr
    done = launch("train", str(torn), "--resume", stop=("_fsync", 3, kill))
    assert done.returncode == -kill and "resumed stage main at step 2" in done.stdout, done.stdout
    resume_run(torn)
    assert_same_run(whole, torn)


def test_a_gate_rollback_drops_pending_episodes(tmp_path, monkeypatch):
    changes = ["source={name: rollouts}", "objective={name: ppo}", "rollouts.prompts=3", "rollouts.ahead=1"]
    changes += ["evaluation.gate={drop: 5, every: 2, max_rollbacks: 9}", "evaluation.episodes=2", "training.steps=4"]
    small = [change for change in TINY_WALKS if not change.startswith("source.")]
    monkeypatch.setattr("lmrl.training.listeners.gate.breached", lambda gate, lost: True)
    train(load_recipe("random_walks/bc", [*small, *changes]), output=tmp_path / "run")
    assert [line["staleness"] for line in trained(tmp_path / "run")] == [0, 1, 0, 1]


# ------------------------------------------------------------------------------------- what goes wrong beside the training
def test_an_error_in_the_sampling_thread_stops_the_run(tmp_path, remote_engine):
    """It is the error of the step whose episodes were played; the step under way is finished and kept."""

    def fail(engine, step):
        if step == 3:
            raise EngineError("the servers are gone")

    remote_engine(fail)
    with pytest.raises(EngineError, match="the servers are gone"):
        train(recipe_of(tmp_path), output=tmp_path / "run")
    assert [line["step"] for line in trained(tmp_path / "run")] == [1, 2]
    assert pending(tmp_path / "run", 2).exists() and not (pending(tmp_path / "run", 2) / STATE_FILE).exists()
    remote_engine(lambda engine, step: None)
    resume_run(tmp_path / "run")
    assert [line["staleness"] for line in trained(tmp_path / "run")] == [0, 1, 0, 1]


def test_an_interrupt_cancels_the_rollout(tmp_path, remote_engine, monkeypatch):
    played = []

    def hang(engine, step):
        played.append(step)
        while step == 3:
            engine.check()
            time.sleep(0.01)

    remote_engine(hang)
    learn = Stage._learn

    def interrupt(self, step, source_batch):
        if step == 2:
            while 3 not in played:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
        return learn(self, step, source_batch)

    monkeypatch.setattr(Stage, "_learn", interrupt)
    with pytest.raises(Interrupted):
        train(recipe_of(tmp_path), output=tmp_path / "run")
    assert not any(thread.name == "async rollouts" for thread in threading.enumerate())
    assert played == [1, 2, 3] and not (pending(tmp_path / "run", 2) / STATE_FILE).exists()
    remote_engine(lambda engine, step: played.append(step))
    resume_run(tmp_path / "run")
    assert played == [1, 2, 3, 3, 4] and [line["staleness"] for line in trained(tmp_path / "run")] == [0, 1, 0, 1]


def test_an_interrupt_while_playing_first_loses_nothing(tmp_path, monkeypatch):
    """With `hf`, the signal comes while step 3 is being played: step 2's episodes are kept, and it goes on to the bit."""
    train(recipe_of(tmp_path), output=tmp_path / "whole")
    advance = HFEngine.advance

    async def interrupted(self, arrived):
        if arrived and arrived[0].key[3] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        await advance(self, arrived)

    monkeypatch.setattr(HFEngine, "advance", interrupted)
    with pytest.raises(Interrupted):
        train(recipe_of(tmp_path), output=tmp_path / "torn")
    monkeypatch.undo()
    assert [line["step"] for line in trained(tmp_path / "torn")] == [1]
    resume_run(tmp_path / "torn")
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "torn")
    assert weights(tmp_path / "whole") == weights(tmp_path / "torn")


# ----------------------------------------------------------------------------------------------------------------- parts
class Fresh:
    """Stands in for FreshRollouts: one episode a step."""

    name = (0, "main")

    def __init__(self, engine, tokenizer):
        self.sampler = type("Sampler", (), {"engine": engine})()
        self.sampler.task = type("Task", (), {"renderer": type("Renderer", (), {"tokenizer": tokenizer})})
        self.steps = []

    def next(self, step):
        self.steps.append(step)
        episode = Trajectory([], f"{step}", "", version=self.sampler.engine.syncs)
        return SourceBatch([episode], [episode])


def test_a_rollback_forgets_earlier_episodes(tiny_policy):
    engine = HFEngine(tiny_policy)
    source = AsyncRollouts(Fresh(engine, tiny_policy.tokenizer), 9)
    source.next(1)
    engine.stale = True
    assert [one.prompt for one in source.wait()] == ["2"] and engine.staleness(source.wait()[0].version) == 1
    source.stop()
    assert [one.prompt for one in source.wait()] == ["2"]
    source.stop(forget=True)
    assert source.wait() == []
    (again,) = source.next(2).played
    assert source.fresh.steps == [1, 2, 2, 3]


def test_own_episodes_survive_an_interrupt_of_the_next_ones(tiny_policy):
    """A resumed run must not judge it a second time."""
    source = AsyncRollouts(Fresh(HFEngine(tiny_policy), tiny_policy.tokenizer), 9)
    play = source.fresh.next

    def interrupted(step):
        if step == 5:
            raise Interrupted(signal.SIGINT)
        return play(step)

    source.fresh.next = interrupted
    with pytest.raises(Interrupted):
        source.next(4)
    source.stop()
    assert [one.prompt for one in source.wait()] == ["4"]
    source.fresh.next = play
    source.next(4)
    assert source.fresh.steps == [4, 5]


def test_weights_are_not_synced_while_sampling(tiny_policy):
    engine = HFEngine(tiny_policy)
    checked = []
    with engine.pinned_weights(lambda: checked.append(True)):
        with pytest.raises(AssertionError, match="two versions"):
            engine.refresh()
        engine.check()
    assert checked and not engine.weights_pinned
    engine.refresh()
    assert engine.syncs == 1 and checked == [True]


def test_refused(tmp_path, tiny_policy, monkeypatch):
    with pytest.raises(RecipeError, match="leave rollouts.correction at auto, or set rollouts.ahead=0"):
        recipe_of(tmp_path, ["rollouts.correction=none"])
    assert recipe_of(tmp_path).rollouts.corrects == "token_truncate"
    assert recipe_of(tmp_path, ["rollouts.ahead=0"]).rollouts.corrects is None
    with pytest.raises(RecipeError, match="rollouts.ahead"):
        recipe_of(tmp_path, ["rollouts.ahead=2"])
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(RunError, match="is for one process, but this is a launch of 2"):
        AsyncRollouts(Fresh(HFEngine(tiny_policy), None), 9)


def test_a_dry_run_tries_it(tmp_path, monkeypatch):
    calls, next_one = [], AsyncRollouts.next
    monkeypatch.setattr(
        AsyncRollouts, "next", lambda self, step: calls.append((step, len(self.wait()))) or next_one(self, step)
    )
    dry_run(recipe_of(tmp_path))
    assert calls == [(1, 0), (2, 4)]
