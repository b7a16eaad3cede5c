"""Episodes on disk: exact round trips, lazy reading, malformed rows, files of rows."""

import gzip
import json
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest

from lmrl.errors import DataError, RecipeError, RunError
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.recipe.files import load_recipe
from lmrl.rollouts.task import task_texts
from lmrl.trajectories.files import Selection, open_rows, read_rows
from lmrl.trajectories.readers import JsonLines
from lmrl.trajectories.recorder import Recorder
from lmrl.trajectories.render import Renderer
from lmrl.trajectories.rows import fingerprint, prompt_of, to_row
from lmrl.trajectories.store import DatasetFile, EpisodeWriter, dataset_texts, read_episodes, write_episodes
from lmrl.trajectories.trajectory import Trajectory


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What `datasets` unpacks stays in the test's folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer():
    return build_tokenizer("char", ["abcdefghijklmnopqrstuvwxyz 0123456789"])


@pytest.fixture
def episodes(tokenizer):
    """Twenty episodes of one to three turns with odd numbers, some truncated, some dialogues, one failed."""
    made = []
    for number in range(20):
        trajectory = Trajectory([], "", "", group=number // 2, episode=number, player="me")
        recorder = Recorder(trajectory, Renderer(tokenizer), "all" if number % 3 else 1)
        for turn in range(number % 3 + 1):
            recorder.observe(f"{number}")
            recorder.act("ab", [2, 5 + turn, 1], [-1 / 3, float("-inf"), -0.1 * number], cut=turn == 1)
            trajectory.place_reward(0.1 * turn + 1 / 7, turn)
        trajectory.completion = "\n".join(["ab", *([f"{number}", "ab"] * (number % 3))])
        trajectory.reward = sum(turn.reward for turn in trajectory.turns)
        trajectory.metrics, trajectory.components = {"m": 1 / 3, "n": 2.0}, {"r": None, "s": 0.1}
        if number % 4 == 1:
            recorder.truncate("next")
        if number == 6:
            trajectory.messages = trajectory.turns[0].observation = [{"role": "user", "content": "6"}]
        if number == 7:
            trajectory.reward, trajectory.failure = None, "environment raised ValueError: x"
        made.append(trajectory)
    return made


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---------------------------------------------------------------------------------------------------------- round trips
@pytest.mark.parametrize("name", ["buffer.jsonl", "buffer.parquet"])
def test_a_buffer_is_restored_exactly(tmp_path, tokenizer, episodes, name):
    path = tmp_path / name
    write_episodes(path, episodes, tokenizer)
    assert read_episodes(path, tokenizer) == episodes
    write_episodes(path, [], tokenizer)
    assert read_episodes(path, tokenizer) == []
    write_episodes(path, episodes[:1], tokenizer)
    with pytest.raises(DataError, match="tokens of another tokenizer"):
        read_episodes(path, build_tokenizer("char", ["a"]))


@pytest.mark.parametrize("name", ["folder", "file.jsonl"])
def test_written_episodes_are_read_lazily_in_any_order(tmp_path, tokenizer, episodes, name):
    path = tmp_path / name
    with EpisodeWriter(path, fingerprint(tokenizer), shard_episodes=6) as writer:
        for first in range(0, 20, 5):
            writer.write(episodes[first : first + 5])
    if name == "folder":
        assert [shard.name for shard in sorted(path.iterdir())] == [f"data-0000{number}.parquet" for number in range(4)]
    file = DatasetFile(str(path), Renderer(tokenizer))
    kept = [episode for episode in episodes if not episode.failure]
    assert file.notes == [f"{path}: left out 1 episode that failed when played"]
    assert len(file) == 19 and file.returns == [episode.reward for episode in kept]
    for index in (18, 0, 7, 12, 6):
        assert file[index] == kept[index]
    assert list(file.measures["m"]) == [1 / 3] * 19 and set(file.measures) == {"m", "n", "s"}
    assert file.rows.where(13) == (f"{path / 'data-00002.parquet'}, row 2" if name == "folder" else f"{path}, line 14")


def test_a_finished_shard_is_readable_whatever_happens_next(tmp_path, tokenizer, episodes):
    with pytest.raises(KeyboardInterrupt), EpisodeWriter(tmp_path / "out", shard_episodes=4) as writer:
        writer.write(episodes[:5])
        assert len(open_rows(str(tmp_path / "out"))) == 4
        raise KeyboardInterrupt
    assert len(open_rows(str(tmp_path / "out"))) == 5


def test_a_full_disk_leaves_no_unfinished_shard(tmp_path, episodes, monkeypatch):
    def fill_up(path, rows):
        path.write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lmrl.trajectories.store.write_parquet", fill_up)
    with pytest.raises(OSError, match="No space"), EpisodeWriter(tmp_path / "out") as writer:
        writer.write(episodes[:1])
    assert not list((tmp_path / "out").iterdir())


def test_destinations(tmp_path, episodes):
    for name in ("out", "out.jsonl"):
        with EpisodeWriter(tmp_path / name) as writer:
            writer.write(episodes)
        with pytest.raises(RunError, match="exists: choose another destination, or overwrite it with --force"):
            EpisodeWriter(tmp_path / name)
        with EpisodeWriter(tmp_path / name, force=True) as writer:
            writer.write(episodes[:2])
        assert len(open_rows(str(tmp_path / name))) == 2
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "thesis.txt").write_text("dear")
    with pytest.raises(RunError, match="holds files other than episodes"):
        EpisodeWriter(tmp_path / "mixed", force=True)
    with pytest.raises(RunError, match="expected a folder"):
        EpisodeWriter(tmp_path / "a.parquet")
    with EpisodeWriter(tmp_path / "nothing"):
        pass
    assert not (tmp_path / "nothing").exists()


# ------------------------------------------------------------------------------------------------------------- malformed
GOOD, BAD = {"prompt": "a", "completion": "b", "reward": 1}, {"prompt": "a", "completion": "b", "reward": float("nan")}


def test_a_malformed_row_stops_with_its_place(tmp_path, tokenizer):
    path = lines(tmp_path / "data.jsonl", [GOOD, BAD])
    with pytest.raises(DataError, match="data.jsonl, line 2: field 'reward' holds nan; expected a finite number"):
        DatasetFile(path, Renderer(tokenizer))
    rows = [{"messages": [{"role": "user", "content": "a"}], "reward": 1.0}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    with pytest.raises(DataError, match="data.parquet, row 1: field 'messages' has no assistant message"):
        DatasetFile(str(tmp_path / "data.parquet"), Renderer(tokenizer))


def test_a_column_named_group_may_hold_anything(tmp_path, tokenizer):
    rows = [GOOD | {"group": [1]}, GOOD | {"group": [1]}, GOOD | {"group": {"a": 2}}]
    first, second, third = DatasetFile(lines(tmp_path / "data.jsonl", rows), Renderer(tokenizer)).groups
    assert first == second != third


def test_a_stored_action_needs_a_state(tmp_path, tokenizer, episodes):
    """With state -1 it would be predicted from the segment's last token."""
    path = tmp_path / "data.jsonl"
    write_episodes(path, episodes[1:3], tokenizer)
    first, second = map(json.loads, path.read_text().splitlines())
    second["segments"][0] = {name: values[1:] for name, values in second["segments"][0].items()}
    second["segments"][0]["turns"][0] = 0
    with pytest.raises(
        DataError, match="data.jsonl, line 2: field 'segments', segment 0 has no context before its first"
    ):
        DatasetFile(lines(path, [first, second]), Renderer(tokenizer))


def test_malformed_rows_are_counted_and_kept_aside(tmp_path, tokenizer):
    path, report = tmp_path / "data.jsonl", tmp_path / "bad_rows.jsonl"
    path.write_bytes(
        b'\n{"prompt": "a", "completion": "b"}\n{"prompt": \n[1]\n{"prompt": "\xff"}\n{"completion": "c", "prompt": "d"}'
    )
    file = DatasetFile(str(path), Renderer(tokenizer), skip_bad_rows=True, bad_rows=report)
    assert [file[index].completion for index in range(len(file))] == ["b", "c"]
    assert file.notes == [f"{path}: left out 3 malformed lines (see {report})"]
    first, second, third = map(json.loads, report.read_text().splitlines())
    assert first == {
        "file": str(path),
        "line": 3,
        "reason": "not valid JSON: Expecting value; expected one object per line",
        "row": '{"prompt":',
    }
    assert second["reason"] == "holds a list; expected one object per line" and third["line"] == 5
    assert "not valid UTF-8" in third["reason"]
    path.write_text("{}\n")
    with pytest.raises(DataError, match="no episode is left to train on; .*left out 1 malformed line"):
        DatasetFile(str(path), Renderer(tokenizer), skip_bad_rows=True)


def test_pairs_are_two_episodes_and_heldout_prompts_none(tmp_path, tokenizer):
    rows = [{"prompt": text, "chosen": "c", "rejected": "d"} for text in "xyz"]
    path = lines(tmp_path / "pairs.jsonl", rows)
    file = DatasetFile(path, Renderer(tokenizer), without={"y"})
    assert file.returns == [1.0, -1.0, 1.0, -1.0] and file.notes == [
        f"{path}: left out 2 episodes of held-out prompts (task.prompts.holdout)"
    ]
    assert [(file[index].prompt, file[index].completion) for index in range(4)] == [
        ("x", "c"), ("x", "d"), ("z", "c"), ("z", "d")
    ]  # fmt: skip


MIXED = [
    {"prompt": "a b", "completion": "c", "reward": 1.0},
    {"prompt": "a b", "completion": "d", "reward": 0.0},
    {"chosen": "a c", "rejected": "a d"},
    {"text": "d c b a"},
    {"turns": [{"observation": "b", "action": "c"}, {"observation": "d", "action": "a"}]},
]


def test_rows_of_mixed_formats_may_hold_nulls(tmp_path, tokenizer):
    names = {name: None for row in MIXED for name in row}
    path = lines(tmp_path / "mixed.jsonl", [names | row for row in MIXED])
    assert [prompt_of(row) for row in read_rows(path)] == ["a b", "a b", "a", "d c b a", "b"]
    first, second, chosen, rejected, *others = DatasetFile(path, Renderer(tokenizer)).groups
    assert first == second and chosen == rejected and len({first, chosen, *others}) == 4
    kept = DatasetFile(path, Renderer(tokenizer), without={"d c b a", "b"})
    assert len(kept) == 4 and len(kept.heldout()) == 2


def test_the_prompt_of_a_collected_dialogue(tokenizer, episodes):
    asked = [{"role": "user", "content": "a"}]
    episode = replace(episodes[0], turns=[replace(episodes[0].turns[0], observation=asked)], messages=asked)
    assert prompt_of(to_row(episode)) == asked


def test_vocabulary_from_nested_text(tmp_path):
    rows = [
        {"turns": [{"observation": "a", "action": "b"}, {"observation": "c", "action": "d"}], "player": "q"},
        {"messages": [{"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}]},
        {"oops": "z"},
    ]
    assert set("".join(dataset_texts(lines(tmp_path / "a.jsonl", rows)))) == set("abcdef")


def test_rows_without_text_give_no_vocabulary(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"prompt": 5}])
    recipe = load_recipe("grpo", ["model.path=x", f"prompts={path}", "rewards=lmrl.reward_models.shaping.length"])
    with pytest.raises(RecipeError, match=r"its rows hold no text: fill their prompts, or set model\.path"):
        task_texts(recipe)


# --------------------------------------------------------------------------------------------------------- files of rows
def test_file_kinds(tmp_path):
    rows = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("prompt,n\na,1\nb,2\n")
    for name in ("a.jsonl.gz", "a.parquet", "a.csv"):
        assert read_rows(str(tmp_path / name)) == rows
        assert read_rows(str(tmp_path / name), limit=1) == rows[:1]
        assert list(open_rows(str(tmp_path / name)).scan()) == rows and open_rows(str(tmp_path / name))[1] == rows[1]
    for name, text, message in [
        ("a.txt", "a", "unknown file type"),
        ("broken.parquet", "no", "broken.parquet: cannot be read"),
        ("broken.jsonl.gz", "no", "broken.jsonl.gz: cannot be read"),
        ("empty.jsonl", "\n", "holds no rows"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=message):
            read_rows(str(tmp_path / name))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="holds neither Parquet shards"):
        open_rows(str(tmp_path / "folder"))


def test_json_array_holds_rows(tmp_path):
    file = tmp_path / "a.json"
    rows = [{"prompt": "a", "n": 1}, {"prompt": "b", "deep": {"x": [1]}}]
    file.write_text("\ufeff \n" + json.dumps(rows, indent=2))
    assert read_rows(str(file)) == rows and open_rows(str(file)).where(1) == f"{file}, row 2"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_rows(str(file)) == rows
    for text, reason in (
        ('[{"a": 1}, 2]', "a.json, row 2: holds a int; expected an object"),
        ('[{"a": 1},', "a.json: not valid JSON: .*expected an array of objects"),
        ('[{"a": "\\ud800"}]', "a.json: holds the lone surrogate"),
        ("[]", "a.json: holds no rows"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=reason):
            open_rows(str(file))


def test_csv_columns_that_are_trained_on_are_text(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("question,completion,n,right,day\n007,1.50,007,true,2024-01-05\n8,x,9,false,2024-01-06\n")
    rows = read_rows(str(file), Selection(columns=(("prompt", "question"),)))
    assert rows[0] == {"prompt": "007", "completion": "1.50", "n": 7, "right": True, "day": "2024-01-05"}
    file.write_bytes("prompt\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.csv, line 2: not valid UTF-8 text: convert the file, .*iconv"):
        read_rows(str(file))


def test_csv_cells_may_hold_several_lines(tmp_path):
    texts = [
        f"{number}\n" + "line\n" * (number % 50) for number in range(20_000)
    ]  # more than a block of Arrow's reader
    (tmp_path / "a.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    assert [row["text"] for row in read_rows(str(tmp_path / "a.csv"))] == texts


def test_a_changed_file_is_read_anew(tmp_path):
    for word in ("old", "new"):
        pyarrow.parquet.write_table(pyarrow.table({"prompt": [word]}), tmp_path / "a.parquet")
        assert read_rows(str(tmp_path / "a.parquet")) == [{"prompt": word}]


def test_json_lines_keep_only_where_lines_begin(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"n": number, "text": "x" * 1000} for number in range(2000)])
    rows = JsonLines(tmp_path / "a.jsonl")
    assert [rows[index]["n"] for index in (1999, 0, 1234, 5)] == [1999, 0, 1234, 5]
    held = sum(value.nbytes for value in vars(rows).values() if hasattr(value, "nbytes"))
    assert held == 2000 * 16 and rows.where(5) == f"{path}, line 6"


@pytest.mark.parametrize("special", ["", "<eos>"])
def test_episodes_beyond_the_models_positions_are_left_out(tmp_path, tokenizer, special):
    rows = [{"prompt": "a" * size + special, "completion": "b"} for size in (1, 30, 31, 500)]
    path = lines(tmp_path / "data.jsonl", rows)
    room = 32 + len(special)  # prompt, completion and the end of sequence
    file = DatasetFile(path, Renderer(tokenizer), positions=room)
    assert [len(one.prompt) for one in map(file.__getitem__, range(len(file)))] == [1 + len(special), 30 + len(special)]
    assert file.notes == [
        f"{path}: left out 2 episodes of more than the {room} tokens that the model has positions for"
    ]
    both = DatasetFile(path, Renderer(tokenizer), positions=room, max_tokens=10)
    assert len(both) == 1 and len(both.notes) == 2


def test_only_texts_of_a_log_are_reported_as_unknown(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"prompt": "bb", "completion": "c", "reward": 1}) + "\n")
    renderer = Renderer(build_tokenizer("char", ["bc"]))
    assert len(DatasetFile(str(log), renderer, positions=64)) == 1
    assert renderer.unknown is None
