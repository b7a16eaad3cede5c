"""The loop of task.tools: calls, their results, and the answer, in one segment."""

import json

import pytest

from lmrl.engines.base import Sampling
from lmrl.errors import PluginError
from lmrl.policy.load import open_policy
from lmrl.recipe import AgentTask
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import build_task
from lmrl.tools.functions import ToolLost
from tests.serve.clients import Scripted


def add(a: int, b: int) -> int:
    """Add."""
    return a + b


def long() -> str:
    """Long."""
    return "1" * 10**4


def lost() -> int:
    raise ToolLost("the server is gone")


def right(prompts, completions, answer, **_):
    return [float(one == text[0]["content"]) for one, text in zip(answer, completions, strict=True)]


@pytest.fixture
def section(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({"prompt": "1 + 2?", "answer": "3"}) + "\n")

    def make(**changes):
        given = {"tools": [f"{__file__}:add"], "data": str(path), "rewards": [f"{__file__}:right"]}
        return AgentTask(**given | changes)

    return make


def play(folder, section, texts):
    policy = open_policy(str(folder))
    engine = Scripted(policy, texts)
    task = build_task(section, policy.tokenizer)
    (trajectory,) = Sampler(task, engine, policy.decode).play([0], 1, Sampling(60), (0,))
    return trajectory, policy.tokenizer.decode(trajectory.segments[0].tokens)


def test_calls_results_and_answer(tiny_folder, section):
    trajectory, text = play(tiny_folder, section(), ["[add(1, 2), add(1, 'x')]<eos>", "3<eos>"])
    assert trajectory.failure is None and trajectory.reward == 1.0 and len(trajectory.segments) == 1
    assert trajectory.metrics == {"tool_calls": 2.0, "tool_errors": 1.0}
    assert "add(a, b): Add.<eos>\n[user]1 + 2?<eos>\n[assistant][add(1, 2), add(1, 'x')]<eos>\n[tool]3<eos>\n" in text
    assert "[tool]error: b: Input should be a valid integer" in text and text.endswith("[assistant]3<eos>")


def test_rounds_end_it(tiny_folder, section):
    trajectory, _ = play(tiny_folder, section(options={"rounds": 2}), ["[add(1, 2)]<eos>"] * 3)
    assert len(trajectory.turns) == 2 and trajectory.reward == 0.0 and trajectory.metrics["tool_calls"] == 1.0


def test_a_full_context_ends_it(tiny_folder, section):
    """The result of the first call does not fit; the answer is what came before the call."""
    changes = {"tools": [f"{__file__}:long"], "options": {"characters": 10**6}}
    trajectory, text = play(tiny_folder, section(**changes), ["3 [long()]<eos>", "4<eos>"])
    assert trajectory.failure is None and trajectory.reward == 1.0 and len(trajectory.turns) == 1
    assert text.endswith("[assistant]3 [long()]<eos>") and trajectory.metrics["tool_calls"] == 1.0


def test_a_question_beyond_the_context_fails(tiny_folder, section, tmp_path):
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"prompt": "1" * 10**4, "answer": "3"}) + "\n")
    policy = open_policy(str(tiny_folder))
    task = build_task(section(), policy.tokenizer)
    (played,) = Sampler(task, Scripted(policy, []), policy.decode).play([0], 1, Sampling(60), (0,))
    assert "the prompt has " in played.failure and "positions, but the model has" in played.failure


def test_a_template_that_refuses_results_fails_it(tiny_folder, section):
    policy = open_policy(str(tiny_folder))
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content == '3' %}{{ raise_exception('no results') }}{% endif %}{{ m.content }}<eos>"
        "{% endfor %}"
    )
    task = build_task(section(), policy.tokenizer)
    engine = Scripted(policy, ["3 [add(1, 2)]<eos>"])
    (played,) = Sampler(task, engine, policy.decode).play([0], 1, Sampling(60), (0,))
    assert "no results" in played.failure and played.reward is None


def test_a_lost_tool_fails_the_episode(tiny_folder, section):
    trajectory, _ = play(tiny_folder, section(tools=[f"{__file__}:lost"]), ["[lost()]<eos>", "3<eos>"])
    assert trajectory.failure == "agent raised ToolLost: the server is gone" and trajectory.reward is None


def test_system_message_and_column(tiny_folder, section):
    options = {"system": "Be exact.", "prompt": "answer"}
    _, text = play(tiny_folder, section(options=options), ["3<eos>"])
    assert text.startswith("[system]Be exact.\n\nTo call a tool") and "[user]3<eos>" in text


def test_a_question_that_is_no_text_is_named(tiny_folder, section, tmp_path):
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"prompt": 12, "answer": "3"}) + "\n")
    policy = open_policy(str(tiny_folder))
    task = build_task(section(), policy.tokenizer)
    (played,) = Sampler(task, Scripted(policy, []), policy.decode).play([0], 1, Sampling(60), (0,))
    assert "the row's 'prompt' (task.options.prompt) is 12; expected text or messages" in played.failure


def test_mistakes(tiny_folder, section):
    tokenizer = open_policy(str(tiny_folder)).tokenizer
    with pytest.raises(PluginError, match="the loop of task.tools has prompt, system, rounds"):
        build_task(section(options={"round": 2}), tokenizer)
    with pytest.raises(PluginError, match="task.options.rounds: Input should be greater than or equal to 1"):
        build_task(section(options={"rounds": 0}), tokenizer)
    with pytest.raises(PluginError, match="task.options.seconds: expected a number, got the text '5'"):
        build_task(section(options={"seconds": "5"}), tokenizer)
    with pytest.raises(ValueError, match="nothing judges it"):
        section(rewards=[])
