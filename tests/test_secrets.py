"""Keys and passwords stay out of run folders and printed text."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lmrl.errors import LmrlError, RecipeError
from lmrl.recipe import Recipe
from lmrl.recipe.files import load_recipe
from lmrl.run import Run
from lmrl.secrets import expand, is_secret, plain_url, redact, remember
from tests.conftest import TINY_LLAMA
from tests.launcher import launch


# ---------------------------------------------------------------------------------------------------------------- masking
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pass@host/x failed", "https://***@host/x failed"),
        ("override task.rewards.0.options.api_key=abcdefgh of", "override task.rewards.0.options.api_key=*** of"),
        ("got {'api-key': 'abcdefgh', 'x': 1}", "got {'api-key': '***', 'x': 1}"),
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer ***"),
        ("Incorrect API key provided: sk-proj-0123456789abcdef0", "Incorrect API key provided: ***"),
        ("hf_ABCDEFGHIJKLMNOPQRSTUVWX", "***"),
        ("api_key=${OPENAI_API_KEY}", "api_key=${OPENAI_API_KEY}"),
        ("rollouts.max_new_tokens=64 is basic arithmetic", "rollouts.max_new_tokens=64 is basic arithmetic"),
        ("token: 12 of special_tokens=parse, http://host/x@y", "token: 12 of special_tokens=parse, http://host/x@y"),
    ],
)
def test_masked_text(text, expected):
    assert redact(text) == expected


def test_values_of_variables_are_masked(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a1b2c3d4e5")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsehood")
    assert redact("a1b2c3d4e5 abc falsehood") == "*** abc falsehood"
    assert redact("q9w8e7r6") == "q9w8e7r6"
    remember("q9w8e7r6")
    assert redact("q9w8e7r6") == "***"


@pytest.mark.parametrize(
    ("key", "value", "secret"),
    [
        ("api_key", "abcdefgh", True),
        ("openai_api_key", "abcdefgh", True),
        ("password", "hunter22", True),
        ("Authorization", "whatever", True),
        ("token", "abcdefgh", True),
        ("x", "Bearer abcdefgh", True),
        ("x", "sk-0123456789abcdef0", True),
        ("url", "https://me:pass@host", True),
        ("url", "https://host/score?api_key=1", True),
        ("token", "the", False),
        ("eos_token", "<|im_end|>", False),
        ("token_env", "SCORER_TOKEN", False),
        ("special_tokens", "parse", False),
        ("url", "https://host/score?model=a", False),
        ("rubric", "Basic arithmetic: is the secret told?", False),
    ],
)
def test_what_is_a_secret(key, value, secret):
    assert is_secret(key, value) is secret


def test_addresses_in_messages():
    assert plain_url("https://me:pass@host:8/x?key=1#y") == "https://host:8/x"


def test_options_name_variables(monkeypatch):
    monkeypatch.setenv("MINE", "value-of-mine")
    assert expand({"a": ["${MINE}", "x${MINE}", 1]}, "k") == {"a": ["value-of-mine", "x${MINE}", 1]}
    with pytest.raises(RecipeError, match=r"k.a.0: the environment variable ABSENT is not set"):
        expand({"a": ["${ABSENT}"]}, "k")


# ---------------------------------------------------------------------------------------------------------------- recipes
RECIPE = {
    "model": {"config": dict(TINY_LLAMA)},
    "task": {"prompts": {"path": "prompts.jsonl", "holdout": 0}, "rewards": [], "max_failed": 1.0},
    "rollouts": {"prompts": 4, "samples": 4, "max_new_tokens": 4},
    "objective": {"name": "grpo"},
    "training": {"steps": 4, "checkpoint_every": 1},
    "tracking": {"trackers": ["tensorboard"]},
}
HIDDEN = "zq8-hidden-zq8"


def write(folder, **task):
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "say {n}"}}\n' for n in range(4)))
    (folder / "mine.py").write_text(REWARDS)
    path = folder / "mine.yaml"
    path.write_text(json.dumps(RECIPE | {"task": RECIPE["task"] | task}))
    return path


@pytest.mark.parametrize(
    ("reward", "line"),
    [
        ({"function": "mine.py:fine", "options": {"api_key": HIDDEN}}, r"options.api_key: .*write \$\{NAME\} here"),
        (
            {"function": "mine.py:fine", "options": {"a": [{"password": HIDDEN}]}},
            r"options.a.0.password: this is a sec",
        ),
        (
            {"url": f"https://me:{HIDDEN}@host/score"},
            r"rewards.0.url: this is a secret, and a run folder holds its rec",
        ),
        ({"function": "mine.py:fine", "name": f"Bearer {HIDDEN}"}, r"rewards.0.name: .*: leave it out; keys of hubs"),
    ],
)
def test_a_recipe_holds_no_secret(tmp_path, reward, line):
    path = write(tmp_path, rewards=[reward])
    with pytest.raises(RecipeError, match=line) as caught:
        load_recipe(path)
    assert HIDDEN not in str(caught.value)
    recipe = Recipe.model_validate(json.loads(path.read_text()))
    with pytest.raises(LmrlError, match=line):
        Run.create(tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override",
    [
        f"task.rewards=[{{function: mine.py:fine, options: {{api_key: {HIDDEN}}}}}]",
        f"task.api_key={HIDDEN}",
        f"optimizer.lr=https://me:{HIDDEN}@host",
        f"rollouts.server={{urls: ['http://me:{HIDDEN}@host']}}",
    ],
)
def test_refusals_do_not_repeat_a_secret(tmp_path, override):
    done = launch("show", str(write(tmp_path)), override)
    assert done.returncode == 2 and done.stderr.startswith("lmrl: ") and HIDDEN not in done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------- whole runs
REWARDS = """
import os
def fine(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def tells(prompts, completions, key, **columns):
    if "say 1" in prompts:
        raise ValueError(f"the key {key} with {os.environ['OPENAI_API_KEY']} and {os.environ['HF_TOKEN']} was refused")
    return [float("a" in text) for text in completions]
"""
PLANTED = {
    "HF_TOKEN": "planted-hf-token",
    "WANDB_API_KEY": "planted-wandb-key",
    "OPENAI_API_KEY": "planted-openai-key",
    "SCORER": "planted-bearer",
    "MINE": "planted-option",
}


class Scorer(BaseHTTPRequestHandler):
    """Tells in its answers what it was told."""

    seen = set()

    def do_POST(self):
        told = self.headers["Authorization"]
        self.seen.add(told)
        count = len(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompts"])
        answer = {"scores": [None] + [1.0] * (count - 1), "causes": [f"refused {told}"] + [None] * (count - 1)}
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("end", ["well", "nonfinite"])
def test_no_secret_is_left_by_a_run(tmp_path, end):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scorer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_address[1]}"
    rewards = [
        {"name": "plain", "function": "mine.py:fine"},
        {"name": "here", "function": "mine.py:tells", "options": {"key": "${MINE}"}},
        {"name": "worker", "function": "mine.py:tells", "options": {"key": "${MINE}"}, "workers": 1},
        {"name": "bearer", "url": f"http://{address}/", "options": {"token_env": "SCORER"}},
        {"name": "basic", "url": "${SCORER_URL}"},
    ]
    path = write(tmp_path, rewards=rewards)
    secrets = PLANTED | {"SCORER_URL": f"http://me:planted-password@{address}/?x=planted-query"}
    lr = "optimizer.lr=1e30" if end == "nonfinite" else "optimizer.lr=1e-3"
    done = launch("train", str(path), lr, "training.max_nonfinite=1", "--output", str(tmp_path / "run"), **secrets)
    server.shutdown()
    files = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    names = {file.name for file in files}
    assert {"recipe.yaml", "versions.json", "metrics.jsonl", "samples.jsonl"} <= names
    assert any("tfevents" in name for name in names)
    assert (done.returncode, "info.json" in names) == ((0, False) if end == "well" else (1, True)), done.stderr
    basic = base64.b64encode(b"me:planted-password").decode()
    assert Scorer.seen == {"Bearer planted-bearer", f"Basic {basic}"}  # they arrive where they belong
    text = (tmp_path / "run" / "samples.jsonl").read_text()
    assert "was refused" in text and "***" in text  # failures are told, without them
    for place, content in {**files, "output": (done.stdout + done.stderr).encode()}.items():
        for secret in (b"planted", basic.encode()):
            assert secret not in content, (place, content[max(content.find(secret) - 80, 0) :][:160])
