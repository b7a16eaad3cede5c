"""Several weights of Q, tried one after the other on one trained policy."""

import json

import pytest

import lmrl
from lmrl.errors import RecipeError
from tests.cli.test_cli import lmrl as command


def test_a_row_for_each_weight(ilql_run):
    report = lmrl.evaluate(ilql_run, betas=[0.0, 8.0])
    assert list(report.rows) == ["beta 0", "beta 8"]
    alone = lmrl.evaluate(ilql_run, overrides=["rollouts.beta=0"])
    assert report.rows["beta 0"] == alone.metrics != report.rows["beta 8"]
    own = lmrl.evaluate(ilql_run)  # without a weight: the one it was trained with
    assert list(own.rows) == ["policy"] and own.metrics == report.rows["beta 8"]
    assert set(json.loads(report.to_json())) == {"suite", "policy", "rows"}


def test_without_q_heads_there_is_nothing_to_weigh(tiny_folder):
    suite = ["random_walks", ["episodes=1", "samples=1"]]
    with pytest.raises(RecipeError, match="--beta weighs Q values, but .* has no Q heads: leave it out"):
        lmrl.evaluate(tiny_folder, *suite, betas=[1.0])


def test_on_the_command_line(tmp_path, ilql_run):
    done = command("eval", ilql_run, "--beta", "0,8", "--json", "scores.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "beta 0 " in done.stdout and "beta 8 " in done.stdout
    rows = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert list(rows) == ["beta 0", "beta 8"] and set(rows["beta 8"]["optimality"]) == {
        "mean",
        "ci95",
        "n",
        "clusters",
        "holds_for",
    }
    assert rows == lmrl.evaluate(ilql_run, betas=[0.0, 8.0]).rows


@pytest.mark.parametrize("text", ["1,x", "-1", "1,,2", "inf", "nan"])
def test_weights_are_numbers(text):
    from lmrl.cli.common import weights

    with pytest.raises(RecipeError, match="is not a list of weights, for instance 1,4,16,64"):
        weights(text)
    assert weights("0,4.5") == [0.0, 4.5] and weights(None) == []
