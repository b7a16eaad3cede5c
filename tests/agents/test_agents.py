"""Agent tasks: a program's calls to the policy become trajectories, token by token."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import lmrl
from lmrl.cli import app
from lmrl.engines.base import Sampling
from lmrl.engines.hf import HFEngine
from lmrl.engines.remote import byte_tokenizer
from lmrl.errors import EpisodeError, PluginError, RecipeError
from lmrl.policy.load import open_policy
from lmrl.recipe import AgentTask
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import build_task
from lmrl.trajectories.trajectory import CONTEXT

PROGRAMS = Path(__file__).parent / "programs.py"
SAMPLING = Sampling(8)


@pytest.fixture(scope="module")
def policy(tiny_folder):
    return open_policy(str(tiny_folder))


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "tasks.jsonl"
    lines = [json.dumps({"question": f"question {number}", "number": number}) for number in range(6)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def play(policy, rows, program, starts=(0, 1), samples=1, **settings):
    agent = {} if "agent_command" in settings else {"agent": f"{PROGRAMS}:{program}"}
    task = build_task(AgentTask(**agent, data=rows, **settings), policy.tokenizer)
    sampler = Sampler(task, HFEngine(policy), policy.decode)
    return sampler.play(list(starts), samples, SAMPLING, (0, "test"))


def check_tokens(policy, trajectory):
    """What was recorded is what the model says of these tokens."""
    engine = HFEngine(policy)
    for segment in trajectory.segments:
        (scores,) = engine.score_all([segment.tokens])
        assert segment.turns[0] == CONTEXT and segment.actions
        for position in segment.actions:
            assert segment.logprobs[position] == pytest.approx(scores[position - 1], abs=1e-4)


def test_a_call_is_recorded_to_the_token(policy, rows):
    played = play(policy, rows, "one_turn", samples=2)
    assert [one.episode for one in played] == [0, 1, 2, 3] and [one.group for one in played] == [0, 0, 1, 1]
    renderer = build_task(AgentTask(agent=f"{PROGRAMS}:one_turn", data=rows), policy.tokenizer).renderer
    for trajectory in played:
        assert trajectory.failure is None
        (segment,) = trajectory.segments
        first = segment.actions[0]
        assert segment.tokens[:first] == renderer.first(trajectory.messages) and len(segment.actions) <= 6
        text = policy.decode(segment.tokens[first:])
        assert trajectory.turns[0].action == text and trajectory.reward == len(text) / 10
        assert segment.rewards[-1] == trajectory.reward
        check_tokens(policy, trajectory)
    assert len({tuple(one.segments[0].tokens) for one in played}) == 4
    again = play(policy, rows, "one_turn", samples=2)
    assert [one.segments for one in again] == [one.segments for one in played]


def test_turns_join_one_segment(policy, rows):
    for trajectory in play(policy, rows, "three_turns"):
        (segment,) = trajectory.segments
        assert sorted({turn for turn in segment.turns if turn != CONTEXT}) == [0, 1, 2]
        assert trajectory.reward == 1.5 and trajectory.metrics == {"turns": 3.0}
        text = policy.tokenizer.decode(segment.tokens)
        assert "[user]turn 0<eos>\n[assistant]" in text and "[user]turn 1<eos>\n[assistant]" in text
        assert [turn.observation for turn in trajectory.turns[1:]] == [
            [{"role": "user", "content": "turn 0"}],
            [{"role": "user", "content": "turn 1"}],
        ]
        check_tokens(policy, trajectory)


def test_rewritten_history_begins_a_segment(policy, rows):
    (trajectory,) = play(policy, rows, "forgetful", starts=[0])
    joined, summary, branch = trajectory.segments
    assert [sorted({*one.turns} - {CONTEXT}) for one in trajectory.segments] == [[0, 1], [2], [3]]
    assert "a summary" in policy.tokenizer.decode(summary.tokens)
    # The branch holds the tokens of the first answer as they were sampled, as context.
    end = max(place for place, turn in enumerate(joined.turns) if turn == 0) + 1
    assert branch.tokens[:end] == joined.tokens[:end] and set(branch.turns[:end]) == {CONTEXT}
    assert trajectory.segments[-1].rewards[-1] == 1.0
    check_tokens(policy, trajectory)


def test_sub_agents_are_segments(policy, rows):
    (trajectory,) = play(policy, rows, "sub_agents", starts=[0])
    *subs, main = trajectory.segments
    assert len(subs) == 2 and "main question 0" in policy.tokenizer.decode(main.tokens)
    assert [turn for one in trajectory.segments for turn in dict.fromkeys(one.turns) if turn != CONTEXT] == [*range(6)]
    check_tokens(policy, trajectory)
    (again,) = play(policy, rows, "sub_agents", starts=[0])
    assert again.segments == trajectory.segments


def test_text_prompts_continue_in_their_tokens(policy, rows):
    (trajectory,) = play(policy, rows, "texts", starts=[2])
    check_tokens(policy, trajectory)
    ended = [turn for turn in trajectory.turns if "eos" in turn.action]
    if not ended and all(policy.tokenizer.eos_token_id not in one.tokens for one in trajectory.segments):
        assert len(trajectory.segments) == 1
        assert policy.tokenizer.decode(trajectory.segments[0].tokens).count(" then ") == 2


def test_failures_are_data(policy, rows):
    played = play(policy, rows, "odd_ones_fail", starts=range(6), call_timeout=8, max_calls=20, max_failed=0.9)
    failures = [one.failure for one in played]
    assert failures[0] is None and failures[5] is None
    assert failures[1] == "agent raised RuntimeError: out of luck, ***"
    assert "agent returned no reward" in failures[2]
    assert failures[3] == "agent timed out after 8 s (task.call_timeout)"
    assert failures[4] == "agent requested more than task.max_calls=20 answers"
    assert [one.reward for one in played] == [1.0, None, None, None, None, 1.0]
    assert all(one.segments for one in played)  # what was said before is kept
    task = build_task(AgentTask(agent=f"{PROGRAMS}:odd_ones_fail", data=rows), policy.tokenizer)
    with pytest.raises(EpisodeError, match="agent failed on 4 of 6 samples"):
        task.keep_judged(played)
    (quiet,) = play(policy, rows, "silent", starts=[0])
    assert "has sent no request to the policy" in quiet.failure


@pytest.mark.parametrize("program", ["wrapped", "run_to_its_end"])
def test_a_decorated_async_function_is_awaited(policy, rows, program):
    (played,) = play(policy, rows, program, starts=[0])
    assert played.failure is None and played.reward == 1.0


@pytest.mark.parametrize(
    ("program", "cause"),
    [
        ("not_awaited", "raised TypeError: it returned a coroutine that nothing awaits: write `async def`"),
        ("oversized", r"raised ValueError: 'reward' is 1e\+301; expected at most 1e\+30 in size"),
        ("in_a_group", "'messages' is missing or empty"),
        ("exits_in_a_task", "raised SystemExit: 0"),
        ("impatient", "has (waited for no answer of|sent no request to) the policy"),  # by client
    ],
)
def test_what_is_no_reward_fails_with_its_cause(policy, rows, program, cause):
    (played,) = play(policy, rows, program, starts=[0])
    assert played.reward is None and re.search(cause, played.failure)


def test_a_plain_function_over_its_limit_is_abandoned(policy, rows):
    (trajectory,) = play(policy, rows, "slow", starts=[0], call_timeout=0.7)
    assert trajectory.failure == "agent timed out after 0.7 s (task.call_timeout)"


def test_reward_functions_judge_what_is_returned(policy, rows):
    (trajectory,) = play(policy, rows, "answer", starts=[3], rewards=[f"{PROGRAMS}:length"])
    assert trajectory.reward == len(trajectory.completion) + 3 and trajectory.components == {
        "length": trajectory.reward
    }
    (refused,) = play(policy, rows, "one_turn", starts=[3], rewards=[f"{PROGRAMS}:length"])
    assert "agent returned a reward, but task.rewards judges" in refused.failure and refused.reward is None


def test_commands_in_any_language(policy, rows, tmp_path):
    script = tmp_path / "agent.py"
    script.write_text(command_text())
    settings = {"agent_command": [sys.executable, str(script)], "call_timeout": 20}
    fine, failed = play(policy, rows, "", starts=[0, 1], **settings)
    assert fine.reward == 0.5 and fine.metrics == {"characters": len(fine.turns[0].action)}
    check_tokens(policy, fine)
    assert failed.failure == "agent raised ProgramFailed: the command ended with exit code 1: gave up"
    (late,) = play(policy, rows, "", starts=[2], **settings | {"call_timeout": 6})
    assert late.failure == "agent timed out after 6 s (task.call_timeout)"
    left = subprocess.run(["pgrep", "-f", "time.sleep(77)"], capture_output=True, text=True)
    assert not left.stdout  # its children are gone as well


def test_a_command_ends_without_its_children(policy, rows, tmp_path):
    script = tmp_path / "agent.py"
    script.write_text(command_text())
    command = ["sh", "-c", f"'{sys.executable}' '{script}'; sleep 78 & echo 0.25"]
    (played,) = play(policy, rows, "", starts=[0], agent_command=command, call_timeout=60)
    assert played.failure is None and played.reward == 0.25
    assert not subprocess.run(["pgrep", "-f", "sleep 78"], capture_output=True, text=True).stdout


def command_text():
    text = PROGRAMS.read_text()
    return text[text.index('COMMAND = """') + 13 :].rpartition('"""')[0]


def test_mistakes_are_found_before_a_run(policy, rows, tmp_path):
    with pytest.raises(PluginError, match="cannot be called with a row"):
        build_task(AgentTask(agent=f"{PROGRAMS}:one_turn", data=rows, options={"a": 1}), policy.tokenizer)
    with pytest.raises(PluginError, match="is not a program on this machine"):
        build_task(AgentTask(agent_command=["no-such-program"], data=rows), policy.tokenizer)
    with pytest.raises(ValueError, match="one of `agent`, `agent_command` and `tools`"):
        AgentTask(data=rows)


def test_programs_need_a_loaded_policy(rows):
    task = build_task(AgentTask(agent=f"{PROGRAMS}:one_turn", data=rows), byte_tokenizer())
    engine = SimpleNamespace(policy=object())
    with pytest.raises(RecipeError, match="an address gives only text"):
        Sampler(task, engine, None).play([0], 1, SAMPLING, (0,))


RECIPE = """
model: {path: MODEL}
task: {agent: "PROGRAMS:three_turns", data: tasks.jsonl, holdout: 0.34, options: {turns: 2}}
rollouts: {prompts: 2, samples: 2, max_new_tokens: 5}
objective: {name: OBJECTIVE}
training: {steps: 2, threads: 1}
"""


@pytest.mark.parametrize("objective", ["grpo", "ppo"])
def test_a_run_learns_from_programs(tiny_folder, rows, tmp_path, objective):
    recipe = tmp_path / "mine.yaml"
    text = RECIPE.replace("MODEL", str(tiny_folder)).replace("PROGRAMS", str(PROGRAMS)).replace("OBJECTIVE", objective)
    recipe.write_text(text)
    lmrl.train(recipe, output=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "turns" in line]
    assert steps and all(line["turns"] == 2.0 and line["reward"] == 1.5 for line in steps)
    exported = tmp_path / "exported"
    done = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(exported)], catch_exceptions=False)
    card = (exported / "README.md").read_text()
    assert done.exit_code == 0 and "programs.py:three_turns`" in card and "tasks.jsonl" in card


@pytest.mark.parametrize(("objective", "program"), [("ilql", "forgetful"), ("dpo", "one_turn")])
def test_collected_calls_teach_offline(tiny_folder, rows, tmp_path, objective, program):
    task = [f"task.agent={PROGRAMS}:{program}", f"task.data={rows}"]
    folder = tmp_path / "log"
    arguments = ["collect", str(tiny_folder), *task, "--episodes", "12", "--output", str(folder)]
    arguments += ["rollouts.samples=4", "rollouts.max_new_tokens=6"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "12 episodes" in done.output
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"model: {{path: {tiny_folder}}}\n"
        f"task: {{agent: '{PROGRAMS}:{program}', data: {rows}}}\n"
        f"source: {{name: dataset, path: {folder}, batch_size: 2}}\n"
        f"objective: {{name: {objective}}}\ntraining: {{steps: 2, threads: 1}}\nevaluation: {{every: 0, suite: null}}\n"
    )
    lmrl.train(recipe, output=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
