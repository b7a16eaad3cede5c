"""The reward protocol: what stops a run at once, what costs one sample, what is only counted."""

import math

import numpy as np
import pytest
import torch

from lmrl.errors import PluginError, RewardError
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.recipe import PromptTask, Reward
from lmrl.rewards.load import load_rewards
from lmrl.rewards.rewards import drop_failed, judge, score
from lmrl.rollouts.task import build_task, check_rewards
from lmrl.trajectories.trajectory import Segment, Trajectory

FILE = """
import asyncio
def length(completions, **kwargs): return [len(c) for c in completions]
def fussy(prompts, completions, answer): return [float(c == a) for c, a in zip(completions, answer)]
def scaled(completions, scale=1.0): return [scale * len(c) for c in completions]
async def slow(completions, **kwargs):
    await asyncio.sleep(0)
    return [1.0] * len(completions)
def bad_on_x(completions, **kwargs):
    if any("x" in c for c in completions): raise ValueError("no x please")
    return [2.0] * len(completions)
def odd(completions, **kwargs): return [float("nan"), float("inf"), None][: len(completions)]
def short(completions, **kwargs): return [1.0]
def number(completions, **kwargs): return 1.0
def words(completions, **kwargs): return [1.0, "good", 2.0]
class Counter:
    def __init__(self, start): self.count = start
    def __call__(self, completions, **kwargs):
        self.count += 1
        return [self.count] * len(completions)
not_a_function = 3
"""


@pytest.fixture
def rewards(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)

    def load(name, **settings):
        return load_rewards([Reward(function=f"{path}:{name}", **settings)])[0]

    return load


def batch(*completions, **columns):
    return {"prompts": ["p"] * len(completions), "completions": list(completions), **columns}


def episode(completion="abc", **columns):
    segment = Segment()
    segment.observe([1])
    segment.act([2, 3], [-1.0, -1.0], 0)
    return Trajectory([segment], "p", completion, columns=columns)


def test_plain_async_class_and_columns(rewards):
    assert score(rewards("length"), batch("a", "bbb")).values == [1.0, 3.0]
    assert score(rewards("slow"), batch("a", "b")).values == [1.0, 1.0]
    assert score(rewards("fussy"), batch("a", "b", answer=["a", "c"], unused=[1, 2])).values == [1.0, 0.0]
    assert score(rewards("scaled", options={"scale": 2}), batch("abc")).values == [6.0]
    assert score(rewards("Counter", options={"start": 4}), batch("a")).values == [5.0]


def test_arrays_and_tensors_are_lists(rewards):
    function = rewards("length")
    for result in (np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), (1, 2), [np.float32(1), torch.tensor(2.0)]):
        function.call = lambda result=result, **_: result
        assert score(function, batch("a", "b")).values == [1.0, 2.0]


def test_an_exception_costs_only_its_row(rewards):
    scores = score(rewards("bad_on_x"), batch("a", "xx", "b"))
    assert scores.values == [2.0, None, 2.0]
    assert scores.causes[1] == "mine.py:bad_on_x raised ValueError: no x please"


def test_nan_infinity_and_none_are_not_zero(rewards):
    scores = score(rewards("odd"), batch("a", "b", "c"))
    assert scores.values == [None, None, None]
    assert scores.causes == ["mine.py:odd returned nan", "mine.py:odd returned inf", "mine.py:odd returned None"]


def test_oversized_scores_are_no_scores(rewards):
    function = rewards("length")
    function.call = lambda **_: [1e301, -2e30, 1e30]
    scores = score(function, batch("a", "b", "c"))
    assert scores.values == [None, None, 1e30]
    assert scores.causes == [
        "mine.py:length returned 1e+301, larger than 1e+30",
        "mine.py:length returned -2e+30, larger than 1e+30",
        None,
    ]


@pytest.mark.parametrize("weight", [1e28, 1e308])
def test_an_oversized_sum_is_no_reward(rewards, weight):
    episodes = [episode("a" * 1000), episode("")]
    judge([rewards("length", weight=weight)], episodes)
    assert [one.reward for one in episodes] == [None, 0.0]
    assert episodes[0].failure.startswith("the weighted sum of the rewards is ")
    assert episodes[0].segments[0].rewards == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", r"mine.py:short returned 1 value for 3 rows: \[1.0\]"),
        ("number", r"mine.py:number returned 1.0 \(float\); expected a list"),
        ("words", r"mine.py:words, value 2: returned 'good' \(str\); expected a number or None"),
    ],
)
def test_wrong_shape_or_type_stops_at_once(rewards, name, message):
    with pytest.raises(RewardError, match=message):
        score(rewards(name), batch("a", "b", "c"))


def test_a_single_value_is_not_broadcast(rewards):
    assert score(rewards("short"), batch("a")).values == [1.0]
    with pytest.raises(RewardError):
        score(rewards("short"), batch("a", "b"))


def test_weighted_sum_lands_on_the_last_token(rewards):
    episodes = [episode("abc"), episode("abcd")]
    judge([rewards("length", weight=0.5), rewards("slow", weight=-1)], episodes)
    assert [one.reward for one in episodes] == [0.5, 1.0]
    assert episodes[1].components == {"length": 4.0, "slow": 1.0}
    assert episodes[1].segments[0].rewards == [0.0, 0.0, 1.0]


def test_watched_reward_cannot_cost_a_sample(rewards):
    episodes = [episode(), episode(), episode()]
    judge([rewards("length"), rewards("odd", weight=0)], episodes)
    assert [one.reward for one in episodes] == [3.0, 3.0, 3.0]
    judge([rewards("length"), rewards("odd", weight=1)], episodes)
    assert [one.reward for one in episodes] == [None, None, None]


def test_failed_samples_are_left_out_up_to_the_limit(rewards):
    episodes = [episode("ok"), episode("x"), episode("ok"), episode("ok")]
    judge([rewards("bad_on_x")], episodes)
    assert len(drop_failed(episodes, 0.25, "reward")) == 3
    with pytest.raises(
        RewardError, match=r"1 of 4.*task.max_failed=0.1 allows; first, '.*' -> 'x': mine.py:bad_on_x raised ValueError"
    ):
        drop_failed(episodes, 0.1, "reward")
    with pytest.raises(
        RewardError,
        match=r"^reward failed on every sample \(1\); first, '.*' -> 'x': .*; lmrl reward check may say how to mend it$",
    ):
        drop_failed([one for one in episodes if one.failure], 1.0, "reward")


def test_an_option_wins_over_a_column_of_its_name(rewards):
    function = rewards("scaled", options={"scale": 3})
    assert score(function, batch("ab", scale=[5])).values == [6.0]


@pytest.mark.parametrize("name", ["fussy", "lacking", "Lacking"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_parameter_without_a_column_is_refused(tmp_path, name, workers):
    (tmp_path / "mine.py").write_text(
        FILE + "def lacking(completions, *, answer, n=1, **others): ...\n"
        "class Lacking:\n    def __call__(self, prompts, completions, answer): ...\n"
    )
    rows, reward = tmp_path / "rows.jsonl", {"function": f"{tmp_path}/mine.py:{name}", "workers": workers}

    def check(row):
        rows.write_text(row + '\n{"prompt": "b"}\n')
        task = PromptTask.model_validate({"prompts": {"path": str(rows)}, "rewards": [reward]})
        if not workers:
            check_rewards(task)
        build_task(task, build_tokenizer("char", ["ab"]))

    check('{"prompt": "a", "answer": "b"}')
    with pytest.raises(RewardError, match=f"mine.py:{name} has the parameter 'answer'.*did you mean 'anwser'"):
        check('{"prompt": "a", "anwser": "b"}')


def test_rows_without_a_column_have_none_there(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "b"}\n')
    task = PromptTask.model_validate({"prompts": {"path": str(tmp_path / "rows.jsonl"), "holdout": 0}})
    environment = build_task(task, build_tokenizer("char", ["ab"])).make()
    assert environment.reset(options={"start": 1})[1]["columns"] == {"answer": None}


def test_messages_reach_the_function_as_messages(rewards):
    function = rewards("length")
    seen = {}
    function.call = lambda **arguments: seen.update(arguments) or [1.0]
    one = episode("yes", label=3)
    one.messages = [{"role": "user", "content": "hm"}]
    one.cut_turns = [0]
    judge([function], [one])
    assert seen["prompts"] == [[{"role": "user", "content": "hm"}]]
    assert seen["completions"] == [[{"role": "assistant", "content": "yes"}]]
    assert seen["label"] == [3] and seen["completion_ids"] == [[2, 3]]
    assert seen["completion_cut"] == [True]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lenght", {}, "defines no 'lenght'; did you mean 'length'"),
        ("not_a_function", {}, "is a int, not a function"),
        ("scaled", {"scal": 2}, "takes no option 'scal'"),
        ("Counter", {}, "cannot be made with these options: TypeError"),
    ],
)
def test_what_cannot_be_loaded_is_named(rewards, name, options, message):
    with pytest.raises(PluginError, match=message):
        rewards(name, options=options)


def test_trl_reward_function_works_unchanged():
    from trl.rewards import think_format_reward  # noqa: F401 - the import shows that it exists

    function = load_rewards([Reward(function="trl.rewards.think_format_reward")])[0]
    completions = [[{"role": "assistant", "content": text}] for text in ("<think>\na\n</think>\nb", "b")]
    assert score(function, {"prompts": ["p", "p"], "completions": completions}).values == [1.0, 0.0]


def test_sentiment_scores_the_completion_alone():
    function = load_rewards([Reward(function="lmrl.reward_models.sentiment.sentiment")])[0]
    good, bad, plain = score(function, batch("a wonderful, joyful film", "awful and boring", "a table")).values
    assert good > 0.5 > 0 > bad and plain == 0 and math.isfinite(bad)
