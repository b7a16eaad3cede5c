"""Pairs of every format, and their split by prompts."""

import json

import pytest

from lmrl.errors import DataError
from lmrl.recipe.files import load_recipe
from lmrl.trajectories.preference_pairs import Pair, read_pairs, split_pairs
from tests.training.test_reward_model import stages_recipe


def test_pairs_of_every_format(tmp_path):
    user, good, bad = (
        {"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "yes"), ("assistant", "no"))
    )
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"chosen": [user, good], "rejected": [user, bad]},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs, notes = read_pairs(str(path))
    assert notes == [] and pairs == [
        Pair("p", "a", "b"),
        Pair("\n\nHuman: q\n\nAssistant:", " a", " b"),
        Pair([user], [good], [bad]),
        Pair([user], [good], [bad]),
    ]
    path.write_text(path.read_text() + '{"prompt": "p", "completion": "c"}\n')
    with pytest.raises(DataError, match="pairs.jsonl, line 5: has no field 'chosen'"):
        read_pairs(str(path))
    pairs, notes = read_pairs(str(path), skip_bad_rows=True, bad_rows=tmp_path / "bad.jsonl")
    assert len(pairs) == 4 and "left out 1 malformed line " in notes[0]
    assert json.loads((tmp_path / "bad.jsonl").read_text())["line"] == 5


def test_no_prompt_of_a_held_out_pair_is_trained_on():
    pairs = [Pair(f"{number % 10}", "a", "b") for number in range(30)]
    training, heldout = split_pairs(pairs, 0.2)
    assert len(heldout) == 6 and sorted(training + heldout) == list(range(30))
    assert not {pairs[index].prompt for index in training} & {pairs[index].prompt for index in heldout}
    assert split_pairs(pairs, 0.2) == (training, heldout)
    _, reserved = split_pairs(pairs, 0.2, lambda prompt: prompt in ("3", "4", "elsewhere"))
    assert {pairs[index].prompt for index in reserved} == {"3", "4"}
    assert split_pairs(pairs, 0.0) == (list(range(30)), [])
    with pytest.raises(DataError, match="none of 30 pairs is left to train on"):
        split_pairs(pairs, 0.1, lambda prompt: True)


def test_the_split_agrees_with_that_of_the_prompts(tmp_path, tiny_folder):
    """The same file as prompts, without a `prompt` column, and as pairs."""
    rows = [
        {"chosen": f"\n\nHuman: {n}\n\nAssistant: a", "rejected": f"\n\nHuman: {n}\n\nAssistant: b"} for n in range(40)
    ]
    recipe = load_recipe(stages_recipe(tmp_path, tiny_folder), ["stages.rm.training.steps=1"])
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from lmrl.policy.tokenizers import build_tokenizer
    from lmrl.rollouts.task import build_task

    section = recipe.task.model_copy(update={"rewards": []})
    task = build_task(section, build_tokenizer("char", ["abc"]))
    reserved = {task.make().rows[row]["prompt"] for row in task.heldout}
    pairs, _ = read_pairs(str(tmp_path / "pairs.jsonl"))
    _, heldout = split_pairs(
        pairs, 0.1, lambda prompt: not task.heldout_prompts().isdisjoint(task.renderer.keys(prompt))
    )
    assert {pairs[index].prompt for index in heldout} == reserved and len(reserved) == 4
