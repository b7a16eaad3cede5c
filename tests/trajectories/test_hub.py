"""Datasets on the hub: split, configuration and revision, without a network."""

import json

import datasets
import pytest

from lmrl.errors import DataError, RecipeError
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.recipe.files import load_recipe
from lmrl.rollouts.task import build_task
from lmrl.trajectories import files
from lmrl.trajectories.files import Selection, open_rows


@pytest.fixture
def two_configs(tmp_path, monkeypatch):
    """What the hub holds of a dataset: two configurations of a split each, in a folder."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "hub" / "data"
    folder.mkdir(parents=True)
    configs = []
    for name, split in (("short", "train"), ("long", "test")):
        (folder / f"{name}.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
        configs.append({"config_name": name, "data_files": [{"split": split, "path": f"{name}.jsonl"}]})
    (folder / "README.md").write_text("---\n" + json.dumps({"configs": configs}) + "\n---\n")
    return folder


def test_config_and_split_choose_the_rows(two_configs):
    assert list(files._open_hub(str(two_configs), Selection("train", "short")).scan()) == [{"prompt": "short"}]
    assert list(files._open_hub(str(two_configs), Selection("test", "long")).scan()) == [{"prompt": "long"}]


def test_a_saved_dataset_is_read_by_split(tmp_path):
    rows = {name: datasets.Dataset.from_list([{"prompt": name}]) for name in ("train", "test")}
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "both")
    rows["test"].save_to_disk(tmp_path / "one")
    assert list(open_rows(str(tmp_path / "both"), Selection("test"))) == [{"prompt": "test"}]
    assert list(open_rows(str(tmp_path / "one"))) == [{"prompt": "test"}]
    with pytest.raises(DataError, match=r"both: has no split 'dev' \(splits: train, test\); set `split`"):
        open_rows(str(tmp_path / "both"), Selection("dev"))


def test_errors_name_config_split_and_revision(two_configs):
    with pytest.raises(
        DataError,
        match=r"\(config 'long', split 'train'\) is not a file here, and cannot be loaded from the hub: .*train",
    ):
        files._open_hub(str(two_configs), Selection("train", "long"))
    with pytest.raises(DataError, match=r"\(config 'none', split 'train', revision 'v2'\) is not a file here"):
        files._open_hub(str(two_configs), Selection("train", "none", "v2"))


class Asked(Exception):
    pass


def test_recipe_keys_reach_the_hub(monkeypatch):
    def asked(name, config, **more):
        raise Asked(name, config, more)

    monkeypatch.setattr(files.quiet_datasets(), "load_dataset", asked)
    more = ["source.path=nobody/pairs", "source.config=main", "source.revision=v1", "source.split=test"]
    recipe = load_recipe("dialogues/dpo", ["model.path=.", *more])
    assert Selection.of(recipe.source) == Selection.of(recipe.task.prompts) == Selection("test", "main", "v1")
    with pytest.raises(DataError) as error:
        build_task(recipe.task, build_tokenizer("char", ["a"]))
    assert error.value.__cause__.args == ("nobody/pairs", "main", {"split": "test", "revision": "v1"})
    prompts = ["task.prompts.path=nobody/prompts", "task.prompts.config=hard"]
    own = load_recipe("sentiment/ppo", ["model.path=.", *prompts])
    assert Selection.of(own.task.prompts) == Selection("train", "hard")


def test_a_file_or_a_player_has_neither(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    for given in ("config", "revision"):
        with pytest.raises(
            DataError, match=f"a.jsonl: `{given}` selects from a dataset on the hub, but this is a file"
        ):
            open_rows(str(tmp_path / "a.jsonl"), Selection(**{given: "x"}))
    with pytest.raises(
        RecipeError, match="source: `config` and `revision` belong to a dataset on the hub, and `player` uses none"
    ):
        load_recipe("random_walks/bc", ["source.config=x"])
