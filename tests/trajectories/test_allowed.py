"""The sets that restricted actions were chosen from, in segments, tensors, files and bundles."""

import pytest
import torch

from lmrl.errors import DataError, ModelError
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.training.monitoring.bundle import batch_of, batch_tensors
from lmrl.trajectories.allowed import Allowed
from lmrl.trajectories.balance import _from_arrays, _to_arrays
from lmrl.trajectories.batch import VECTORS, Batch, to_sequence
from lmrl.trajectories.chain import to_sequences
from lmrl.trajectories.readers import Malformed
from lmrl.trajectories.rows import fingerprint, parse, to_row
from lmrl.trajectories.shared import pack
from lmrl.trajectories.store import read_episodes, write_episodes
from lmrl.trajectories.trajectory import Segment, Trajectory, Turn


def segment_of(*allowed) -> Segment:
    """Two tokens of context, then actions 7, 8, ..., each chosen from one of these."""
    segment = Segment()
    segment.observe([5, 6])
    segment.act(list(range(7, 7 + len(allowed))), None, 0, allowed)
    return segment


def test_microbatch_numbers_actions_through_its_sequences():
    batch = Batch([to_sequence(one) for one in (segment_of((3, 7), None), segment_of(None, (8, 9)))])
    micro = batch.collate([0, 1], 0)
    assert micro.allowed is not None
    assert micro.allowed.rows_R.tolist() == [0, 3] and micro.allowed.tokens_U.tolist() == [3, 7, 8, 9]
    assert micro.allowed.members_SU.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert batch.collate([1, 0], 0).allowed.rows_R.tolist() == [1, 2]


def test_equal_sets_are_held_once():
    allowed = Allowed.of({4: (1, 2), 0: (1, 2), 2: (2,)})
    assert allowed.rows_R.tolist() == [0, 2, 4] and allowed.sets_R.tolist() == [0, 1, 0]
    assert allowed.columns(torch.tensor([1, 2, 2])).tolist() == [0, 1, 1]


def test_packed_sequences_keep_their_sets():
    together = pack([to_sequence(segment_of((7, 9), None)), to_sequence(segment_of(None, (8, 9)))])
    assert together.allowed == {0: (7, 9), 3: (8, 9)}


def test_a_pseudo_action_is_not_restricted():
    sequence = to_sequence(segment_of((7,), (8,)), bootstrap=True)
    assert sequence.allowed == {0: (7,), 1: (8,)} and len(sequence.targets) == 3
    sequence.drop_last_action()
    assert sequence.allowed == {0: (7,), 1: (8,)} and sequence.targets.tolist() == [7, 8]


def test_processes_and_bundles_keep_the_sets():
    sequence = to_sequence(segment_of((7, 9), None, (9, 11)))
    assert _from_arrays(_to_arrays(sequence)).allowed == sequence.allowed
    (kept,) = batch_of(batch_tensors(Batch([sequence]))).sequences
    assert kept.allowed == sequence.allowed == {0: (7, 9), 2: (9, 11)}


@pytest.mark.parametrize("name", ["episodes.jsonl", "episodes.parquet"])
def test_files_keep_the_sets(tmp_path, monkeypatch, name):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = build_tokenizer("char", ["abcdefghijk"])
    made = [
        Trajectory([segment_of((7, 9), None, (7, 9))], "a", "b", turns=[Turn("a", "b")]),
        Trajectory([segment_of(None)], "a", "b", turns=[Turn("a", "b")], episode=1),
    ]
    write_episodes(tmp_path / name, made, tokenizer)
    assert [one.segments for one in read_episodes(tmp_path / name, tokenizer)] == [one.segments for one in made]


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        ({"places": [2], "sets": [1], "table": [[7]]}, "expected places, sets and table"),
        ({"places": [0], "sets": [0], "table": [[5]]}, "place 0, which is not an action"),
        ({"places": [2], "sets": [0], "table": [[9]]}, "token 7 at place 2 is not among those"),
    ],
)
def test_impossible_sets_in_a_row_are_named(allowed, message):
    tokenizer = build_tokenizer("char", ["abcdefghijk"])
    row = to_row(Trajectory([segment_of(None)], "a", "b", turns=[Turn("a", "b")]), fingerprint(tokenizer))
    row["segments"][0]["allowed"] = allowed
    with pytest.raises(Malformed, match=message):
        parse(row)


# ------------------------------------------------------------------------------------------------- kinds of actions
def vector_segment(*vectors) -> Segment:
    segment = Segment()
    segment.observe([5])
    for number, vector in enumerate(vectors):
        segment.act_vector("gaussian", vector, -1.0, number)
        segment.observe([6])
    return segment


def test_vectors_are_a_field_of_the_actions():
    batch = Batch([to_sequence(vector_segment((1.0, 2.0), (3.0, 4.0))), to_sequence(vector_segment((5.0, 6.0)))])
    micro = batch.collate([1, 0], 0)
    assert micro.kind == "gaussian" and micro.allowed is None
    assert micro.fields[VECTORS].tolist() == [[5.0, 6.0], [1.0, 2.0], [3.0, 4.0]]
    assert micro.cols_N.tolist() == [0, 0, 2]


@pytest.mark.parametrize("shared", [True, False])
def test_the_pseudo_action_has_a_vector_too(shared):
    """Of a truncated episode, whose last observation stands in the same segment or in its own."""
    segments = [vector_segment((1.0, 2.0))]
    if not shared:
        last = Segment()
        last.observe([6])
        segments.append(last)
    sequences = to_sequences(Trajectory(segments, "", "", terminated=False))
    micro = Batch(sequences).collate(list(range(len(sequences))), 0)
    assert micro.fields[VECTORS].tolist() == [[1.0, 2.0], [0.0, 0.0]] and micro.kind == "gaussian"


def test_kinds_do_not_mix(tiny_policy):
    with pytest.raises(ValueError, match="actions of one kind"):
        Batch([to_sequence(segment_of(None)), to_sequence(vector_segment((1.0,)))]).collate([0, 1], 0)
    with pytest.raises(ValueError, match="actions of one kind"):
        segment_of(None).act_vector("gaussian", (1.0,), None, 1)
    with pytest.raises(ModelError, match="actions of the kind 'gaussian'"):
        tiny_policy.score(Batch([to_sequence(vector_segment((1.0,)))]))


def test_other_kinds_are_not_written_to_files(tmp_path):
    tokenizer = build_tokenizer("char", ["abc"])
    with pytest.raises(DataError, match="kind 'gaussian' cannot be written"):
        write_episodes(tmp_path / "x.jsonl", [Trajectory([vector_segment((1.0,))], "a", "b")], tokenizer)
