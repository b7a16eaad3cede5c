"""Judges of pairs in both orders, by hand: win rates, ties, and the bias of what is shown first."""

import json

import pytest
from typer.testing import CliRunner

import lmrl
from lmrl import cli
from lmrl.errors import PluginError, RecipeError, RewardError
from lmrl.evaluation.judging import Judge, judge_pair, load_judge
from lmrl.evaluation.paired import Played
from lmrl.evaluation.t_distribution import upper_tail
from lmrl.rewards.workers import Failure
from lmrl.trajectories.trajectory import Trajectory
from tests.reward_models.test_judge import endpoint

CODE = '''
def longer(prompts, first, second, wanted=None, **columns):
    return [float(len(a) > len(b)) for a, b in zip(first, second)]

def lazy(first, second):
    return [1.0 for _ in first]

def length(completions, **columns):
    return [float(len(text)) for text in completions]

def shy(prompts, first, second):
    return [None if prompt == "p0" else 1.0 for prompt in prompts]

def loud(first, second):
    return [2.0 for _ in first]

class Biased:
    """Prefers the longer, but the first where they differ by less than `margin`."""

    def __init__(self, margin: int = 0):
        self.margin, self.asked = margin, 0

    def __call__(self, completions):
        raise AssertionError

    def prefers(self, prompts, first, second):
        return [float(len(a) > len(b) - self.margin) for a, b in zip(first, second)]
'''


@pytest.fixture
def judges(tmp_path):
    (tmp_path / "judges.py").write_text(CODE)
    return lambda name, **options: load_judge(f"{tmp_path / 'judges.py'}:{name}", options)


def played(key, *answers):
    episodes = [
        Trajectory([], f"p{number}", text, components={"r": 0.0}, group=number, episode=number, columns={"wanted": "x"})
        for number, text in enumerate(answers)
    ]
    return Played(key, episodes, key=key)


A, B = played("A", "one", "three", "same", "ab"), played("B", "eleven", "two", "same", "abc")


def test_wins_and_losses_by_hand(judges):
    # B is longer on prompts 0 and 3, shorter on 1, equal on 2, which is not asked.
    found = judge_pair(judges("longer"), B, A)
    assert (found.first, found.second, found.wins, found.ties, found.losses) == ("B", "A", 2, 1, 1)
    assert found.win_rate == (1 + 0 + 0.5 + 1) / 4 and found.pairs == 4
    assert found.position == 0.5


def test_a_judge_that_only_sees_position_ties(judges):
    found = judge_pair(judges("lazy"), B, A)
    assert (found.wins, found.ties, found.losses, found.win_rate, found.p) == (0, 4, 0, 0.5, 1.0)
    assert found.position == 1.0 and found.position_ci95[0] > 0.1  # three pairs


def test_bias_on_close_pairs_is_a_tie_and_is_reported(judges):
    # Lengths 3:6, 5:3, 2:3. With a margin of 3, the first wins where it is less than 3 shorter: on prompts 1 and 3 in both orders.
    found = judge_pair(judges("Biased", margin=3), B, A)
    assert (found.wins, found.ties, found.losses) == (1, 3, 0)
    assert found.position == pytest.approx((0.5 + 1 + 1) / 3)


def test_wins_are_of_both_orders_however_sure_the_judge_is():
    """Pairs that are judged 0.9 and 0.8, 0.9 and 0.2, 1 and 0.5 in the two orders: only the second is the same in both."""
    orders = iter([[0.9, 0.9, 1.0], [0.8, 0.2, 0.5]])
    found = judge_pair(Judge("unsure", lambda *_: next(orders), True), B, A)
    assert (found.wins, found.ties, found.losses) == (1, 3, 0)
    assert found.win_rate == pytest.approx((0.55 + 0.85 + 0.75 + 0.5) / 4)


def test_a_reward_scores_each_answer_alone(judges):
    found = judge_pair(judges("length"), B, A)
    assert (found.wins, found.ties, found.losses) == (2, 1, 1) and found.position is None


def test_p_agrees_with_the_interval():
    """9 of 10 pairs won in both orders: effective number 9, degrees of freedom 9; t = 0.4 sqrt(9 / 0.25) = 2.4."""
    many = [played(key, *(f"{key}{number}" for number in range(10))) for key in "AB"]

    def wins(one, other):
        return [float((a.completion[0] == "B") != (a.group == 9)) for a in one]

    found = judge_pair(Judge("sure", wins, True), *reversed(many))
    assert found.win_rate == 0.9 and found.p == pytest.approx(2 * upper_tail(2.4, 9))
    assert found.p < 0.05 and found.ci95[0] > 0.5


def test_too_many_failures_are_an_error(judges):
    many = [played(key, *(f"{key}{number}" for number in range(20))) for key in "AB"]
    found = judge_pair(judges("shy"), *many)
    assert (found.failed, found.pairs) == (1, 19)
    with pytest.raises(RewardError, match="gave no answer on 1 of 3 pairs; the first: returned None"):
        judge_pair(judges("shy"), B, A)


def test_a_silent_judge_is_asked_one_block_once():
    many, seen = [played(key, *(f"{key}{number}" for number in range(100))) for key in "AB"], []

    def silent(one, other):
        seen.extend(one)
        return [Failure("timed out")] * len(one)

    said = "no answer on 8 of 8 pairs; the other 92 were not asked; the first: timed out"
    with pytest.raises(RewardError, match=said):
        judge_pair(Judge("mute", silent, True), *many)
    assert len(seen) == 8


def test_a_prompt_that_cannot_be_judged_stops_nothing(judges):
    """Eight samples of each of twelve prompts; the judge never answers the first prompt."""
    many = []
    for key in "AB":
        one = played(key, *(f"{key}{number}" for number in range(96)))
        for number, episode in enumerate(one.trajectories):
            episode.group, episode.prompt = number // 8, f"p{number // 8}"
        many.append(one)
    found = judge_pair(judges("shy"), *many)
    assert (found.failed, found.pairs) == (8, 88)


def test_a_judge_that_falls_silent_is_not_asked_on():
    """Of 100 pairs 10 may fail. Pairs 0 to 7 and 8 to 23 are answered in both orders, 24 to 55 in the first alone."""
    many, seen = [played(key, *(f"{key}{number}" for number in range(100))) for key in "AB"], []

    def tired(one, other):
        seen.extend(one)
        return [1.0 if len(seen) <= 80 else Failure("timed out") for _ in one]

    with pytest.raises(RewardError, match="no answer on 32 of 56 pairs; the other 44 were not asked"):
        judge_pair(Judge("tired", tired, True), *many)
    assert len(seen) == 2 * 56


def test_answers_out_of_range_are_an_error(judges):
    with pytest.raises(RewardError, match="answered 2.0; expected a number from 0"):
        judge_pair(judges("loud"), B, A)


def test_judge_behind_an_address(judges):
    with endpoint(
        lambda text: "Better: A" if "eleven" in text.split("[Answer A]")[1].split("[Answer B]")[0] else "B"
    ) as (url, seen):
        found = judge_pair(load_judge(f"{url}#some-model"), B, A)
    assert found.judge == "some-model" and len(seen) == 6 and seen[0][2]["model"] == "some-model"
    assert (found.wins, found.ties, found.losses) == (1, 3, 0)
    assert found.position == pytest.approx((0.5 + 0 + 0) / 3)


def test_mistakes_are_named(judges):
    with pytest.raises(RecipeError, match="names no model: append it to the address"):
        load_judge("http://127.0.0.1:1/v1")
    with pytest.raises(PluginError, match="takes no option 'margins'; did you mean 'margin'"):
        judges("Biased", margins=1)


def test_command_judges_logs(judges, tiny_folder, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(5)))
    judge = f"{tmp_path / 'judges.py'}"
    (tmp_path / "suite.yaml").write_text(
        f"task:\n  prompts: {{path: prompts.jsonl}}\n  rewards: ['{judge}:length']\nrollouts: {{max_new_tokens: 6}}\nmetrics: [reward]\n"
    )
    for name, changes in (("a", []), ("b", ["rollouts.max_new_tokens=6"])):
        lmrl.evaluate(tiny_folder, tmp_path / "suite.yaml", changes, log=tmp_path / name)
    arguments = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--judge", f"{judge}:Biased"]
    arguments += ["--judge-option", "margin=2", "--json", str(tmp_path / "out.json")]
    shown = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "250"})
    assert shown.exit_code == 0, shown.output
    assert "each pair in both orders" in shown.output and "B over A" in shown.output
    (found,) = json.loads((tmp_path / "out.json").read_text())["judged"]
    assert found["win_rate"] == 0.5 and found["ties"] == 5  # the same policy gives the same answers
    arguments[4:] = [f"{judge}:loud", "--json", str(tmp_path / "kept.json")]
    log = tmp_path / "b" / "samples.jsonl"
    log.write_text(log.read_text().replace('"action": "', '"action": "+'))
    shown = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "250"})
    assert isinstance(shown.exception, RewardError)
    assert "Differences of the same samples" in shown.output  # the rest is not lost
    assert json.loads((tmp_path / "kept.json").read_text())["differences"]
    shown = CliRunner().invoke(cli.app, ["compare", "a", "b", "--judge-option", "x=1"])
    assert shown.exit_code != 0
