"""Objects of a Python program in recipes: names for them, runs with them, and what a resumed run asks for."""

import json
import random
import re
import subprocess
import sys
from functools import partial

import datasets
import pandas
import pytest
import torch
import transformers
import yaml

import lmrl
from lmrl.errors import DataError, RecipeError
from lmrl.plugins import objects
from lmrl.recipe import Recipe, Reward
from lmrl.recipe.files import load_recipe
from lmrl.trajectories.files import open_rows

ROWS = [{"prompt": f"say {letter}", "answer": letter} for letter in "abcdefghij"]
SHORT = ["rollouts.prompts=2", "rollouts.samples=2", "rollouts.max_new_tokens=4", "training.steps=2", "model.lora=null"]


def starts_well(prompts, completions, answer, **columns):
    """1 for a completion that begins with the row's answer."""
    return [float(text.startswith(wanted)) for text, wanted in zip(completions, answer, strict=True)]


def length(completions, **columns):
    return [float(len(text)) for text in completions]


class Guess(lmrl.TextEnvironment):
    """Say the letter that is asked for."""

    players = ("optimal",)
    num_starts = 3

    def __init__(self, letters="abc"):
        self.letters, self.wanted = letters, ""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.wanted = self.letters[(options or {}).get("start", 0)]
        return f"say {self.wanted}:", {}

    def step(self, action):
        return "", float(action == self.wanted), True, False, {}

    def act(self, player, rng):
        return self.wanted

    def texts(self):
        return [f"say {letter}:" for letter in self.letters]


@pytest.fixture(autouse=True)
def no_objects(monkeypatch):
    """Nothing that another test has provided."""
    monkeypatch.setattr(objects, "_provided", {})


def tiny(**sections):
    return {
        "model": {
            "config": dict(model_type="llama", hidden_size=16, intermediate_size=32, num_hidden_layers=1)
            | dict(num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64)
        },
        "objective": {"name": "rloo"},
        "rollouts": {"prompts": 2, "samples": 2, "max_new_tokens": 3},
        "training": {"steps": 2},
    } | sections


# ------------------------------------------------------------------------------------------------------------------ names
def test_objects_of_a_mapping_are_named_in_its_recipe():
    recipe = load_recipe(tiny(task={"prompts": ROWS, "rewards": [starts_well, {"function": length, "weight": 0}]}))
    assert recipe.task.prompts.path.startswith("python:rows_")
    assert [one.function for one in recipe.task.rewards] == ["python:starts_well", "python:length"]
    assert [one.label for one in recipe.task.rewards] == ["starts_well", "length"]
    assert recipe == Recipe.model_validate(
        tiny(task={"prompts": {"path": ROWS}, "rewards": [starts_well, {"function": length, "weight": 0}]})
    )


def test_other_rows_have_another_name_and_equal_rows_the_same():
    names = [objects.Names()(rows) for rows in (ROWS, [dict(row) for row in ROWS], ROWS[1:])]
    assert names[0] == names[1] != names[2]


def test_two_functions_of_one_name_are_told_apart():
    rewards = [lambda completions, **_: [0.0] * len(completions), lambda completions, **_: [1.0] * len(completions)]
    recipe = load_recipe(tiny(task={"prompts": ROWS, "rewards": rewards}))
    first, second = (one.function for one in recipe.task.rewards)
    assert objects.find(first, "") is rewards[0] and objects.find(second, "") is rewards[1]


def test_a_function_that_is_defined_again_keeps_its_name():
    first = load_recipe(tiny(task={"prompts": ROWS, "rewards": starts_well})).task.rewards[0].function
    again = lambda completions, **_: []  # noqa: E731
    again.__name__ = "starts_well"
    second = load_recipe(tiny(task={"prompts": ROWS, "rewards": again})).task.rewards[0].function
    assert first == second and objects.find(second, "") is again


def judge(*, word="good", least=1):
    """A function that has closed over values and over another function."""

    def count(text):
        return text.count(word)

    return lambda completions, **_: [float(count(text) >= least) for text in completions]


class Judge:
    least = 1

    def __init__(self, word):
        self.word = word

    def __call__(self, completions, **_):
        return [float(text.count(self.word) in {self.least, "more", "most"}) for text in completions]


class Stricter(Judge):
    least = 2


def calls_itself():
    def again(completions, **_):
        return again(completions[:-1]) if completions else []

    return again


def content(thing):
    lmrl.provide(thing=thing)
    return objects.content_of("python:thing")


def test_content_is_what_an_object_does():
    same = [
        (judge(), judge(word="good")),
        (calls_itself(), calls_itself()),
        (Judge("a"), Judge("a")),
        (Guess, Guess),
        (partial(length, x=1),) * 2,
    ]
    assert all(content(one) == content(other) for one, other in same)
    others = [judge(), judge(word="bad"), judge(least=2), Judge("a"), Judge("b"), Judge, Stricter, Guess, Guess("ab")]
    others += [len, sum, length, starts_well, partial(length, x=1), partial(length, x=2), Judge("a").__call__]
    assert len(set(map(content, others))) == len(others)
    assert objects.content_of("python:unknown") is None
    script = "from tests.plugins.test_objects import *; print(content(Judge('a')), content(judge()), content(Guess))"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout.split() == [content(Judge("a")), content(judge()), content(Guess)]


def test_a_typed_reward_takes_a_function():
    reward = Reward(function=starts_well)
    assert objects.find(reward.function, "") is starts_well


def test_a_function_in_a_worker_is_refused():
    with pytest.raises(ValueError, match="runs in the run's own process"):
        Reward(function=starts_well, timeout=3)


@pytest.mark.parametrize("rows", [ROWS, datasets.Dataset.from_list(ROWS), pandas.DataFrame(ROWS)])
def test_rows_of_every_kind_are_read(rows):
    assert list(open_rows(objects.Names()(rows))) == ROWS


def test_missing_values_of_a_data_frame_are_none():
    frame = pandas.DataFrame({"prompt": ["a", "b"], "answer": ["x", None], "number": [1.5, float("nan")]})
    assert list(open_rows(objects.Names()(frame))) == [
        {"prompt": "a", "answer": "x", "number": 1.5},
        {"prompt": "b", "answer": None, "number": None},
    ]


@pytest.mark.parametrize("kind", ["splits", "stream"])
def test_splits_and_streams_are_not_rows(kind):
    table = datasets.Dataset.from_list(ROWS)
    given = datasets.DatasetDict(train=table) if kind == "splits" else table.to_iterable_dataset()
    with pytest.raises(RecipeError, match="prompts: expected a list of mappings, a datasets.Dataset.*got a "):
        lmrl.train("grpo", prompts=given)
    lmrl.provide(rows=given)
    with pytest.raises(DataError, match="is not data"):
        open_rows("python:rows")


def test_other_objects_are_not_data():
    lmrl.provide(rows=3)
    with pytest.raises(DataError, match="python:rows: a int is not data"):
        open_rows("python:rows")
    with pytest.raises(RecipeError, match="prompts: expected a list of mappings.*got a int"):
        lmrl.train("grpo", prompts=3)
    with pytest.raises(RecipeError, match="got a list with a str"):
        lmrl.train("grpo", prompts=["a"])
    with pytest.raises(RecipeError, match="got an empty list"):
        lmrl.train("grpo", prompts=[])


# ------------------------------------------------------------------------------------------------------------------- runs
def test_a_run_of_objects(tiny_folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = tmp_path / "run"
    result = lmrl.train("grpo", SHORT, run, model=model, prompts=ROWS, rewards=starts_well)
    written = yaml.safe_load((run / "recipe.yaml").read_text())
    assert written["model"]["path"] == "python:LlamaForCausalLM"
    assert written["task"]["rewards"][0]["function"] == "python:starts_well"
    assert all((before[name] == tensor).all() for name, tensor in model.state_dict().items())
    assert list(result.metrics["step"]) == [1, 2] and "time/update_s" in result.metrics
    assert set(result.samples["stage"]) == {"main"} and result.samples["reward"].between(0, 1).all()
    assert result.scores == json.loads((run / "results.json").read_text())
    changed = result.policy.model.state_dict()
    assert changed.keys() == before.keys() and result.policy.tokenizer.chat_template
    assert sum(len(row["answer"]) for row in ROWS) == 10  # a reward may not change the rows


def test_a_lora_run_names_the_copy_of_its_model(tiny_folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    result = lmrl.train("grpo", SHORT[:-1], tmp_path / "run", model=(model, tokenizer), prompts=ROWS, rewards=length)
    adapter = json.loads((result.checkpoint / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tmp_path / "run/model")
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    "environment", [Guess, Guess("abc"), lambda: Guess("abc")], ids=["class", "object", "function"]
)
def test_an_environment_of_each_kind_is_played(environment, tmp_path):
    recipe = tiny(task={"environment": environment, "max_turns": 1})
    result = lmrl.train(recipe, output=tmp_path / "run")
    assert len(result.metrics) == 2
    assert set(result.samples["prompt"]) <= {"say a:", "say b:", "say c:"}


def test_a_run_learns_and_leaves_settings_alone(tmp_path):
    """Its caller has switched gradients off, as for inference, and draws numbers of its own."""
    rewards = lambda completions, **_: list(map(float, range(len(completions))))  # noqa: E731
    recipe = tiny(task={"prompts": ROWS, "rewards": rewards}, training={"steps": 1, "threads": 1})
    threads, before = torch.get_num_threads(), (random.getstate(), torch.get_rng_state().tolist())
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            assert lmrl.train(recipe, output=tmp_path / "run").metrics["grad_norm"].item() > 0
            assert not torch.is_grad_enabled() and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert (random.getstate(), torch.get_rng_state().tolist()) == before


def test_supervised_rows_train(tiny_folder, tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": row["prompt"], "completion": row["answer"]} for row in ROWS])
    result = lmrl.train("sft", ["training.steps=2"], tmp_path / "run", model=str(tiny_folder), data=rows)
    assert result.metrics["nll"].notna().all()


def test_resume_asks_for_the_objects(tiny_folder, tmp_path):
    run = tmp_path / "run"
    given = {"model": str(tiny_folder), "prompts": ROWS, "rewards": starts_well}
    lmrl.train("grpo", SHORT, run, **given)
    script = f"import lmrl; lmrl.train({str(run)!r}, ['training.steps=3'], resume=True)"
    stopped = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    rows = yaml.safe_load((run / "recipe.yaml").read_text())["task"]["prompts"]["path"].removeprefix("python:")
    assert (
        f"'python:{rows}' (task.prompts.path), 'python:starts_well' (task.rewards.0.function): an object of a Python program, which is not "
        f"in any file: pass it again, with the call of lmrl.train that started the run and resume=True, or with lmrl.provide({rows}=..., "
        "starts_well=...)"
    ) in stopped.stderr
    longer = [*SHORT[:-2], "training.steps=3", SHORT[-1]]
    result = lmrl.train("grpo", longer, run, resume=True, **given)
    assert list(result.metrics["step"]) == [1, 2, 3]
    objects._provided.clear()
    lmrl.provide(**{rows: ROWS, "starts_well": starts_well})
    assert len(lmrl.train(run, ["training.steps=4"], resume=True).metrics) == 4


def test_resume_refuses_other_rows(tiny_folder, tmp_path):
    given = {"model": str(tiny_folder), "rewards": starts_well}
    lmrl.train("grpo", SHORT, tmp_path / "run", prompts=ROWS, **given)
    with pytest.raises(lmrl.errors.RunError, match="'task.prompts.path' differs"):
        lmrl.train("grpo", SHORT, tmp_path / "run", resume=True, prompts=ROWS[1:], **given)


def test_a_model_without_a_tokenizer_is_refused(tiny_folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.config._name_or_path = ""
    with pytest.raises(lmrl.errors.ModelError, match="pass model=\\(model, tokenizer\\)"):
        lmrl.train("grpo", SHORT, tmp_path / "run", model=model, prompts=ROWS, rewards=length)


def test_options_are_what_a_resumed_run_reads():
    """recipe.yaml would give `{1: 0.5}` back with the key '1', and a set as a list or as text."""
    task = {"prompts": ROWS, "rewards": {"function": length, "options": {}}}
    recipe = {"model": {"path": "m"}, "task": task, "objective": {"name": "grpo"}, "rollouts": {"samples": 2}}
    for options, what in (
        ({"marks": {1: 0.5}}, "the key marks.1 is not text"),
        ({"words": {"a"}}, "words is {'a'} (set), which recipe.yaml cannot keep"),
        ({"limit": float("inf")}, "limit is inf (float)"),
        ({"by": [len]}, "by.0 is <built-in function len> ("),
    ):
        task["rewards"]["options"] = options
        with pytest.raises(RecipeError, match=f"^task.rewards.0.options: {re.escape(what)}"):
            lmrl.load_recipe(recipe)
        with pytest.raises(RecipeError, match=f"^rewards: .*{re.escape(what.removeprefix('the key '))}"):
            lmrl.train("grpo", model="m", prompts=ROWS, rewards=task["rewards"])
    task["rewards"]["options"] = {"pair": (1, 2)}
    assert lmrl.load_recipe(recipe).task.rewards[0].options == {"pair": [1, 2]}
    with pytest.raises(RecipeError, match="the key sizes.1 is not text"):
        lmrl.load_recipe(
            {"model": {"path": "m"}, "task": {"environment": Guess, "sizes": {1: 2}}, "objective": {"name": "ppo"}}
        )


def test_folders_of_a_run_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("{}")
    (tmp_path / "own.yaml").write_text("seed: 1")
    with pytest.raises(lmrl.errors.RunError, match="'~' is a run folder: continue it with resume=True"):
        lmrl.train("~")
    with pytest.raises(lmrl.errors.RunError, match=f"^{tmp_path} holds a run"):
        lmrl.train("random_walks/ppo", output="~")
    with pytest.raises(RecipeError, match="missing key 'model'"):
        lmrl.load_recipe("~/own.yaml")


def test_overrides_that_are_no_list():
    for overrides in ("training.steps=3", {"training.steps": 3}, [3], None):
        for call in (lmrl.train, lmrl.load_recipe):
            with pytest.raises(RecipeError, match="^overrides: expected a list of texts, for instance "):
                call("random_walks/ppo", overrides)
