"""The command line as users see it: every command in a separate process, from another folder."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lmrl.cli.commands import COMMANDS, load_command
from lmrl.cli.ls import ENGINES, SHIPPED, TRACKERS
from lmrl.plugins import registry
from lmrl.recipe import ENVIRONMENTS, OBJECTIVES, SOURCES, PromptTask
from lmrl.recipe.files import load_recipe, shipped_names
from lmrl.shipped import shipped_file
from tests import forking

ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def lmrl(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    return forking.run(list(map(str, arguments)), env=ENV, cwd=cwd)


def test_ls(tmp_path):
    done = lmrl("ls", cwd=tmp_path)
    assert done.returncode == 0
    for name in ("random_walks/ppo", "sentiment/ppo", "likelihood", "lmrl.reward_models.sentiment.sentiment", "suites"):
        assert name in done.stdout
    assert "ppo" not in lmrl("ls", "suites").stdout
    assert "did you mean 'suites'" in lmrl("ls", "suite").stderr


def test_cp_then_show_and_dry_run(tmp_path):
    done = lmrl("cp", "random_walks/bc", "mine.yaml", cwd=tmp_path)
    assert done.stdout.strip() == "mine.yaml" and (tmp_path / "mine.yaml").is_file()
    assert "exists" in lmrl("cp", "random_walks/bc", "mine.yaml", cwd=tmp_path).stderr
    done = lmrl("show", "mine.yaml", "training.steps=9", cwd=tmp_path)
    assert "steps: 9" in done.stdout and "memory: about" in done.stdout
    assert "1000 prompts" not in done.stdout and "128 prompts x 1 sample = 128 episodes" in done.stdout
    assert lmrl("cp", "sentiment.py", cwd=tmp_path).returncode == 0 and (tmp_path / "sentiment.py").is_file()


def test_text_that_the_output_cannot_encode_is_escaped(tmp_path):
    """As under PYTHONIOENCODING=ascii."""
    code = "import sys; sys.stdout.reconfigure(encoding='ascii', errors='strict')\n" + forking.COMMAND
    done = forking.run(["show", "random_walks/bc", "description='2 ± 1'"], code=code, env=ENV, cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "description: 2 \\xb1 1"), done.stderr


HEAVY = ("torch", "transformers", "gymnasium", "numpy", "accelerate", "datasets")


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        (["--help"], (*HEAVY, "pydantic", "yaml", "rich", "lmrl.recipe", "lmrl.launch", "lmrl.cli.train")),
        (["ls"], (*HEAVY, "lmrl.recipe", "lmrl.environments")),
        (["ls", "objectives"], (*HEAVY, "lmrl.recipe")),
        (["show", "random_walks/ppo"], HEAVY),
    ],
)
def test_light_commands_import_no_more_than_they_need(command, absent):
    code = "import sys; sys.argv = ['lmrl', *sys.argv[1:]]\nfrom lmrl.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, env=ENV)
    imported = done.stdout.strip().splitlines()[-1]
    assert "'lmrl.cli'" in imported
    assert [name for name in absent if f"'{name}'" in imported] == []


def test_help_lists_each_verb_with_its_own_text():
    listed = lmrl("--help").stdout
    for name, text in COMMANDS.items():
        assert load_command(name).help.split("\n")[0] == text
        assert f"  {name} " in listed
    assert "--skip-bad-rows" in lmrl("train", "--help").stdout and "serve" in lmrl("reward", "-h").stdout
    unknown = lmrl("trian")
    assert unknown.returncode == 2 and "no such command 'trian'; did you mean 'train'?" in unknown.stderr


@pytest.mark.parametrize(
    ("kind", "sections"), [("environments", ENVIRONMENTS), ("objectives", OBJECTIVES), ("sources", SOURCES)]
)
def test_ls_reads_the_docstrings_of_the_sections(kind, sections):
    assert SHIPPED[kind]() == {name: " ".join(cls.__doc__.split("\n\n")[0].split()) for name, cls in sections.items()}


def test_ls_knows_every_shipped_engine_and_tracker():
    for kind, texts in (("engine", ENGINES), ("tracker", TRACKERS)):
        assert list(texts) == list(registry.SHIPPED[kind])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "random_walks/pppo"],
            "lmrl: no recipe called 'random_walks/pppo'; did you mean 'random_walks/ppo'?",
        ),
        (["train", "random_walks/ppo", "objective.clp=1"], "lmrl: unknown key 'objective.clp'"),
        (["train"], "lmrl: name a recipe"),
        (["train", "--resume"], "lmrl: there is no run to resume under runs/"),
        (["train", "random_walks/ppo", "--resume"], "lmrl: --resume needs the run"),
        (["eval", "nowhere/at/all", "--suite", "random_walks"], "lmrl: policy: there is no 'nowhere/at/all' here"),
        (["chat", "http://localhost:1/v1#m"], "lmrl: policy: 'http://localhost:1/v1#m' is an address, but weights are"),
        (["eval", ".", "--suite", "random_walk"], "lmrl: no suite called 'random_walk'"),
        (["replay", ".", "--episode", "main/train/1/0"], "lmrl: --episode: samples.jsonl does not exist"),
        (["replay", "."], "lmrl: . is not a bundle (expected a folder below RUN/bundles/)"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    done = lmrl(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback():
    done = lmrl("show", "nothing", "--debug")
    assert "Traceback" in done.stderr and "RecipeError" in done.stderr


COMPLETE = [
    name
    for name in shipped_names("recipes")
    if "arguments" not in yaml.safe_load(shipped_file("recipes", name).read_text())
]


@pytest.mark.parametrize("name", COMPLETE)
def test_every_shipped_recipe_is_tried(name, tmp_path, tiny_folder):
    """A recipe with a hub model is tried with a tiny local one, and one with a hub dataset with a few rows; no files are left."""
    recipe, overrides = load_recipe(name), []
    if recipe.model.path is not None:
        overrides.append(f"model.path={tiny_folder}")
    if isinstance(recipe.task, PromptTask):
        overrides.append("task.prompts.max_tokens=200")
    pairs = [json.dumps({"prompt": f"{n}: ", "chosen": "yes", "rejected": "no"}) + "\n" for n in range(8)]
    data = tmp_path.parent / f"{tmp_path.name}.jsonl"
    data.write_text("".join(pairs))
    if getattr(recipe.source, "path", None) is not None:
        overrides.append(f"source.path={data}")
    elif isinstance(recipe.task, PromptTask) and not Path(recipe.task.prompts.path).is_file():
        overrides.append(f"task.prompts.path={data}")
    for stage, changes in recipe.stages.items():
        if changes.get("source", {}).get("path"):
            overrides.append(f"stages.{stage}.source.path={data}")
    done = lmrl("train", name, *overrides, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "dry run passed" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_train_resume_and_eval(tmp_path):
    """A recipe of one's own with its own environment, objective options and tracker, from another folder."""
    (tmp_path / "world.py").write_text(
        "import lmrl\n"
        "class Echo(lmrl.TextEnvironment):\n"
        "    num_starts = 3\n"
        "    def __init__(self, letter='a'): self.letter = letter\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        super().reset(seed=seed)\n"
        "        return 'xyz'[options['start']], {}\n"
        "    def step(self, action):\n"
        "        return '', float(action.count(self.letter)), True, False, {'metrics': {'letters': len(action)}}\n"
        "    def texts(self): return ['abcxyz']\n"
    )
    (tmp_path / "suite.yaml").write_text(
        "task: {environment: world.py:Echo}\nrollouts: {max_new_tokens: 4}\nmetrics: [return]\n"
    )
    (tmp_path / "echo.yaml").write_text(
        "model: {config: {model_type: gpt2, n_embd: 16, n_layer: 1, n_head: 2, n_positions: 32}}\n"
        "task: {environment: world.py:Echo, letter: b}\n"
        "rollouts: {prompts: 6, max_new_tokens: 4}\n"
        "objective: {name: ppo}\n"
        "training: {steps: 3, checkpoint_every: 1, threads: 1}\n"
        "evaluation: {suite: suite.yaml}\n"
        "tracking: {trackers: [tensorboard]}\n"
    )
    done = lmrl("train", "echo.yaml", "--output", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "evaluation at step 3" in done.stdout and "Result" in done.stdout
    run = tmp_path / "run"
    for name in ("recipe.yaml", "versions.json", "metrics.jsonl", "samples.jsonl", "results.json"):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "trackers").rglob("events.out.tfevents*"))
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[-1])
    assert {"stage", "step", "prompt", "completion", "reward", "components"} <= set(sample)
    assert len(list((run / "stages/main/checkpoints").iterdir())) <= 3
    done = lmrl("train", "run", "--resume", cwd=tmp_path)
    assert "stage main is finished: not run again" in done.stdout
    done = lmrl("eval", "run", "--suite", "suite.yaml", "--json", "out/scores.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert scores["suite"] == "suite.yaml" and scores["policy"] == "run" and scores["metrics"]["return"]["n"] == 3
    results = json.loads((run / "results.json").read_text())
    assert scores["metrics"]["return"] == results["PPO"]["return"]
    done = lmrl("eval", "run", "--fail-under", "return=99", "--fail-under", "length=0", "samples=1", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("lmrl: return of policy is ") and "below 99" in done.stderr
    assert "95 % intervals hold for new samples of these start states\n" in done.stdout
    assert "played: all 3 start states, 1 fresh episode from each\n" in done.stdout
    done = lmrl("eval", "run", "--fail-under", "reward=0", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.endswith("this evaluation has return, letters, length\n")
    bad = (tmp_path / "world.py").read_text().replace("float(action.count(self.letter))", "1 / 0")
    (tmp_path / "world.py").write_text(bad)
    done = lmrl("train", "echo.yaml", "--output", "bad", cwd=tmp_path)
    assert (
        done.returncode == 2
        and "failed on" in done.stderr
        and "environment '" in done.stderr
        and "ZeroDivisionError" in done.stderr
    )


@pytest.mark.parametrize(("command", "limit"), [(["--help"], 0.3), (["ls"], 0.9), (["show", "random_walks/ppo"], 0.9)])
def test_light_commands_take_little_time(command, limit):
    """CPU seconds, best of four, so that the load of other processes does not matter."""
    times = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert lmrl(*command).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < limit, times
