"""The model card of an export, and pushing it to a local hub."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

import lmrl
from lmrl.errors import RunError
from lmrl.evaluation.card import _in_vllm
from lmrl.evaluation.export import export
from lmrl.run import RESULTS_FILE
from lmrl.run_folders import RECIPE_FILE

PAIRS = [{"prompt": f"say {letter}", "completion": letter} for letter in "abcdefgh"]
SCORE = {"mean": 0.5, "ci95": [0.4, 0.6], "n": 40, "clusters": 8, "holds_for": "other prompts like these"}


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    """Two runs on the tiny model, of all weights and of an adapter, with scores as a longer run has them."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    given = [f"model.path={tiny_folder}", f"data.path={data}", "training.steps=2", "source.batch_size=4"]
    lmrl.train("sft", [*given, "model.lora=null"], folder / "all")
    lmrl.train("sft", [*given, "model.lora.r=4"], folder / "lora")
    for name in ("all", "lora"):
        (folder / name / RESULTS_FILE).write_text(json.dumps({"start": {}, "SFT": {"reward": SCORE}}))
    return folder


def card(folder):
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_card_of_a_whole_model(runs, tiny_folder, tmp_path):
    export(runs / "all", tmp_path / "out")
    front, body = card(tmp_path / "out")
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["lmrl", "likelihood"]}
    assert f"began from `{tiny_folder.name}`" in body and "objective `likelihood`, 2 steps, seed 0, all weights" in body
    assert "| SFT | 0.500 ± 0.100 |" in body and "which hold for other prompts like these" in body
    assert "logged data: `pairs.jsonl`" in body and "vllm serve out" in body
    assert str(runs) not in body and str(tiny_folder.parent) not in body  # no folders of this machine
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", body, re.DOTALL)[1])
    assert recipe["training"]["steps"] == 2 and recipe["source"]["path"] == "pairs.jsonl"
    assert re.search(r"python 3\.\d+\.\d+, lmrl ", body) and "torch 2" in body


def test_the_code_of_a_card_runs(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for options in ({}, {"adapter_only": True}):
        destination = Path(f"out{len(options)}")
        export(runs / "lora", destination, **options)
        code = re.search(r"```python\n(.*?)```", card(destination)[1], re.DOTALL)[1]
        exec(compile(code.replace("max_new_tokens=64", "max_new_tokens=3"), "card", "exec"), {})
        assert "[user]..." in capsys.readouterr().out  # the chat template was used


def test_card_of_an_adapter(runs, tiny_folder, tmp_path):
    export(runs / "lora", tmp_path / "out", adapter_only=True)
    front, body = card(tmp_path / "out")
    assert front["library_name"] == "peft" and "base_model" not in front  # a folder is no name on the hub
    assert f"`{tiny_folder.name}` has to be where" in body and "--max-lora-rank 8" in body
    assert "AutoPeftModelForCausalLM.from_pretrained" in body and "A LoRA adapter" in body


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"r": 4}, "--max-lora-rank 8 "),
        ({"r": 24}, "--max-lora-rank 32 "),
        ({"r": 513}, "vLLM cannot load"),
        ({"r": 8, "use_dora": True}, "vLLM cannot load"),
        ({"r": 8, "modules_to_save": ["lm_head"]}, "vLLM cannot load"),
    ],
)
def test_the_command_for_vllm_is_one_that_it_takes(adapter, said):
    assert said in _in_vllm(adapter, "base", "mine")


def test_names_on_the_hub_are_named(runs, tmp_path):
    recipe = yaml.safe_load((runs / "all" / RECIPE_FILE).read_text())
    run = tmp_path / "run"
    (run / "stages/main").mkdir(parents=True)
    (run / "stages/main/final").symlink_to(runs / "all/stages/main/final")
    recipe["model"]["path"] = "owner/base"
    recipe["source"]["path"] = recipe["task"]["prompts"]["path"] = "owner/pairs"
    (run / RECIPE_FILE).write_text(yaml.safe_dump(recipe))
    from lmrl.evaluation.card import write_card

    (tmp_path / "out").mkdir()
    write_card(tmp_path / "out", run, "me/mine", "step-5", beta=4)
    front, body = card(tmp_path / "out")
    assert front["base_model"] == "owner/base" and front["datasets"] == ["owner/pairs"]
    assert body.count("https://huggingface.co/datasets/owner/pairs") == 1 and 'from_pretrained("me/mine")' in body
    assert "checkpoint `step-5`" in body and "Q values of weight 4" in body and "## Metrics" not in body


# -------------------------------------------------------------------------------------------------------------------- hub
@contextmanager
def stub_hub(refuse=None):
    """A hub that takes one repository; yields its address and what was uploaded by path."""
    seen = {"files": {}, "created": [], "tokens": set()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.answer(404, {"error": "not found"})

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            seen["tokens"].add(self.headers.get("Authorization"))
            if refuse:
                self.answer(refuse, {"error": "no right"})
            elif self.path == "/api/repos/create":
                seen["created"].append(json.loads(body))
                self.answer(200, {"url": f"{self.host}/me/mine", "id": "me/mine"})
            elif self.path == "/api/validate-yaml":
                self.answer(200, {"errors": [], "warnings": []})
            elif self.path.endswith("/preupload/main"):
                files = [
                    {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for one in json.loads(body)["files"]
                ]
                self.answer(200, {"files": files})
            elif self.path.endswith("/commit/main"):
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        seen["files"][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                self.answer(200, {"commitUrl": f"{self.host}/me/mine/commit/abc", "commitOid": "abc"})
            else:
                self.answer(404, {"error": self.path})

        @property
        def host(self):
            return f"http://127.0.0.1:{server.server_address[1]}"

        def answer(self, code, content):
            data = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def pushed(url, *arguments):
    settings = {
        "HF_ENDPOINT": url,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_secretsecretsecret",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-m", "lmrl", "export", *map(str, arguments)]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120)


def test_an_export_is_pushed(runs, tmp_path):
    with stub_hub() as (url, seen):
        done = pushed(url, runs / "all", tmp_path / "out", "--push", "me/mine", "--private")
    assert done.returncode == 0, done.stderr
    assert seen["created"][0]["name"] == "mine" and seen["created"][0]["organization"] == "me"
    assert seen["created"][0].get("private") or seen["created"][0].get("visibility") == "private"
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert seen["files"] == files and {"README.md", "model.safetensors", "config.json"} <= set(files)
    assert b'from_pretrained("me/mine")' in files["README.md"]
    assert seen["tokens"] == {"Bearer hf_secretsecretsecret"} and "me/mine" in done.stdout


def test_a_refused_push_exports_nothing(runs, tmp_path):
    with stub_hub(refuse=403) as (url, seen):
        done = pushed(url, runs / "all", tmp_path / "out", "--push", "me/mine")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "--push me/mine: " in done.stderr and "set HF_TOKEN" in done.stderr and "hf_secret" not in done.stderr


def test_refused_options_create_no_repository(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("lmrl.evaluation.export.prepare", lambda *_: pytest.fail("a repository was created"))
    for options in ({"distill": 1}, {"beta": 1.0, "adapter_only": True}):
        with pytest.raises(RunError, match="--adapter-only|--beta B"):
            export(runs / "all", tmp_path / "out", push_to="me/mine", **options)


def test_a_name_without_an_owner_is_refused(runs, tmp_path):
    with pytest.raises(RunError, match="expected OWNER/NAME"):
        export(runs / "all", tmp_path / "out", push_to="mine")
