"""Broken data files, rewards and environments: the file and the row, or the function, are named; the run's folder stays free."""

import shlex

import pytest
from harness import check_line, checksums, copied, cut, folder, removed, written, zipped

RECIPE = """
model: {path: model}
task: {prompts: {path: prompts.jsonl}, rewards: [{function: "reward.py:good"}]}
rollouts: {max_new_tokens: 3, prompts: 2}
objective: {name: ppo}
training: {steps: 1}
evaluation: {suite: null}
"""
GOOD = "def good(prompts, completions, **columns):\n    return [float(len(one)) for one in completions]\n"
PROMPTS = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
ENVIRONMENT = """
class Env:
    def reset(self, seed=None, options=None):
        return "go", {}
    def step(self, action):
        return RETURNED
"""


def starts(place):
    for prepare in (copied("model"), written("mine.yaml", RECIPE), written("reward.py", GOOD)):
        prepare(place)
    written("prompts.jsonl", PROMPTS)(place)


NO_TEMPLATE = removed("model/chat_template*")
DATA = [
    ([written("prompts.jsonl", "")], "", r"prompts.jsonl: holds no rows"),
    ([written("prompts.jsonl", "\n\n")], "", r"prompts.jsonl: holds no rows"),
    ([written("prompts.jsonl", [{"txt": "a"}])], "", r"prompts.jsonl, row 1: has no field 'prompt' \(fields: txt\)"),
    ([], "task.prompts.column=promt", r"prompts.jsonl, row 1: has no field 'promt' \(fields: prompt\)"),
    ([written("prompts.jsonl", "{'prompt': 'a'}\n")], "", r"prompts.jsonl, line 1: not valid JSON: .*double quotes"),
    ([written("prompts.jsonl", '{\n  "prompt": "a"\n}\n')], "", r"prompts.jsonl, line 1: not valid JSON"),
    (
        [written("prompts.jsonl", '[{"prompt": "a"}]')],
        "",
        r"prompts.jsonl, line 1: holds a list; expected one object per line",
    ),
    ([written("prompts.jsonl", b'{"prompt": "caf\xe9"}\n')], "", r"prompts.jsonl, line 1: not valid UTF-8 text"),
    ([written("prompts.jsonl", '{"prompt": "a"}\n'.encode("utf-16"))], "", r"prompts.jsonl, line 1: not valid UTF-8"),
    (
        [written("prompts.jsonl", [{"prompt": "a" * 3000}])],
        "",
        r"prompts.jsonl: every prompt is longer than task.prompts.max_t",
    ),
    (
        [written("prompts.txt", "a")],
        "task.prompts.path=prompts.txt",
        r"prompts.txt: unknown file type; expected .jsonl",
    ),
    ([written("p.parquet", "a")], "task.prompts.path=p.parquet", r"p.parquet: cannot be read: Parquet file size"),
    ([written("p.jsonl.gz", "a")], "task.prompts.path=p.jsonl.gz", r"p.jsonl.gz: cannot be read: Not a gzipped file"),
    (
        [zipped("p.jsonl.gz", '{"prompt": "a"}\n'), cut("p.jsonl.gz")],
        "task.prompts.path=p.jsonl.gz",
        r"p.jsonl.gz: cannot",
    ),
    ([written("p.csv", 'a,b\n"1,2\n3')], "task.prompts.path=p.csv", r"p.csv: cannot be read: CSV parse error"),
    ([folder("empty")], "task.prompts.path=empty", r"empty: the folder holds neither Parquet shards .* nor a dataset"),
    ([], "task.prompts.path=promts.jsonl", r"task.prompts.path: file 'promts.jsonl' does not exist \(looked in "),
    ([], "task.prompts.path=prompts", r"there is no 'prompts' here: did you mean 'prompts.jsonl'\?"),
    ([folder("data")], "task.prompts.path=data/prompts", r"there is no 'data/prompts' here \(a dataset of the hub"),
    ([], "task.prompts.holdout=1", r"`task.prompts.holdout`: 1 holds out all prompts.*set it below 1"),
    ([], "task.prompts.limit=0", r"wrong value for 'task.prompts.limit' .*greater than or equal to 1"),
    ([], "task.prompts.system=Hi", r"`system` needs `chat: true`"),
    (
        [NO_TEMPLATE],
        "task.prompts.chat=true",
        r"tokenizer has no chat template: take an instruct model, or .* `chat: false`",
    ),
    (
        [NO_TEMPLATE, written("prompts.jsonl", [*PROMPTS, {"prompt": [{"role": "user", "content": "a"}]}])],
        "",
        r"prompts.jsonl, row 4: field 'prompt' is a list of messages, but the model's tokenizer has no chat template .*"
        r"take an instruct model, or give prompts as text",
    ),
    (
        [written("log.jsonl", [{"prompt": "a"}])],
        "'source={name: dataset, path: log.jsonl}' 'objective={name: likelihood}'",
        r"log.jsonl, line 1: .*completion",
    ),
    (
        [written("log.jsonl", [{"prompt": one, "completion": "b"} for one in "defgh"])],
        "'source={name: dataset, path: log.jsonl}' 'objective={name: ilql}'",
        r"log.jsonl, line 1: has no reward, but 'ilql' learns from rewards: add it",
    ),
    (
        [written("log.jsonl", [{"prompt": one, "completion": "b"} for one in "defgh"])],
        "'source={name: dataset, path: log.jsonl}' 'objective={name: dpo}'",
        r"has no reward, but pairs are ranked by rewards",
    ),
    (
        [written("log.jsonl", [{"prompt": "a", "completion": "b"}] * 3)],
        "'source={name: dataset, path: log.jsonl}' 'objective={name: likelihood}' task.prompts.path=prompts.jsonl",
        r"log.jsonl: left out 3 episodes of held-out prompts \(task.prompts.holdout\): add rows",
    ),
    (
        [written("pairs.jsonl", [{"chosen": "ab"}])],
        "'source={name: dataset, path: pairs.jsonl}' 'objective={name: reward_model}'",
        r"pairs.jsonl, line 1: .*rejected",
    ),
]


@pytest.mark.parametrize(("prepares", "overrides", "message"), DATA, ids=range(len(DATA)))
def test_broken_data(lmrl, place, prepares, overrides, message):
    check_refused(lmrl, place, prepares, overrides, message)


REWARDS = [
    ("def good(**columns): pass\n", "", r"reward.py:good returned .*None|NoneType"),
    ("def good(completions, **columns): return [1.0]\n", "", r"reward.py:good returned 1 .*2"),
    (
        "def good(completions, **columns): return ['1', '2']\n",
        "",
        r"reward.py:good, value 1: returned '1' \(str\); expected a number or None",
    ),
    ("def good(completions, **columns): return 1.0\n", "", r"reward.py:good returned"),
    ("def good(completions, **columns): return [float('nan')] * 2\n", "", r"reward.py:good returned nan"),
    ("def good(**columns): raise ValueError('no model')\n", "", r"reward.py:good raised ValueError: no model"),
    (
        "def good(completions, answer): return [1.0, 2.0]\n",
        "",
        r"reward.py:good has the parameter 'answer', but no such column",
    ),
    ("def bad(**columns): pass\n", "", r"task.rewards.0.function: '.*reward.py' defines no 'good'; .*bad"),
    ("def good(:\n", "", r"task.rewards.0.function: importing '.*reward.py' failed: SyntaxError"),
    ("import nopackage\n", "", r"task.rewards.0.function: .* no module named 'nopackage'"),
    ("good = 3\n", "", r"task.rewards.0.function: '.*reward.py:good' is a int, not a function"),
    (GOOD, "task.rewards.0.function=rewards.py:good", r"task.rewards.0.function: file 'rewards.py' does not exist"),
    (
        GOOD,
        "task.rewards.0.function=good",
        r"task.rewards.0.function: no reward is called 'good'; your own code is named file.py:NAME",
    ),
    (GOOD, "task.rewards.0.function=nopackage.f", r"task.rewards.0.function: .* no module named 'nopackage'"),
    (GOOD, "'task.rewards=[{model: judge}]'", r"task.rewards.0.model: .*'judge'.*"),
    (GOOD, "'task.rewards=[{model: model}]'", r"task.rewards.0.model: .*no weights for 'score.weight'.*train it first"),
    (GOOD, "'task.rewards=[{model: stages/rm}]'", r"no stage 'rm' trains a reward model; add one under stages"),
    (GOOD, "'task.rewards=[{function: a.b, url: \"http://x\"}]'", r"a reward is one of `function`, `url` and `model`"),
    (GOOD, "'task.rewards=[{url: \"ftp:/x\"}]'", r"'ftp:/x' is not an address: expected http://... or https://..."),
    (GOOD, "'task.rewards=[]'", r"learns from rewards: list at least one under task.rewards"),
    (GOOD, "task.rewards.0.wieght=2", r"unknown key 'task.rewards.0.wieght' .*did you mean 'task.rewards.0.weight'\?"),
    (GOOD, "task.rewards.1.weight=2", r"the list has no item 'task.rewards.1' \(it has 1\)"),
    (GOOD, "'task.rewards.0.clip=[1, 0]'", r"`clip` is \[LOW, HIGH\] with LOW < HIGH"),
    (GOOD, "task.rewards.0.memory_mb=512", r"`memory_mb` limits worker processes: set `workers` to 1 or more"),
]


@pytest.mark.parametrize(("code", "overrides", "message"), REWARDS, ids=range(len(REWARDS)))
def test_broken_rewards(lmrl, place, code, overrides, message):
    check_refused(lmrl, place, [written("reward.py", code)], overrides, message)


def returning(text):
    return ENVIRONMENT.replace("RETURNED", text)


ENVIRONMENTS = [
    (
        returning("'x', 1.0, True, {}"),
        r"'.*env.py:Env' failed .*step\(\) returned 4 values; .*`done` is `terminated` here",
    ),
    (returning("None"), r"step\(\) returned a NoneType; expected observation, reward, terminated, truncated, info"),
    (returning("3, 1.0, True, False, {}"), r"the observation is 3 \(int\), expected text"),
    (returning("'x', '1', True, False, {}"), r"step\(\) returned the reward '1' \(str\); expected a number"),
    (returning("'x', float('nan'), True, False, {}"), r"step\(\) returned the reward nan"),
    (returning("'x', 1.0, None, False, {}"), r"step\(\) returned terminated=None; expected true or false"),
    (returning("'x', 1.0, True, False, None"), r"step\(\) returned the info None; expected an object"),
    (returning("1 / 0"), r"'.*env.py:Env' failed on 2 of 2 .*environment raised ZeroDivisionError"),
    (
        "class Env:\n    def reset(self, **_): return 'a'\n    def step(self, a): pass\n",
        r"reset\(\) returned a str; expected",
    ),
    (
        "class Env:\n    def reset(self): return 'a', {}\n    def step(self, a): pass\n",
        r"reset\(\) must take gymnasium's arguments: reset\(self, \*, seed=None, options=None\)",
    ),
    ("class Env:\n    def reset(self, **_): return 'a', {}\n", r"task.environment: '.*env.py:Env' has no step\(\)"),
    ("class Other: pass\n", r"task.environment: '.*env.py' defines no 'Env'; .*Other"),
    ("class Env(:\n", r"task.environment: importing '.*env.py' failed: SyntaxError"),
    ("import nopackage\n", r"task.environment: .* no module named 'nopackage'"),
    ("import sys\nsys.exit(0)\n", r"task.environment: importing '.*env.py' failed: SystemExit"),
    ("class Env:\n    def __init__(self, size): pass\n", r"'.*env.py:Env' cannot be made with these options: .*'size'"),
    ("Env = 3\n", r"'.*env.py:Env' cannot be made with these options: .*not callable"),
]


@pytest.mark.parametrize(("code", "message"), ENVIRONMENTS, ids=range(len(ENVIRONMENTS)))
def test_broken_environments(lmrl, place, code, message):
    change = "'task={environment: \"env.py:Env\", max_turns: 3}'"
    check_refused(lmrl, place, [written("env.py", code), edit_task(code)], change, message)


def edit_task(code):
    """A recipe of an environment in place of prompts."""
    text = RECIPE.replace(RECIPE.splitlines()[2], 'task: {environment: "env.py:Env", max_turns: 3}')
    return written("mine.yaml", text)


def check_refused(lmrl, place, prepares, overrides, message):
    starts(place)
    for prepare in prepares:
        prepare(place)
    before = checksums(place)
    check_line(lmrl("train", "mine.yaml", "-o", "out", *shlex.split(overrides)), message)
    left = {name: value for name, value in checksums(place).items() if not name.startswith("out/")}
    assert left == before
    if (place / "out").exists():  # what failed in its first step keeps its samples, and stays free for another try
        assert (place / "out" / "samples.jsonl").exists()


def test_a_refused_run_leaves_its_folder_free(lmrl, place):
    starts(place)
    written("prompts.jsonl", "{}\n")(place)
    check_line(lmrl("train", "mine.yaml", "-o", "deep/out"), r"row 1: has no field 'prompt'")
    assert not (place / "deep").exists()
    written("prompts.jsonl", PROMPTS)(place)
    (place / "failing.py").write_text("def good(**columns): raise ValueError('once')\n")  # reward.py is loaded already
    failing = ("train", "mine.yaml", "-o", "deep/out", "task.rewards.0.function=failing.py:good")
    check_line(lmrl(*failing), r"raised ValueError: once")
    assert not (place / "deep").exists()
    (place / "other.py").write_text(GOOD)
    code, out, err = lmrl("train", "mine.yaml", "-o", "deep/out", "task.rewards.0.function=other.py:good")
    assert code == 0 and not err and (place / "deep/out/stages/main/final").is_dir()
    assert "other.py:good" in (place / "deep/out/recipe.yaml").read_text()
    message = r"deep/out holds a run: continue it with --resume, or choose another --output"
    check_line(lmrl("train", "mine.yaml", "-o", "deep/out", "task.rewards.0.function=other.py:good"), message)


def test_a_byte_order_mark_is_skipped_in_any_file(lmrl, place):
    starts(place)
    mark = b"\xef\xbb\xbf"
    (place / "prompts.jsonl").write_bytes(mark + (place / "prompts.jsonl").read_bytes())
    (place / "mine.yaml").write_bytes(mark + (place / "mine.yaml").read_bytes())
    code, _, err = lmrl("train", "mine.yaml", "-o", "out")
    assert code == 0 and not err
    (place / "prompts.csv").write_bytes(mark + b"prompt\na\nb\nc\n")
    code, _, err = lmrl("train", "mine.yaml", "-o", "two", "task.prompts.path=prompts.csv")
    assert code == 0 and not err


SCORES = [
    ("reward score reward.py:good --data nowhere.jsonl", r"data: there is no 'nowhere.jsonl' here"),
    ("reward score reward.py:good --data rows.jsonl", r"rows.jsonl, line 1: "),
    ("reward score reward.py:good --run nowhere", r"nowhere holds no samples.jsonl"),
    ("reward score rewards.py:good --data prompts.jsonl", r"reward: file 'rewards.py' does not exist \(looked in "),
    ("reward score reward.py --data prompts.jsonl", r"reward: 'reward.py' does not say which function: reward.py:NAME"),
    ("reward score reward.py:goood --data samples.jsonl", r"defines no 'goood'; did you mean 'good'\?"),
    ("reward score reward.py:good --data samples.jsonl -o weight", r"--option weight: expected NAME=VALUE"),
    ("reward score reward.py:good --data samples.jsonl -o a=[", r"--option a=\[: the value is not valid YAML"),
    ("reward check runs/judge", r"reward: there is no 'runs/judge' here"),
    ("reward check modle/", r"reward: there is no 'modle/' here: did you mean 'model'\?"),
    ("reward score model --data samples.jsonl", r"no weights for 'score.weight'.*train it first"),
    ("reward serve reward.py:good --token-env NO_SUCH_TOKEN", r"--token-env: .*NO_SUCH_TOKEN is not set"),
]


@pytest.mark.parametrize(("command", "message"), SCORES, ids=[command for command, _ in SCORES])
def test_rewards_by_themselves(lmrl, place, command, message):
    starts(place)
    written("rows.jsonl", [{"txt": "a"}])(place)
    written("samples.jsonl", [{"prompt": "a", "completion": "b"}])(place)
    before = checksums(place)
    check_line(lmrl(*shlex.split(command)), message)
    assert checksums(place) == before
