"""Tasksets of verifiers, with the real package if it can be imported."""

import json
import sys

import pytest

from lmrl.engines.base import Sampling
from lmrl.environments import environment_factory
from lmrl.errors import PluginError
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.recipe import CustomTask
from lmrl.rollouts.replay import replay_episode
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import build_task
from lmrl.training.monitoring.measures import sample_line
from tests.rollouts.test_episodes import Batches

pytest.importorskip("verifiers.v1")

ADDING = """
import verifiers.v1 as vf
__all__ = ["AddingTaskset"]

class AddingConfig(vf.TasksetConfig):
    largest: int = 3

class AddingData(vf.TaskData):
    answer: str

class AddingTask(vf.Task[AddingData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=2.0)
    async def right(self, task, trace) -> float:
        return float(trace.last_reply == task.answer)
    @vf.metric
    async def letters(self, trace) -> float:
        return float(len(trace.last_reply))
    NEEDS

class AddingTaskset(vf.Taskset[AddingTask, AddingConfig]):
    INFINITE = True
    def load(self):
        number = 0
        while True:
            data = AddingData(prompt=f"{number}+{self.config.largest}", answer=str(number + self.config.largest), SYSTEM)
            yield AddingTask(data, self.config.task)
            number += 1
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that puts a taskset of this name where verifiers finds it."""
    monkeypatch.syspath_prepend(tmp_path)

    def put(name, needs="", system=""):
        (tmp_path / f"{name}.py").write_text(ADDING.replace("NEEDS", needs).replace("SYSTEM", system))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return f"verifiers:{name}"

    return put


def make(name, **options):
    return environment_factory(CustomTask(environment=name, **options))()


def test_an_answer_is_scored_by_the_taskset(install):
    environment = make(install("adding_one"), size=4, largest=5)
    assert environment.num_starts == 4
    assert environment.reset(seed=0, options={"start": 2}) == ("2+5", {})
    assert environment.step("7") == ("", 2.0, True, False, {"metrics": {"right": 1.0, "letters": 1.0}})
    environment.reset(seed=0, options={"start": 2})
    assert environment.step("no 7")[1] == 0.0
    assert {"0+5", "5"} <= set(environment.texts())


def test_a_system_message_makes_a_dialogue(install):
    environment = make(install("adding_two", system='system_prompt="Add."'), size=2)
    observation, _ = environment.reset(seed=0, options={"start": 1})
    assert observation == [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+3"}]
    assert environment.step("4")[1] == 2.0


def test_an_episode_can_be_replayed(install):
    tokenizer = build_tokenizer("char", ["0123456789+"])
    task = build_task(CustomTask(environment=install("adding_three"), size=3), tokenizer)
    (played,) = Sampler(task, Batches(build_tokenizer("char", ["ab"])), lambda tokens: "4").play(
        [1], 1, Sampling(), ("v",)
    )
    assert (played.prompt, played.reward, played.metrics["right"]) == ("1+3", 2.0, 1.0)
    line = json.loads(json.dumps(sample_line("main", 1, "train", played, task.environment)))
    told, same = replay_episode(line)
    assert same and "version verifiers 0." in told[0]


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ("NEEDS_CONTAINER = True", "needs a container"),
        ("async def setup(self, trace, runtime): pass", "needs a sandbox to set up"),
        ("@vf.reward\n    async def built(self, runtime) -> float: return 1.0", "needs a sandbox to be scored in"),
    ],
)
def test_tasks_for_programs_are_refused(install, needs, message):
    name = f"adding_{message.replace(' ', '_')}"
    with pytest.raises(PluginError, match=f"{message}: play it as a program"):
        make(install(name, needs), size=2)


def test_an_unknown_taskset_is_refused():
    with pytest.raises(PluginError, match="verifiers has no taskset 'no_such_taskset'"):
        make("verifiers:no_such_taskset")
