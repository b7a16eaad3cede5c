"""Mistyped commands, options, recipes and keys: nothing is loaded, and nothing is written."""

import shlex

import pytest
from harness import check_line, checksums, copied, folder, written

RECIPE = """
model: {config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_attention_heads: 2, num_key_value_heads: 2}}
task: {environment: random_walks, graph: 3, nodes: 8}
rollouts: {max_new_tokens: 6, prompts: 2}
objective: {name: ppo}
training: {steps: 1}
evaluation: {suite: null}
"""

OPTIONS = [
    ("trian random_walks/bc", r"no such command 'trian'.*train.*\(see `lmrl -h`\)"),
    ("reward chek judge", r"no such command 'chek'.*check.*\(see `lmrl reward -h`\)"),
    ("train random_walks/bc --ouput x", r"no option --ouput; did you mean '--output'\? \(see `lmrl train -h`\)"),
    ("train random_walks/bc --jobs two", r"--jobs.*integer"),
    ("train random_walks/bc --processes 0", r"--processes.*greater than or equal to 1"),
    ("train random_walks/bc --output", r"--output.*requires an argument"),
    ("eval", "name a policy to score, or a log to score again: lmrl eval POLICY"),
    ("export run", r"missing argument 'destination'"),
    ("collect random --episodes 0", r"--episodes.*greater than or equal to 1"),
    ("collect random --seed -1", r"--seed.*greater than or equal to 0"),
    ("export run out --beta -1", r"--beta.*greater than or equal to 0"),
    ("reward serve r.py:f --port 99999", r"--port.*less than or equal to 65535"),
    ("cp a b c", r"unexpected extra argument"),
    ("ls recipies", r"no kind called 'recipies'; did you mean 'recipes'\?"),
    ("show", r"missing argument 'name' \(see `lmrl show -h`\)"),
    ("eval run --beta 1,x", r"--beta: '1,x' is not a list of weights, for instance 1,4,16,64"),
    ("eval run --fail-under return", r"--fail-under: 'return' is not METRIC=VALUE, for instance return=-3"),
    ("eval run --fail-under return=1 --fail-under return=2", r"--fail-under: 'return' is named twice: leave one out"),
    ("train", r"name a recipe, for instance: lmrl train random_walks/ppo"),
    ("train random_walks/bc --jobs 2", r"--jobs goes with --over"),
    ("train random_walks/bc --over training.steps", r"--over"),
    (
        "train random_walks/bc --over training.seed=0,1 --processes 2",
        r"--over makes several runs.*leave one of them out",
    ),
    ("train random_walks/bc --accelerate fsdp", r"--accelerate: there is no file 'fsdp'; did you mean 'fsdp2'\?"),
    (
        "train random_walks/bc --dry-run --resume --output x",
        r"--dry-run tries a recipe from its start: leave --resume out",
    ),
    ("train --resume", r"no run to resume under runs/: name its folder, lmrl train FOLDER --resume"),
    ("train random_walks/bc --resume", r"--resume needs the run: lmrl train FOLDER --resume"),
    ("train random_walks/pp", r"no recipe called 'random_walks/pp'; did you mean 'random_walks/ppo'\?"),
    ("train arithmetic/grpo --skip-bad-rows", r"--skip-bad-rows: the recipe reads no logged data"),
    ("show mine.yml", r"recipe file 'mine.yml' does not exist"),
    ("cp random_walk/ppo", r"no recipe called 'random_walk/ppo'; did you mean 'random_walks/ppo'\?"),
    ("cp sentimental.py", r"no shipped reward file called 'sentimental.py'"),
    ("reward score r.py:f", r"name either --data FILE or --run FOLDER"),
    ("replay bundles/none", r"bundles/none"),
    (
        "collect randm -e random_walks",
        r"'randm' is not a player of environment 'random_walks'; did you mean 'random'\?",
    ),
    ("collect random", r"there is no folder 'random'.*name the environment: --environment NAME"),
    ("collect random -e random_walk", r"'random_walk'.*did you mean 'random_walks'\?"),
    (
        "collect random=half -e random_walks",
        r"does not name players with their shares, for instance random=0.9,optimal=0.1",
    ),
    ("collect optimum=1 -e random_walks", r"optimum"),
]


@pytest.mark.parametrize(("command", "message"), OPTIONS, ids=[command for command, _ in OPTIONS])
def test_wrong_options(lmrl, place, command, message):
    check_line(lmrl(*shlex.split(command)), message)
    assert not checksums(place)


KEYS = [
    (
        "optimizer.learning_rate=1e-4",
        r"unknown key 'optimizer.learning_rate' \(override .*did you mean 'optimizer.lr'\?",
    ),
    ("learning_rate=1e-4", r"unknown key 'learning_rate' .*did you mean 'optimizer.lr'\?"),
    ("training.lr=1e-4", r"unknown key 'training.lr' .*did you mean 'optimizer.lr'\?"),
    ("steps=5", r"unknown key 'steps' .*did you mean 'training.steps'\?"),
    ("training.max_steps=5", r"did you mean 'training.steps'\?"),
    ("rollouts.seed=1", r"did you mean 'training.seed'\?"),
    ("rollouts.batch_size=8", r"did you mean 'rollouts.prompts'\?"),
    ("model.name=gpt2", r"did you mean 'model.path'\?"),
    ("objective.cliprange=0.1", r"did you mean 'objective.clip'\?"),
    ("objective.klip=0.1", r"did you mean 'objective.clip'\?"),
    ("tracking.wandb=true", r"did you mean 'tracking.trackers'\?"),
    ("optimiser.lr=1", r"unknown key 'optimiser' \(override optimiser.lr=1\); did you mean 'optimizer'\?"),
    ("rollouts.vllm.max_len=3", r"did you mean 'rollouts.vllm.max_model_len'\?"),
    ("task.foo=1", r"unknown key 'task.foo' .*; valid here: .*graph"),
    ("stages={a: {optimizer: {learning_rate: 1}}}", r"'stages.a.optimizer.learning_rate'.*'stages.a.optimizer.lr'\?"),
    ("objective.name=pppo", r"'objective.name' names no known objective: 'pppo' .*did you mean 'ppo'\?"),
    ("task.environment=mze", r"'task.environment' names no known task: 'mze' .*did you mean 'maze'\?"),
    ("objective={}", r"missing key 'objective.name' .*valid here: .*ppo"),
    ("objective=ppo", r"'objective' .*expected keys with values, for instance objective.name=ppo, got 'ppo'"),
    ("training=5", r"wrong value for 'training' .*expected keys with values, for instance training.steps=..., got 5"),
    ("model=gpt2", r"expected keys with values, for instance model.path=..., got 'gpt2'"),
    ("training.steps", r"override 'training.steps' is not of the form key=value, for instance training.steps=50"),
    ("training.steps=", r"wrong value for 'training.steps' .*integer, got nothing"),
    ("training.steps=1.5", r"wrong value for 'training.steps' .*got 1.5"),
    ("training.steps=-3", r"wrong value for 'training.steps' .*greater than or equal to 1, got -3"),
    ("optimizer.lr=1e", r"wrong value for 'optimizer.lr' .*got '1e'"),
    ("rollouts.stop=END", r"wrong value for 'rollouts.stop' .*list, got 'END'"),
    ("rollouts.temperature=hot", r"wrong value for 'rollouts.temperature' .*got 'hot'"),
    ("rollouts.engine=sglang", r"no engine is called 'sglang'; valid here: hf, vllm, vllm-server"),
    ("model.dtype=fp16", r"wrong value for 'model.dtype' .*'float32' or 'bfloat16'"),
    ("model.config.hidden_size=-16", r"`config.hidden_size`: expected a whole number of at least 1, got -16"),
    (
        "model.config.num_hidden_layers=two",
        r"`config.num_hidden_layers`: expected a whole number of at least 1, got 'two'",
    ),
    ("model.config.vocab_size=0", r"`config.vocab_size`: expected a whole number of at least 1, got 0"),
    ("model.lora.r=8", r"`lora` adapts a pretrained model: give `path`"),
    ("task.rewards.0.weight=2", r"unknown key 'task.rewards' \(override task.rewards.0.weight=2\)"),
    ("objective.kl_target=6", r"`kl_target` adapts `kl_coef`, which has to start above 0"),
    ("rollouts.top_p=0.9", r"set rollouts.top_p=1 and rollouts.top_k=0"),
    ("objective={name: grpo}", r"'grpo' compares samples of the same prompt: set rollouts.samples to 2 or more"),
    ("objective={name: dpo}", r"'dpo' compares samples of the same prompt: set rollouts.samples"),
    ("source={name: dataset}", r"needs either `path` \(logged episodes\) or `player`"),
    (
        "source={name: dataset, path: data/log}",
        r"source.path: there is no 'data/log' here \(a dataset of the hub is named",
    ),
    ("source={name: dataset, path: log.jsonl}", r"source.path: file 'log.jsonl' does not exist \(looked in "),
    ("model.path=./nowhere", r"model.path: there is no './nowhere' here"),
    ("model.path=runs/nowhere", r"model.path: there is no 'runs/nowhere' here"),
    ("model.path=a/b/c", r"model.path: there is no 'a/b/c' here \(a model of the hub is named OWNER/NAME\)"),
    ("model.path=weights.gguf", r"model.path: there is no 'weights.gguf' here"),
    ("evaluation.suite=random_walk", r"no suite called 'random_walk'; did you mean 'random_walks'\?"),
    ("evaluation.suite=suite.yaml", r"evaluation.suite: file 'suite.yaml' does not exist"),
    ("evaluation.suite=mine.yaml", r"mine.yaml is a recipe, not a suite: a suite has a task"),
    ("stages.warmup.training.steps=2", r"the recipe has no stage 'warmup'"),
    ("start=warmup", r"`start`: 'warmup' is no earlier stage"),
    ("training.final=best", r"`training.final=best` keeps the policy with the best score, but nothing is scored"),
]


@pytest.mark.parametrize(("override", "message"), KEYS, ids=[override for override, _ in KEYS])
def test_wrong_keys_and_values(lmrl, place, override, message):
    (place / "mine.yaml").write_text(RECIPE)
    before = checksums(place)
    check_line(lmrl("train", "mine.yaml", "-o", "out", override), message)
    assert checksums(place) == before


FILES = [
    (written("mine.yaml", b"\xff\xfem\x00"), r"mine.yaml: not valid YAML: .*utf-8"),
    (written("mine.yaml", ""), r"missing key 'model' \(mine.yaml\)"),
    (written("mine.yaml", "model:\n\tpath: x\n"), r"mine.yaml, line 2: not valid YAML: .*'\\t'"),
    (
        written("mine.yaml", RECIPE + "training: {steps: 2}\n"),
        r"key 'training' is written twice \(mine.yaml, line 6 and .*keep one",
    ),
    (folder("mine.yaml"), r"'mine.yaml' is a folder, not a recipe: name a recipe's file"),
    (written("mine.yaml", "---\na: 1\n---\nb: 2\n"), r"mine.yaml, line 3: not valid YAML"),
    (
        written("mine.yaml", "model: !!python/object/apply:os.getcwd []\n"),
        r"mine.yaml, line 1: not valid YAML: .*constructor",
    ),
    (written("mine.yaml", "task: {environment: maze}\nmodel: {path: x}\n"), r"missing key 'objective' \(mine.yaml\)"),
]


@pytest.mark.parametrize(("prepare", "message"), FILES, ids=range(len(FILES)))
def test_broken_recipe_files(lmrl, place, prepare, message):
    prepare(place)
    before = checksums(place)
    check_line(lmrl("train", "mine.yaml", "-o", "out"), message)
    assert checksums(place) == before


def test_recipes_suites_and_folders_are_told_apart(lmrl, place):
    written("mine.yaml", RECIPE)(place)
    copied("model")(place)
    check_line(lmrl("eval", "model", "--suite", "mine.yaml"), r"mine.yaml is a recipe, not a suite: a suite has a task")
    check_line(lmrl("show", "model"), r"'model' is a folder, not a recipe: name a recipe's file")
    (place / "run").mkdir()
    written("run/recipe.yaml", RECIPE)(place)
    check_line(lmrl("show", "run"), r"'run' is a folder, not a recipe: name run/recipe.yaml")
    check_line(
        lmrl("cp", "random_walks/ppo", "mine.yaml"), r"mine.yaml exists: choose another destination, or .* --force"
    )
    assert (place / "mine.yaml").read_text() == RECIPE
    code, out, err = lmrl("show", "maze")
    assert code == 0 and "environment: maze" in out and "metrics:" in out and "stage main" not in out and not err


def test_version(lmrl):
    code, out, err = lmrl("--version")
    assert code == 0 and out.startswith("lmrl ") and out.count("\n") == 1 and not err


def test_brackets_of_descriptions_are_listed(lmrl, monkeypatch):
    monkeypatch.setattr("lmrl.cli.ls.listing", lambda kind: {"one": "Share [in %] of [bold]right[/bold] answers"})
    _, out, _ = lmrl("ls", "suites")
    assert "Share [in %] of [bold]right[/bold] answers" in " ".join(out.split())


def test_a_dry_run_wants_the_trackers_of_the_real_one(lmrl, place, monkeypatch):
    from importlib import util

    (place / "mine.yaml").write_text(RECIPE)
    real = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *more: None if name == "wandb" else real(name, *more))
    message = r"tracking.trackers.0: 'wandb' is not installed: install the extra 'tracking'"
    check_line(lmrl("train", "mine.yaml", "--dry-run", "tracking.trackers=[wandb]"), message)
