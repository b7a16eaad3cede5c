"""Recipes for your own model and data: what they require, and a chain of them."""

import json

import pytest

import lmrl
from lmrl.errors import DataError, RecipeError
from lmrl.recipe.files import load_recipe
from lmrl.recipe.methods import Argument, spelled_out

TINY = ["training.steps=2", "training.threads=1", "training.checkpoint_every=0", "model.lora.r=2"]
ARGUMENTS = [
    Argument("model.path", "model.path", ""),
    Argument("data.path", "source.path", ""),
    Argument("prompts", "task.prompts.path", ""),
]


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("model.path=M", "model.path=M"),
        ("data.path=F", "source.path=F"),
        ("data.batch_size=4", "source.batch_size=4"),
        ("prompts=F", "task.prompts.path=F"),
        ("model.lora=null", "model.lora=null"),
        ("training.steps=3", "training.steps=3"),
        ("nothing", "nothing"),
    ],
)
def test_short_names(override, meant):
    assert spelled_out(override, ARGUMENTS) == meant


def test_what_is_missing_is_named():
    with pytest.raises(
        RecipeError, match=r"recipe 'sft' needs data.path: a file of rows.*lmrl train sft model.path=\.\.\. data.path"
    ):
        load_recipe("sft", ["model.path=M"])
    with pytest.raises(RecipeError, match="needs model.path: .*; prompts: .*; rewards: reward.py:function"):
        load_recipe("grpo")


def test_rewards_may_be_names(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "r.py").write_text(
        "def f(completions, **_): return [0.0 for _ in completions]\ndef g(completions, **_): return f(completions)"
    )
    common = ["model.path=M", f"prompts={tmp_path}/p.jsonl"]
    one = load_recipe("grpo", [*common, f"rewards={tmp_path}/r.py:f"]).task.rewards
    assert [reward.function for reward in one] == [f"{tmp_path}/r.py:f"]
    both = load_recipe(
        "ppo", [*common, f"rewards=['{tmp_path}/r.py:f', {{function: '{tmp_path}/r.py:g', weight: 0}}, 'http://h/s']"]
    )
    assert [reward.kind for reward in both.task.rewards] == ["function", "function", "url"]
    assert [reward.weight for reward in both.task.rewards] == [1, 0, 1]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", ["messages", "completion", "text"])
def test_sft_takes_rows_of_every_form(tmp_path, tiny_folder, form):
    """Every assistant message, completion or text is learned, and held-out rows are measured."""
    rows = {
        "messages": lambda i: {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"},
                                            {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "no"}]},
        "completion": lambda i: {"prompt": f"{i}?", "completion": "yes"},
        "text": lambda i: {"text": f"the number {i}"},
    }  # fmt: skip
    data = write(tmp_path / "rows.jsonl", [rows[form](i) for i in range(40)])
    recipe = load_recipe("sft", [f"model.path={tiny_folder}", f"data.path={data}", *TINY])
    result = lmrl.train(recipe, output=tmp_path / "run")
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["kind"] == "train" for line in lines) == 2
    assert result.scores["SFT"]["heldout/nll"]["n"] == 2  # of 40 rows, one in twenty


def test_sft_then_dpo_then_grpo(tmp_path, tiny_folder):
    """A run is the next one's model; adapters go on from adapters, and columns reach the reward."""
    chat = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes"}]} for i in range(20)
    ]
    pairs = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(20)]
    prompts = [{"prompt": f"{i}?", "answer": "y"} for i in range(20)]
    (tmp_path / "r.py").write_text(
        "def right(completions, answer, **_): return [float(a in c) for c, a in zip(completions, answer)]"
    )
    steps = [
        ("sft", tiny_folder, [f"data.path={write(tmp_path / 'chat.jsonl', chat)}"]),
        ("dpo", tmp_path / "sft", [f"data.path={write(tmp_path / 'pairs.jsonl', pairs)}"]),
        ("grpo", tmp_path / "dpo", [f"prompts={write(tmp_path / 'p.jsonl', prompts)}", f"rewards={tmp_path}/r.py:right",
                                    "rollouts.max_new_tokens=4", "rollouts.prompts=2", "rollouts.samples=2", "objective.kl_coef=0.1"]),
        ("rm", tmp_path / "sft", [f"data.path={tmp_path / 'pairs.jsonl'}"]),
    ]  # fmt: skip
    for method, model, changes in steps:
        recipe = load_recipe(method, [f"model.path={model}", *changes, *TINY])
        result = lmrl.train(recipe, output=tmp_path / method)
        assert result.checkpoint.is_dir()


def test_columns_may_have_other_names(tmp_path, tiny_folder):
    """Training and held-out rows are found by the file's own names; a misspelt one is named with its place."""
    rows = [{"question": f"{i}?", "answer": "yes", "source": "mine"} for i in range(40)]
    data = write(tmp_path / "rows.jsonl", rows)
    changes = [f"model.path={tiny_folder}", f"data.path={data}", *TINY]
    recipe = load_recipe("sft", [*changes, "data.columns={prompt: question, completion: answer}"])
    assert recipe.task.prompts.columns == {"prompt": "question", "completion": "answer"}
    result = lmrl.train(recipe, output=tmp_path / "run")
    assert result.scores["SFT"]["heldout/nll"]["n"] == 2
    wrong = load_recipe("sft", [*changes, "data.columns={prompt: question, completion: anser}"])
    with pytest.raises(
        DataError, match=r"rows.jsonl, line 1: has no column 'anser'.*columns: question, answer, source"
    ):
        lmrl.train(wrong, output=tmp_path / "wrong")
