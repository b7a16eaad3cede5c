"""Recipes: strict, overridable, and every mistake is one line that names key, place and fix."""

import pytest
import yaml

from lmrl.errors import LmrlError
from lmrl.recipe.document import read_yaml
from lmrl.recipe.files import load_recipe, shipped_file, shipped_names, stages_of, to_yaml


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


GOOD = """
model:
  config: {model_type: llama}
task:
  environment: random_walks
  graph: 3
objective:
  name: ppo
  clip: 0.1
"""


def test_defaults_overrides_and_numbers(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD), ["objective.clip=0.3", "optimizer.lr=1e-5", "training.seed=7"])
    assert (recipe.objective.clip, recipe.optimizer.lr, recipe.training.seed, recipe.task.graph) == (0.3, 1e-5, 7, 3)
    assert recipe.source.name == "rollouts"


@pytest.mark.parametrize("name", shipped_names("recipes"))
def test_a_resolved_recipe_reads_back_as_itself(name, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "r.py").write_text("def f(completions, **_): return [0.0 for _ in completions]")
    values = {"model.path": "owner/model", "rewards": f"{tmp_path}/r.py:f"}
    arguments = read_yaml(shipped_file("recipes", name)).data.get("arguments", {})
    recipe = load_recipe(name, [f"{one}={values.get(one, tmp_path / 'rows.jsonl')}" for one in arguments])
    assert load_recipe(write(tmp_path, to_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("clip: 0.1", "clp: 0.1"),
            r"unknown key 'objective.clp' \(.*mine.yaml, line 9\); did you mean 'objective.clip'\?",
        ),
        (("objective:\n", "objectiv:\n"), r"missing key 'objective' \(.*mine.yaml\).*and 1 more"),
        (
            ("graph: 3", "graph: three"),
            r"wrong value for 'task.graph' \(.*mine.yaml, line 6\): input should be a valid integer.*'three'",
        ),
        (
            ("name: ppo", "name: pppo"),
            r"'objective.name' names no known objective: 'pppo' \(.*line 8\); did you mean 'ppo'",
        ),
        (
            ("environment: random_walks", "environment: randomwalks"),
            r"'task.environment' names no known task: 'randomwalks' \(.*line 5\); did you mean 'random_walks'",
        ),
        (("  graph: 3", "  graph: 3\n  graph: 4"), r"key 'task.graph' is written twice \(.*line 6 and .*line 7\)"),
        (("model:", "model: ["), r"mine.yaml, line \d+: not valid YAML"),
        (("config: {model_type: llama}", "dtype: float32"), r"model: needs `path`.*or `config`"),
        (("clip: 0.1", "kl_target: 6"), r"objective: `kl_target` adapts `kl_coef`"),
        (("task:", "rollouts: {top_p: 0.9}\ntask:"), r"truncated sampling biases.*rollouts.top_p=1"),
        (("task:", "source: {name: dataset, player: random}\ntask:"), r"'ppo' learns from its own fresh episodes"),
        (
            ("  environment: random_walks\n  graph: 3", "  environment: missing.py:Mine"),
            r"task.environment: file 'missing.py' does not exist",
        ),
        (("  config: {model_type: llama}", "  path: ./nowhere"), r"model.path: there is no './nowhere' here"),
    ],
)
def test_mistakes_in_a_file(tmp_path, change, message):
    assert change[0] in GOOD
    with pytest.raises(LmrlError, match=message) as caught:
        load_recipe(write(tmp_path, GOOD.replace(*change)))
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.clip", "not of the form key=value"),
        ("objective.clp=1", r"unknown key 'objective.clp' \(override objective.clp=1\); did you mean 'objective.clip'"),
        ("training.steps=many", r"wrong value for 'training.steps' \(override training.steps=many\)"),
        (
            "task.history=last",
            r"^wrong value for 'task.history' \(.*\): input should be 'all', or a valid integer, got 'last'$",
        ),
        (
            "objective.value_pull=-1",
            r"'objective.value_pull' \(.*\): input should be greater than or equal to 0, or 'auto', got -1$",
        ),
        ("training.steps.more=1", "unknown key|valid integer"),
        ("task.rewards.0.weight=2", "unknown key 'task.rewards'"),
        ("objective.clip.high=2", "'objective.clip' is a single value"),
        (
            "stages.warm.objective.clp=1",
            r"the recipe has no stage .warm.; a new one is written as a whole: stages.warm=",
        ),
        ("stages.main.training.steps=3", "stages.main"),
    ],
)
def test_mistakes_in_an_override(tmp_path, override, message):
    with pytest.raises(LmrlError, match=message):
        load_recipe(write(tmp_path, GOOD), [override])


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("log: {path: gone.jsonl}", "source.parts.1.log.path"),
        ("task: {prompts: {path: gone.jsonl}, rewards: [length]}", "source.parts.1.task.prompts.path"),
    ],
)
def test_a_missing_file_of_a_part_has_its_place(tmp_path, part, key):
    source = f"source={{name: blend, parts: [{{name: a}}, {{name: b, {part}}}]}}"
    with pytest.raises(LmrlError, match=f"^{key}: file 'gone.jsonl' does not exist"):
        load_recipe(write(tmp_path, GOOD), [source])
    with pytest.raises(LmrlError, match=f"^stages.warm.{key}: file 'gone.jsonl' does not exist"):
        load_recipe(write(tmp_path, GOOD), [f"stages.warm={{{source.replace('=', ': ')}}}"])


def test_files_below_the_home_folder(tmp_path, monkeypatch):
    """A shell does not expand the `~` of KEY=~/FILE."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "mine.py").write_text("def f(completions): return [0.0] * len(completions)")
    (home / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (home / "suite.yaml").write_text("task: {environment: maze}\n")
    prompts = "task={prompts: {path: ~/rows.jsonl}, rewards: ['~/mine.py:f']}"
    recipe = load_recipe(write(tmp_path, GOOD), [prompts, "evaluation.suite=~/suite.yaml"])
    assert recipe.task.prompts.path == str(home / "rows.jsonl")
    assert recipe.task.rewards[0].function == f"{home / 'mine.py'}:f"
    assert recipe.evaluation.suite == str(home / "suite.yaml")
    agent = "task={agent_command: [python, ~/mine.py], data: ~/rows.jsonl}"
    assert load_recipe(write(tmp_path, GOOD), [agent]).task.agent_command == ["python", str(home / "mine.py")]


def test_prompt_mistakes(tmp_path):
    text = """
model: {config: {model_type: llama}}
task:
  prompts: {path: gone.jsonl}
  rewards: [{function: "mine.py:f"}, {function: "mine.py:f"}]
objective: {name: ppo}
"""
    (tmp_path / "mine.py").write_text("def f(completions): return [0.0] * len(completions)")
    with pytest.raises(LmrlError, match=r"task.prompts.path: file 'gone.jsonl' does not exist \(looked in"):
        load_recipe(write(tmp_path, text))
    (tmp_path / "gone.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(LmrlError, match=r"two rewards are called 'f'"):
        load_recipe(write(tmp_path, text))
    recipe = load_recipe(write(tmp_path, text), ["task.rewards.1.name=g", "task.rewards.0.weight=0.5"])
    assert [reward.label for reward in recipe.task.rewards] == ["f", "g"]
    assert recipe.task.rewards[0].function == f"{tmp_path / 'mine.py'}:f"
    with pytest.raises(LmrlError, match="list has no item 'task.rewards.5'"):
        load_recipe(write(tmp_path, text), ["task.rewards.5.weight=1"])
    with pytest.raises(LmrlError, match="list at least one under task.rewards"):
        load_recipe(write(tmp_path, text), ["task.rewards=[]"])


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_a_name_and_its_options_does_not_matter(order):
    recipe = load_recipe("random_walks/stitching", ["objective.name=mc", "objective.beta=3"][::order])
    assert (recipe.objective.name, recipe.objective.beta) == ("mc", 3)


def test_stages_inherit_and_override():
    stages = stages_of(load_recipe("random_walks/ppo", ["stages.warmup.training.steps=20", "task.graph=5"]))
    assert list(stages) == ["warmup", "main"]
    warmup, main = stages["warmup"], stages["main"]
    assert (warmup.training.steps, warmup.objective.name, warmup.source.name) == (20, "likelihood", "dataset")
    assert warmup.task.graph == main.task.graph == 5
    assert warmup.training.checkpoint_every == main.training.checkpoint_every
    assert main.objective.name == "ppo" and not hasattr(warmup.objective, "clip")


def test_prompts_of_a_stage_are_those_of_its_own_log(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "q", "chosen": "x", "rejected": "y"}\n')
    logs = {name: {"name": "dataset", "path": str(tmp_path / f"{name}.jsonl")} for name in ("a", "b")}
    data = {
        "model": {"config": {"model_type": "llama"}},
        "task": {"prompts": {"holdout": 0.5}},
        "source": logs["b"],
        "objective": {"name": "dpo"},
        "stages": {
            "first": {"objective": {"name": "likelihood"}, "source": logs["a"]},
            "second": {"task": {"prompts": {"holdout": 0.2}}, "source": logs["a"]},
            "third": {"task": {"prompts": {"path": logs["b"]["path"]}}, "source": logs["a"]},
            "fourth": {"task": {"environment": "maze"}, "source": {"player": "random", "path": None}},
        },
    }
    recipe = load_recipe(data)
    for stages in (stages_of(recipe), stages_of(load_recipe(yaml.safe_load(to_yaml(recipe))))):
        paths = [stage.task.prompts.path for name, stage in stages.items() if name != "fourth"]
        assert paths == [logs[name]["path"] for name in ("a", "a", "b", "b")]
        assert stages["second"].task.prompts.holdout == 0.2 and stages["fourth"].task.environment == "maze"


def test_one_override_puts_a_real_model_into_any_recipe(tmp_path):
    recipe = load_recipe("random_walks/ppo", [f"model.path={tmp_path}"])
    assert recipe.model.path == str(tmp_path) and recipe.model.config is None


def test_another_objective_drops_the_keys_of_the_old_one():
    recipe = load_recipe("random_walks/bc", ["source.name=rollouts", "objective.name=ppo"])
    assert recipe.objective.clip == 0.2 and recipe.source.name == "rollouts"


def test_own_code_takes_options(tmp_path):
    (tmp_path / "mine.py").write_text("class World: pass")
    text = GOOD.replace("environment: random_walks\n  graph: 3", "environment: mine.py:World\n  depth: 4")
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.task.environment == f"{tmp_path / 'mine.py'}:World" and recipe.task.options == {"depth": 4}


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(LmrlError, match="no recipe called 'random_walk/ppo'; did you mean 'random_walks/ppo'"):
        load_recipe("random_walk/ppo")


def test_lora_needs_a_pretrained_model(tmp_path):
    with pytest.raises(LmrlError, match="`lora` adapts a pretrained model"):
        load_recipe(write(tmp_path, GOOD), ["model.lora.r=4"])


def test_arithmetic():
    numbers = load_recipe("random_walks/ppo").arithmetic()
    assert numbers["episodes"] == 64 * 8
    assert numbers["updates"] == numbers["epochs"] * numbers["minibatches"] * numbers["steps"]


def test_yaml_of_a_recipe_holds_every_default():
    recipe = load_recipe("random_walks/bc", ["optimizer.betas=[0.8, 0.9]"])
    written = yaml.safe_load(to_yaml(recipe))["optimizer"]
    assert written["betas"] == [0.8, 0.9] and written["head_lr"] is None and written["eps"] == 1e-8


@pytest.mark.parametrize(
    "name", ["../../evil", "", ".", "..", "/tmp/evil", "a/b", "a\\b", ".hidden", "a\nb", "x" * 200]
)
def test_a_stage_name_cannot_leave_the_run(tmp_path, name):
    path = write(tmp_path, yaml.safe_dump(yaml.safe_load(GOOD) | {"stages": {name: {"training": {"steps": 1}}}}))
    with pytest.raises(LmrlError, match=r"^stages: '.* cannot name a stage.*\(.*mine.yaml, line \d+\)$") as caught:
        load_recipe(path)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "divisor"),
    [
        ("{prompts: {path: rows.jsonl}, rewards: [{function: lmrl.reward_models.answers.exact}]}", "group"),
        ("{environment: random_walks}", "running"),
    ],
)
def test_divisor_of_grpo_depends_on_the_task(task, divisor, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    text = (
        f"model: {{config: {{model_type: llama}}}}\ntask: {task}\nobjective: {{name: grpo}}\nrollouts: {{samples: 4}}"
    )
    file = write(tmp_path, text)
    recipe = load_recipe(file)
    assert recipe.objective.scale_rewards == "auto" and recipe.resolved_objective.scale_rewards == divisor
    assert load_recipe(file, ["objective.scale_rewards=none"]).resolved_objective.scale_rewards == "none"
