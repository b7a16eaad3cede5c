"""Third-party agent frameworks, unchanged except for the address: their calls to the policy are recorded token by token."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from lmrl.engines.base import Sampling
from lmrl.engines.hf import HFEngine
from lmrl.policy.load import open_policy
from lmrl.recipe import AgentTask
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import build_task
from lmrl.trajectories.trajectory import CONTEXT
from tests.conftest import TINY_LLAMA, save_tiny_model
from tests.serve.clients import Scripted

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "agents"
needs_openai_agents = pytest.mark.skipif(
    find_spec("agents") is None or find_spec("agents").origin is None, reason="openai-agents is not installed"
)
needs_smolagents = pytest.mark.skipif(find_spec("smolagents") is None, reason="smolagents is not installed")


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    """A tiny model with room for the prompts of frameworks."""
    folder = tmp_path_factory.mktemp("roomy")
    save_tiny_model(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == 256 and TINY_LLAMA["max_position_embeddings"] == 64
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32768}))
    return open_policy(str(folder))


def play(policy, tmp_path, program, texts=None, samples=1, **options):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"prompt": "12 * 34?", "answer": "408"}) + "\n")
    engine = HFEngine(policy) if texts is None else Scripted(policy, texts)
    task = build_task(AgentTask(agent=f"{EXAMPLES}/{program}", data=str(path), options=options), policy.tokenizer)
    return Sampler(task, engine, policy.decode).play([0], samples, Sampling(12), (0, "test"))


def check_ids(policy, trajectory):
    """The engine, given the recorded contexts, says what was recorded."""
    engine = HFEngine(policy)
    for segment in trajectory.segments:
        (scores,) = engine.score_all([segment.tokens])
        assert segment.actions and segment.turns[0] == CONTEXT
        for place in segment.actions:
            assert segment.logprobs[place] == pytest.approx(scores[place - 1], abs=1e-4)


@needs_openai_agents
def test_openai_agents_calls_a_tool(roomy, tmp_path):
    (trajectory,) = play(roomy, tmp_path, "with_openai_agents.py:calculator", ["[mul(12, 34)]<eos>", "408<eos>"])
    assert trajectory.failure is None and trajectory.reward == 1.0 and trajectory.metrics == {"items": 3.0}
    (segment,) = trajectory.segments
    text = roomy.tokenizer.decode(segment.tokens)
    assert "mul(a, b): Multiply." in text
    assert text.endswith("[assistant][mul(12, 34)]<eos>\n[tool]408<eos>\n[assistant]408<eos>")
    assert {*segment.turns} == {CONTEXT, 0, 1}


@needs_openai_agents
def test_openai_agents_tokens_are_the_engines(roomy, tmp_path):
    played = play(roomy, tmp_path, "with_openai_agents.py:calculator", samples=3)
    assert all(one.failure is None for one in played)
    for one in played:
        check_ids(roomy, one)
    again = play(roomy, tmp_path, "with_openai_agents.py:calculator", samples=3)
    assert [one.segments for one in again] == [one.segments for one in played]


@needs_openai_agents
def test_two_sub_agents_at_once(roomy, tmp_path):
    (trajectory,) = play(roomy, tmp_path, "with_openai_agents.py:committee")
    assert trajectory.failure is None and len(trajectory.segments) == 3
    check_ids(roomy, trajectory)


@needs_smolagents
def test_smolagents_code_agent(roomy, tmp_path):
    code = "<code>final_answer(12 * 34)</code><eos>"
    (trajectory,) = play(roomy, tmp_path, "with_smolagents.py:coder", [code])
    assert trajectory.failure is None and trajectory.reward == 1.0 and len(trajectory.segments) == 1


@needs_smolagents
def test_smolagents_tokens_are_the_engines(roomy, tmp_path):
    (trajectory,) = play(roomy, tmp_path, "with_smolagents.py:coder", steps=2)
    assert trajectory.failure is None and len(trajectory.turns) >= 2
    check_ids(roomy, trajectory)
