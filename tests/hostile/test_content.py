"""Hostile and unlucky input: one clear line that names thing, place and fix, exit code 2, and nothing is written."""

import json
import re

import pytest
from harness import check_line

from lmrl.errors import LmrlError
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.recipe import Prompts, PromptTask
from lmrl.recipe.files import load_recipe
from lmrl.rollouts.task import build_task
from lmrl.trajectories.render import Renderer
from lmrl.trajectories.store import DatasetFile

RECIPE = """
model: {config: {model_type: llama}}
task: {environment: random_walks, graph: 3, history: 2}
objective: {name: ppo}
stages: {warmup: {source: {name: dataset, player: random}, objective: {name: likelihood}}}
"""


def bomb(levels=12, width=10):
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


FILES = [
    (bomb(), r"mine.yaml, line \d+: has more than 100000 values when its aliases are written out"),
    ("model: &m {config: *m}", r"mine.yaml, line \d+: refers to itself by an alias"),
    ("&a [*a]", r"mine.yaml, line 1: refers to itself by an alias"),
    ("model: " + "[" * 3000 + "]" * 3000, "mine.yaml: is nested too deeply to be a recipe"),
    ("model: 2024-99-99", r"mine.yaml.*: not valid YAML|wrong value for 'model'"),
    ("[1, 2]", "contains a sequence, but a recipe is a mapping"),
    ("model: \x00", r"mine.yaml.*: not valid YAML"),
]


@pytest.mark.parametrize(("text", "message"), FILES, ids=range(len(FILES)))
def test_files_that_are_not_recipes(lmrl, tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    check_line(lmrl("show", "mine.yaml"), message)


OVERRIDES = [
    ("optimizer.lr=.inf", r"wrong value for 'optimizer.lr' \(override optimizer.lr=.inf\): .*finite number"),
    ("optimizer.eps=.inf", r"wrong value for 'optimizer.eps' .*finite number"),
    ("optimizer.eps=.nan", r"wrong value for 'optimizer.eps' .*finite number"),
    ("objective.kl_coef=.inf", r"wrong value for 'objective.kl_coef' .*finite number"),
    ("optimizer.betas=[.nan, 2]", r"wrong value for 'optimizer.betas.0' .*finite number"),
    ("optimizer.betas=[0.9, 2]", r"wrong value for 'optimizer.betas.1' .*less than 1"),
    ("optimizer.betas=[true, 0.9]", r"optimizer.betas: expected a number, got true"),
    ("optimizer.lr=true", r"optimizer.lr: expected a number, got true \(override optimizer.lr=true\)"),
    ("training.steps=true", r"training.steps: expected a number, got true"),
    ("training.steps='7'", r"training.steps: expected a number, got the text '7': leave out the quotes"),
    ("training.max_nonfinite=.inf", r"wrong value for 'training.max_nonfinite'"),
    ("rollouts.prompts=100000000000", r"wrong value for 'rollouts.prompts' .*less than or equal to 1000000"),
    ("rollouts.samples=100000000000", r"wrong value for 'rollouts.samples'"),
    ("rollouts.temperature=-.inf", r"wrong value for 'rollouts.temperature'"),
    ("stages.warmpu.training.steps=2", r"the recipe has no stage 'warmpu'; did you mean 'warmup'\?"),
    ("stages.main.training.steps=2", r"stages.main is what the top-level keys describe: set training.steps"),
    ("stages.../../evil={training: {steps: 1}}", r"cannot name a stage|no stage"),
    ("stages={'../../evil': {training: {steps: 1}}}", r"stages: '../../evil' cannot name a stage"),
    ("stages={'': {training: {steps: 1}}}", r"stages: '' cannot name a stage"),
    ("training.steps=" + "[" * 3000, r"override 'training.steps=\[+': the value is not valid YAML"),
    ("training.steps=&a [*a]", r"refers to itself by an alias"),
    ("training.seed=9223372036854775808", r"training.seed: expected a number of at most 9223372036854775807"),
    ("training.threads=1000000000000", r"wrong value for 'training.threads'.*less than or equal to 4096"),
    ("model.config.hidden_size=0", "config.hidden_size.*at least 1, got 0"),
    ("model.config.num_hidden_layers=-2", "config.num_hidden_layers.*at least 1, got -2"),
    ("task.special_tokens=maybe", r"wrong value for 'task.special_tokens' .*'text' or 'parse'"),
]


@pytest.mark.parametrize(("override", "message"), OVERRIDES, ids=[one[:40] for one, _ in OVERRIDES])
def test_invalid_values(lmrl, tmp_path, override, message):
    (tmp_path / "mine.yaml").write_text(RECIPE)
    check_line(lmrl("show", "mine.yaml", override), message)


def test_an_override_below_a_number(lmrl, tmp_path):
    (tmp_path / "mine.yaml").write_text(RECIPE + "optimizer: {betas: [0.9, 0.95]}\n")
    check_line(
        lmrl("show", "mine.yaml", "optimizer.betas.1.x=2"), "'optimizer.betas.1' is a single value and has no keys"
    )


def test_the_middle_of_a_long_line_is_left_out(lmrl, tmp_path):
    (tmp_path / "mine.yaml").write_text(RECIPE + f"? {'x' * 5000}\n: 1\n")
    code, _, err = lmrl("show", "mine.yaml")
    assert code == 2 and len(err) < 1600
    assert err.startswith("lmrl: unknown key 'xxx") and re.search(r"x \[\.\.\. \d+ characters \.\.\.\] ", err)


def test_another_environment_keeps_what_holds_for_any(lmrl, tmp_path):
    (tmp_path / "mine.yaml").write_text(RECIPE)
    code, out, err = lmrl("show", "mine.yaml", "task.environment=maze")
    assert code == 0 and "environment: maze" in out and "history: 2" in out and "graph" not in out
    assert err == (
        "lmrl: note: override task.environment=maze leaves out task.graph of the recipe, which may not fit it\n"
    )


# ------------------------------------------------------------------------------------------------------------------- data
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PROMPTS = [
    ({"prompt": None}, "has no field 'prompt'"),
    ({"prompt": 3}, "field 'prompt' is 3; expected text or a list of messages"),
    ({"prompt": True}, "field 'prompt' is True"),
    ({"prompt": []}, "field 'prompt' is empty; expected messages"),
    ({"prompt": ["a"]}, "field 'prompt' holds 'a'; expected messages with text in 'role' and 'content'"),
    ({"prompt": [{"role": "user", "content": None}]}, "expected messages with text in 'role' and 'content'"),
    ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "text in 'role' and 'content'"),
    (
        {"prompt": [{"role": "narrator", "content": "a"}]},
        "a message with the role 'narrator'; expected one of system, ",
    ),
    ({"prompt": [{"content": "a"}]}, "expected messages with text in 'role' and 'content'"),
    ({"prompt": "\ud800"}, r"holds the lone surrogate \\ud800"),
    ({"prompt": [{"role": "user", "content": "a\udfff"}]}, r"holds the lone surrogate \\udfff"),
    ("[" * 100_000, "not valid JSON: nested too deeply"),
    ('{"prompt": ' + "9" * 5000 + "}", "not valid JSON"),
    ("[1]", "holds a list; expected one object per line"),
    ('{"prompt": "a"', "not valid JSON"),
]


@pytest.mark.parametrize(("row", "message"), PROMPTS, ids=[str(row)[:40] for row, _ in PROMPTS])
def test_invalid_prompts(tmp_path, row, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    section = PromptTask(prompts=Prompts(path=str(path)))
    check_data(lambda: build_task(section, build_tokenizer("char", ["abc"])), path, message)


ROWS = [
    ({"messages": [*CHAT, {"role": "robot", "content": "c"}, CHAT[1]]}, "the role 'robot'; expected one of system"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, "text in 'role' and 'content'"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": ["x"]}]}, "has the tool call 'x'"),
    ({"prompt": "a\ud800", "completion": "b"}, r"holds the lone surrogate \\ud800"),
    ({"prompt": "a", "completion": "b", "reward": "1"}, "field 'reward' holds '1'; expected a finite number"),
    ({"turns": [{"observation": "a", "action": "b"}], "columns": 3}, "field 'columns' is 3; expected an object"),
    ({"turns": [{"observation": "a", "action": "b", "messages": "{"}]}, "field 'messages' is '{'; expected JSON"),
]


@pytest.mark.parametrize(("row", "message"), ROWS, ids=[str(row)[:60] for row, _ in ROWS])
def test_invalid_logged_rows(tmp_path, row, message):
    path = tmp_path / "log.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + json.dumps(row) + "\n")
    check_data(lambda: DatasetFile(str(path), Renderer(build_tokenizer("char", ["abc"]))), path, message)


def check_data(read, path, message):
    with pytest.raises(LmrlError, match=message) as caught:
        read()
    text = str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in text and str(path) in text
    assert "line 2" in text or "row 2" in text


def test_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "b"}\n')
    task = build_task(PromptTask(prompts=Prompts(path=str(path))), build_tokenizer("char", ["abc"]))
    assert [row["prompt"] for row in task.make().rows] == ["a", "b"]


# ------------------------------------------------------------------------------------------------------------ the machine
@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "/data/x"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line(lmrl, monkeypatch, error):
    code, _, err = fail_with(error, lmrl, monkeypatch)
    assert code == 1 and err.startswith("lmrl: no space is left on the disk") and err.count("\n") == 1
    assert "free some space, then repeat the command, for a run with --resume: its checkpoints are whole" in err


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (OSError(27, "File too large"), ""),
        (OSError(27, "File too large", "/data/x"), " for /data/x"),
        (RuntimeError("Error while serializing: I/O error: File too large (os error 27)"), ""),
    ],
)
def test_a_limit_of_file_size_is_one_line(lmrl, monkeypatch, error, place):
    code, _, err = fail_with(error, lmrl, monkeypatch)
    assert code == 1 and err == (
        f"lmrl: a file would be larger than its limit{place}: raise that (ulimit -f), then repeat the command, for a "
        "run with --resume: its checkpoints are whole\n"
    )


def fail_with(error, lmrl, monkeypatch):
    def full(*_):
        raise error

    monkeypatch.setattr("lmrl.recipe.files.find_yaml", full)
    return lmrl("show", "random_walks/ppo")


def test_a_path_that_cannot_be_written_is_one_line(lmrl, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "model").mkdir()
    model = ("--messages", str(tmp_path / "rows.jsonl"), "--model", str(tmp_path / "model"))
    code, _, err = lmrl("new", str(tmp_path / "file" / "mine.yaml"), *model)
    assert code == 2 and err == f"lmrl: {tmp_path}/file: cannot be used: File exists\n"


def test_recipes_that_hold_objects():
    with pytest.raises(LmrlError, match="^model: needs `path` .* or `config`"):
        load_recipe({"model": {}})
    with pytest.raises(LmrlError, match="a recipe is a name, a file"):
        load_recipe(7)
