"""`lmrl compare` and tables of several policies, on tiny models."""

import json

import pytest

import lmrl
from lmrl.errors import DataError, RecipeError, RunError
from lmrl.evaluation.compare import has_logs
from lmrl.training.result import Result
from tests import forking
from tests.conftest import TINY_WALKS

SUITE = ["samples=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two checkpoints that play differently."""
    folder = tmp_path_factory.mktemp("run") / "run"
    changes = [
        *TINY_WALKS,
        "training.steps=4",
        "training.checkpoint_every=2",
        "evaluation.every=0",
        "optimizer.lr=3e-2",
    ]
    lmrl.train("random_walks/bc", changes, output=folder)
    return folder


def values(frame, policy, metric):
    return frame[frame["policy"] == policy].set_index(["group", "episode"])[metric]


def test_checkpoints_of_a_run_make_one_table(run, tmp_path):
    report = lmrl.evaluate(run, overrides=SUITE, checkpoints=["all"], log=tmp_path / "log")
    assert list(report.rows) == ["step-000002", "step-000004", "final"]
    assert report.rows["final"] == report.rows["step-000004"] == lmrl.evaluate(run, overrides=SUITE).metrics
    assert report.rows["step-000002"] == lmrl.evaluate(run, overrides=SUITE, checkpoint="step-2").metrics
    frame = lmrl.load_eval(tmp_path / "log")
    assert set(frame["policy"]) == set(report.rows) and list(json.loads(report.to_json())["rows"]) == list(report.rows)
    with pytest.raises(RecipeError, match="--checkpoint best: --checkpoints names the checkpoints already"):
        lmrl.evaluate(run, checkpoint="best", checkpoints=["all"])
    with pytest.raises(RunError, match="is not a run with checkpoints"):
        lmrl.evaluate(run / "stages" / "main" / "final", checkpoints=["all"])


def test_several_policies_play_the_suite_of_the_first(run, ilql_run):
    report = lmrl.evaluate([run, ilql_run], overrides=SUITE)
    assert list(report.rows) == [str(run), str(ilql_run)] and report.policy == f"{run}, {ilql_run}"
    assert {score["n"] for row in report.rows.values() for score in row.values()} == {
        report.rows[str(run)]["length"]["n"]
    }
    with pytest.raises(RecipeError, match="is named twice: name each once"):
        lmrl.evaluate([run, run])


def test_compared_episodes_are_paired(run, tmp_path):
    found = lmrl.compare([run], overrides=SUITE, checkpoints=["step-2", "final"], log=tmp_path / "log")
    frame = lmrl.load_eval(tmp_path / "log")
    gaps = values(frame, "final", "optimality") - values(frame, "step-2", "optimality")
    main = found.differences[0]
    assert (main.first, main.second, main.metric) == ("B", "A", "optimality") and len(gaps) == main.pairs
    assert main.mean == pytest.approx(gaps.mean()) and main.ci95[0] < main.mean < main.ci95[1]
    assert main.is_fixed and main.holds_for == "new samples of these start states"
    means = [found.rows[key]["optimality"]["mean"] for key in "BA"]
    assert main.mean == pytest.approx(means[0] - means[1])


def test_policies_and_logs_compare_alike(run, tmp_path):
    lmrl.evaluate(run, overrides=SUITE, checkpoint="step-2", log=tmp_path / "old")
    lmrl.evaluate(run, overrides=SUITE, log=tmp_path / "new")
    logs = lmrl.compare([tmp_path / "old", tmp_path / "new"])
    fresh = lmrl.compare([run], overrides=SUITE, checkpoints=["step-2", "final"])
    assert logs.differences == fresh.differences and logs.rows == fresh.rows and logs.changes == fresh.changes
    mixed = lmrl.compare([tmp_path / "old", run])
    assert mixed.differences == fresh.differences and mixed.names == {"A": str(tmp_path / "old"), "B": str(run)}
    with pytest.raises(RecipeError, match="--suite: a log already has a suite"):
        lmrl.compare([tmp_path / "old", run], "random_walks")
    lmrl.evaluate(run, overrides=[*SUITE, "seed=1"], log=tmp_path / "other")
    with pytest.raises(RunError, match=r"do not share a suite \(its version differs\)"):
        lmrl.compare([tmp_path / "old", tmp_path / "other"])
    with pytest.raises(RecipeError, match="logs are not played again: leave out --checkpoint"):
        lmrl.compare([tmp_path / "old", tmp_path / "new"], betas=[1])
    with pytest.raises(DataError, match="there is no 'runs/none' here"):  # one name, as for lmrl.evaluate
        lmrl.compare("runs/none")
    with pytest.raises(RecipeError, match=r"name policies in a list, lmrl.compare\(\['runs/a', 'runs/b'\]\)"):
        lmrl.compare("runs/a", "runs/b")
    with pytest.raises(RecipeError, match="two policies or more are needed"):
        lmrl.compare([tmp_path / "old"])


def test_what_is_no_list_of_names_is_refused(tmp_path):
    result = Result(tmp_path, {})
    for call in (lmrl.evaluate, lmrl.compare):
        for policies in (result, [result], [], None):
            with pytest.raises(RecipeError, match="^policies: expected a folder, a name, or a list of these, got "):
                call(policies)
    for name, value in (("checkpoints", "all"), ("metrics", "reward"), ("claims", "B - A > 0")):
        with pytest.raises(RecipeError, match=rf"^{name}: expected a list of texts, for instance \['.*, got '{value}'"):
            lmrl.compare([tmp_path], **{name: value})


@pytest.mark.parametrize("file", ["recipe.yaml", "config.json", None])
def test_a_run_with_a_log_inside_is_a_run(file, tmp_path):
    """`lmrl eval RUN --log RUN/scores` does not turn the run into its log, which later training leaves behind."""
    (tmp_path / "scores").mkdir()
    for one in ("scores/eval.json", *([file] if file else [])):
        (tmp_path / one).write_text("{}")
    assert has_logs(tmp_path / "scores") and has_logs(tmp_path) == (file is None)


def test_weights_of_q_are_compared(ilql_run):
    found = lmrl.compare([ilql_run], overrides=SUITE, betas=[0, 8])
    assert found.names == {"A": f"{ilql_run} beta 0", "B": f"{ilql_run} beta 8"} and found.differences[0].mean != 0


def test_exit_codes_of_the_command(run, tmp_path):
    arguments = ["compare", run, "--checkpoints", "step-2,final", *SUITE, "--json", tmp_path / "found.json"]
    done = forking.run(
        [*arguments, "--log", tmp_path / "log", "--fail-under", "B - A > -1.1", "--metric", "optimality"]
    )
    assert done.returncode == 0, done.stderr
    assert "Differences of the same samples" in done.stdout and "B - A" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["policies"] == {"A": "step-2", "B": "final"} and found["differences"][0]["metric"] == "optimality"
    done = forking.run(["compare", tmp_path / "log", "--fail-under", "B - A > 1", "--fail-under", "length: B - A < 99"])
    assert done.returncode == 1 and "lmrl: not shown: B - A > 1: on optimality, B - A is " in done.stderr
    done = forking.run(["compare", tmp_path / "log", "--fail-under", "B > A"])
    assert done.returncode == 2 and "compares no two policies" in done.stderr
