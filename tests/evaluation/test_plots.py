"""Runs as data frames, and the contents of pictures."""

import json
import shutil

import pytest

import lmrl
from lmrl.errors import RecipeError, RunError
from lmrl.evaluation.frames import load_samples
from lmrl.evaluation.frontier import BestOf, Frontier, Point
from tests.evaluation.test_paired import compared, played

pytest.importorskip("matplotlib")


@pytest.fixture
def run(tmp_path):
    """metrics.jsonl of four steps and two evaluations, the last line torn."""
    score = {"mean": 0.5, "ci95": [0.4, 0.7], "n": 8, "clusters": 8, "holds_for": "new prompts"}
    lines = [{"stage": "main", "step": 0, "kind": "eval", "reward": score | {"mean": 0.25, "ci95": [0.1, 0.3]}}]
    for step in range(1, 5):
        lines.append({"stage": "main", "step": step, "kind": "train", "reward": step / 10, "time": {"update_s": 2.0}})
    lines.append({"stage": "main", "step": 4, "kind": "eval", "reward": score})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "ma')
    return tmp_path


def test_run_is_a_data_frame(run):
    frame = lmrl.load_run(run)
    assert list(frame["kind"]) == ["eval", *["train"] * 4, "eval"]
    assert frame[frame["kind"] == "train"]["reward"].tolist() == [0.1, 0.2, 0.3, 0.4]
    last = frame.iloc[-1]
    assert (last["reward"], last["reward_low"], last["reward_high"]) == (0.5, 0.4, 0.7)
    assert frame["time/update_s"].dropna().tolist() == [2.0] * 4
    with pytest.raises(RunError, match="is not a run with metrics"):
        lmrl.load_run(run / "nothing")


def test_samples_with_unicode_line_breaks_are_kept(tmp_path):
    texts = ["a\u2028b", "a\x85b", "a\nb"]
    lines = [json.dumps({"completion": text}, ensure_ascii=False) + "\n" for text in texts]
    (tmp_path / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
    assert load_samples(tmp_path)["completion"].tolist() == texts


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["a/last", "b/last"], ["a/last", "b/last"]),
        (["a/old", "b/last"], ["old", "last"]),
        ([r"_$\foo$", "b/last"], [r" _\$\foo\$", "last"]),  # mathematics between $ would raise
    ],
)
def test_legends_tell_runs_apart_and_keep_their_names(run, names, shown):
    for name in names:
        (run / name).mkdir(parents=True)
        shutil.copy(run / "metrics.jsonl", run / name)
    figure = lmrl.plots.learning_curves([run / name for name in names])
    lmrl.plots.save(figure, run / "curves.svg")
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == shown


def test_curves_show_steps_and_evaluations(run):
    figure = lmrl.plots.learning_curves(run)
    (axes,) = figure.axes
    plain, smooth = axes.lines[:2]
    assert plain.get_ydata().tolist() == [0.1, 0.2, 0.3, 0.4] and smooth.get_xdata().tolist() == [1, 2, 3, 4]
    (bars,) = axes.containers
    assert bars.lines[0].get_ydata().tolist() == [0.25, 0.5]
    segments = bars.lines[2][0].get_segments()
    assert [part.tolist() for part in segments] == [[[0, 0.1], [0, 0.3]], [[4, 0.4], [4, 0.7]]]
    with pytest.raises(RecipeError, match="has no 'rewards' in stage 'main'; did you mean 'reward'"):
        lmrl.plots.learning_curves(run, "rewards")
    with pytest.raises(RecipeError, match="has no stage 'mian'; did you mean 'main'"):
        lmrl.plots.learning_curves(run, stage="mian")


def test_comparison_shows_every_interval():
    found = compared(played("a", 1, 2, 3), played("b", 2, 3, 5), metrics=("reward", "words"))
    figure = lmrl.plots.comparison(found)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["reward", "words"]
    for axes, one in zip(figure.axes, found.differences, strict=True):
        assert list(axes.lines[0].get_xdata()) == one.ci95 and list(axes.lines[1].get_xdata()) == [one.mean]
        assert [text.get_text() for text in axes.get_yticklabels()] == ["B - A"]


def test_frontier_shows_points_over_the_yardstick(tmp_path):
    points = [
        Point("start", 0.0, [0.0, 0.0], 0.2, [0.1, 0.3], None, 0.2, 0.0),
        Point("final", 1.0, [0.8, 1.2], 0.9, [0.7, 1.0], None, None, None),
    ]
    yard = [BestOf(1, 0.0, 0.2, [0.1, 0.3]), BestOf(2, 0.19, 0.4, [0.3, 0.5])]
    figure = lmrl.plots.frontier(Frontier("suite", "reward", "runs/a", points, yard))
    (axes,) = figure.axes
    assert list(axes.lines[0].get_ydata()) == [0.2, 0.4]
    texts = {text.get_text() for text in axes.texts}
    assert texts == {"n=2", "start", "final"}
    lmrl.plots.save(figure, tmp_path / "new" / "frontier.svg")
    assert (tmp_path / "new" / "frontier.svg").read_text().startswith("<?xml")
    with pytest.raises(RunError, match="does not name a picture"):
        lmrl.plots.save(figure, tmp_path / "frontier.txt")
