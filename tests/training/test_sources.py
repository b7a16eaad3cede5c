"""Logged data: files and scripted players."""

import gzip
import json

import pytest

from lmrl.errors import DataError, RecipeError
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.recipe import RandomWalksTask
from lmrl.rollouts.render import Renderer
from lmrl.rollouts.task import build_task
from lmrl.training.sources import Logged, play_logged, read_logged
from lmrl.trajectories.files import read_rows
from lmrl.trajectories.trajectory import CONTEXT


@pytest.fixture
def tokenizer():
    return build_tokenizer("char", ["abcdefghijklmnopqrstuvwxyz "])


def test_prompt_and_completion_rows(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "ab", "completion": "cd"}\n\n{"prompt": "x", "completion": "y"}\n')
    first, second = read_logged(str(path), "train", Renderer(tokenizer))
    assert tokenizer.decode(first.segments[0].tokens) == "abcd<eos>"
    assert first.segments[0].turns == [CONTEXT, CONTEXT, 0, 0, 0] and first.reward is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": ', r"data.jsonl, line 2: not valid JSON"),
        ('["a"]', r"data.jsonl, line 1: holds a list, expected an object"),
        ('{"prompt": "a"}', r"data.jsonl, row 1: has no field 'completion' \(fields: prompt\); expected text"),
        ('{"prompt": "a", "completion": 3}', r"row 1: field 'completion' is 3; expected text"),
        ('{"prompt": "a", "completion": ""}', r"row 1: field 'completion' is empty"),
        ("", r"holds no rows"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, tokenizer, text, message):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_logged(str(path), "train", Renderer(tokenizer))


def test_file_kinds(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("prompt,n\na,1\nb,2\n")
    for name in ("a.jsonl.gz", "a.parquet", "a.csv"):
        assert read_rows(str(tmp_path / name)) == rows
        assert read_rows(str(tmp_path / name), limit=1) == rows[:1]
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match="unknown kind of file"):
        read_rows(str(tmp_path / "a.txt"))
    (tmp_path / "broken.parquet").write_text("no")
    with pytest.raises(DataError, match="broken.parquet: cannot be read"):
        read_rows(str(tmp_path / "broken.parquet"))


def test_scripted_players_make_data(tokenizer):
    task = build_task(RandomWalksTask(environment="random_walks", graph=1000), tokenizer)
    walks = play_logged(task, "random", 50, seed=0)
    assert len(walks) == 50 and 0 < sum(walk.reward for walk in walks) < 50
    assert all(set(walk.segments[0].logprobs) == {None} for walk in walks)
    assert [walk.completion for walk in walks] == [walk.completion for walk in play_logged(task, "random", 50, seed=0)]
    assert {walk.reward for walk in play_logged(task, "optimal", 20, seed=0)} == {1.0}
    with pytest.raises(RecipeError, match=r"no player 'best' \(it has random, optimal\)"):
        play_logged(task, "best", 1, seed=0)


def test_every_logged_episode_is_used_before_any_twice(tokenizer):
    source = Logged(list(range(10)), batch_size=4, seed=0, stage="main")
    seen = [one for step in range(1, 6) for one in source.next(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert source.next(2) == seen[4:8]


def test_heldout_prompts_are_kept_out_of_logged_data(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    (kept,) = read_logged(str(path), "train", Renderer(tokenizer), without={"a"})
    assert kept.prompt == "c"
