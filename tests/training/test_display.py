"""How scores are written for people."""

import io

from rich.console import Console

from lmrl.training.display import Display, interval, scope_of, score_lines, short


def test_interval_near_a_limit_shows_both_ends():
    assert interval({"mean": 2.0, "ci95": [1.5, 2.5]}) == "2.000 ± 0.500"
    assert interval({"mean": 0.0, "ci95": [0.0, 0.161]}) == "0.000 [0.000, 0.161]"
    assert interval({"mean": 5.0, "ci95": [5.0, 5.0], "holds_for": "new prompts"}) == "5.000 ± 0.000"
    assert interval({"mean": 5.0, "ci95": [5.0, 5.0]}) == "5.000"  # known and not estimated
    one = {"mean": 5.0, "ci95": [5.0, 5.0], "n": 1, "holds_for": "new runs"}
    assert interval(one) == "5.000"  # nothing is known of the spread, which is not a spread of 0


def test_small_scores_keep_two_digits_of_their_error():
    assert interval({"mean": 0.0025351, "ci95": [0.0023518, 0.0027184]}) == "0.00254 ± 0.00018"
    assert interval({"mean": 0.0, "ci95": [0.0, 0.0016]}) == "0.00000 [0.00000, 0.00160]"
    assert interval({"mean": -0.0012, "ci95": [-0.0012, -0.0012]}) == "-0.0012"
    assert interval({"mean": 0.3, "ci95": [0.3 - 1e-16, 0.3 + 1e-16], "holds_for": "x"}) == "0.300 ± 0.000"  # rounding


def test_large_numbers_keep_the_digits_before_the_point():
    assert [short(value) for value in (8024.8, -8018.4, 999.7, 0.0012345)] == ["8025", "-8018", "1000", "0.00123"]
    assert short(1.5e30) == "1.5e+30"


def test_table_says_in_one_line_what_its_intervals_hold_for():
    score = {"mean": 2.0, "ci95": [1.5, 2.5], "n": 8, "clusters": 4, "holds_for": "new samples of these start states"}
    stream = io.StringIO()
    Display(Console(file=stream, width=40)).table("Result", {"PPO": {"return": score}})
    assert "95 % intervals hold for new samples of these start states\n" in stream.getvalue()


def test_scope_names_rows_that_differ():
    def score(scope):
        return {"return": {"mean": 1.0, "ci95": [0.0, 2.0], "n": 3} | ({"holds_for": scope} if scope else {})}

    assert scope_of({"start": score("new prompts"), "PPO": score("new prompts")}) == "new prompts"
    these = score("new samples of these start states")
    rows = {"data": score("new start states"), "PPO, best": these, "PPO": these, "old": score(None)}
    assert scope_of(rows) == "new start states (data); new samples of these start states (PPO, best / PPO)"
    assert scope_of({"old": score(None)}) == ""


def test_many_metrics_stand_below_each_other():
    score = {"mean": 0.25, "ci95": [0.125, 0.375], "n": 8, "clusters": 4, "holds_for": "new prompts"}
    stream = io.StringIO()
    rows = {label: {f"metric{number}": score for number in range(12)} for label in ("first", "second")}
    Display(Console(file=stream, width=60)).table("Result", rows)
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert ["│", "metric11", "│", "0.250", "±", "0.125", "│", "0.250", "±", "0.125", "│"] in lines
    assert ["│", "n", "│", "8", "│", "8", "│"] in lines


def test_another_number_of_values_is_shown_beside_its_score():
    reward, pass_at = ({"mean": 0.5, "ci95": [0.25, 0.75], "n": n} for n in (186, 31))
    head, line = score_lines({"a": {"reward": reward, "pass@4": pass_at, "length": reward}})
    assert head == ["", "reward", "pass@4", "length", "n"]
    assert line == ["a", "0.500 ± 0.250", "0.500 ± 0.250 (n 31)", "0.500 ± 0.250", "186"]


def test_names_in_brackets_and_emoji_codes_are_shown_as_they_are():
    score = {"mean": 2.0, "ci95": [1.5, 2.5], "n": 8, "clusters": 4, "holds_for": "new prompts"}
    display = Display()
    with display.console.capture() as captured:
        display.table("runs/a[1] :smile:", {"[b]run[/b]": {"won[left]": score}})
    assert all(text in captured.get() for text in ("runs/a[1] :smile:", "[b]run[/b]", "won[left]"))
