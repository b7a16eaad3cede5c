"""examples/plugin: an outside package's objective, engine, environment, listener and tracker, installed and used from recipes."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "examples" / "plugin"
MODEL = {
    "config": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    },
    "tokenizer": "word",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that the package is installed into."""
    scratch = tmp_path_factory.mktemp("plugin")
    build = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    copied = scratch / "source"
    subprocess.run(["cp", "-r", str(PACKAGE), str(copied)], check=True)
    subprocess.run([*build, "--target", str(scratch / "site"), str(copied)], check=True, capture_output=True)
    return scratch / "site"


def lmrl(site: Path, *arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "lmrl", *arguments]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)


def write(folder: Path, **sections) -> str:
    recipe = {"model": MODEL, "task": {"environment": "parity"}, "evaluation": {"suite": None}} | sections
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return str(folder / "recipe.yaml")


def lines(run: Path, kind: str = "train") -> list[dict]:
    read = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in read if line["kind"] == kind]


def test_ls_names_what_is_installed(site):
    listed = lmrl(site, "ls").stdout
    for name in ("tilted", "completions", "parity", "length_log", "json_log"):
        assert any(name in line and "lmrl-example" in line for line in listed.splitlines()), listed
    details = lmrl(site, "ls", "objectives", "tilted").stdout
    assert "Imitation, weighted by exp(return / temperature)" in details
    assert "temperature: number (default 1.0)" in details and "makes an episode count e times" in details


def test_an_objective_learns_and_its_rules_hold(site, tmp_path):
    """Episodes of random play, half of which earn 1: at a low temperature imitation of the good ones is left."""
    recipe = write(
        tmp_path,
        source={"name": "dataset", "player": "random", "episodes": 200, "batch_size": 32},
        objective={"name": "tilted", "temperature": 0.1},
        training={"steps": 150, "checkpoint_every": 0, "threads": 1},
        optimizer={"lr": 1e-2},
        evaluation={"suite": "task", "every": 0, "episodes": 64},
        tracking={"trackers": [{"name": "json_log", "file": "mine.jsonl"}]},
    )
    run = tmp_path / "run"
    done = lmrl(site, "train", recipe, "--output", str(run))
    assert done.returncode == 0, done.stderr
    rows = json.loads((run / "results.json").read_text())
    assert rows["tilted"]["return"]["mean"] > 0.9 > 0.6 > rows["data"]["return"]["mean"]
    config, *logged, result = map(json.loads, (run / "trackers" / "mine.jsonl").read_text().splitlines())
    assert config["config"]["objective.temperature"] == 0.1
    assert [line["step"] for line in logged if "main/nll" in line] == list(range(1, 151))
    assert ["tilted", "return"] in [[row["row"], row["metric"]] for row in result["result"]]
    saved = (run / "recipe.yaml").read_text()
    assert "name: tilted" in saved and "temperature: 0.1" in saved

    wrong = lmrl(site, "train", recipe, "objective.temperature=-1", "--output", str(tmp_path / "wrong"))
    assert wrong.returncode == 2 and "objective.temperature" in wrong.stderr and "greater than 0" in wrong.stderr
    unknown = lmrl(site, "train", recipe, "objective.temprature=1", "--output", str(tmp_path / "unknown"))
    assert unknown.returncode == 2 and "did you mean 'objective.temperature'" in unknown.stderr
    plays = lmrl(site, "train", recipe, "source.name=rollouts", "--output", str(tmp_path / "plays"))
    assert plays.returncode == 2 and "set source.name=dataset" in plays.stderr
    misnamed = lmrl(site, "train", recipe, "objective.name=titled", "--output", str(tmp_path / "misnamed"))
    assert misnamed.returncode == 2 and "tilted" in misnamed.stderr


class Uniform(BaseHTTPRequestHandler):
    """A stub of a model server: each token as likely as any other."""

    vocabulary = 0
    syncs: list[int] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = {}
        if "sync" in body:
            self.syncs.append(body["sync"])
        else:
            drawn = [
                np.random.default_rng(seed).integers(self.vocabulary, size=body["max_tokens"]) for seed in body["seeds"]
            ]
            answer = {
                "tokens": [row.tolist() for row in drawn],
                "logprobs": [[-float(np.log(self.vocabulary))] * len(row) for row in drawn],
            }
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments):
        pass


def test_an_engine_samples_and_a_listener_watches(site, tmp_path):
    server = HTTPServer(("127.0.0.1", 0), Uniform)
    Uniform.vocabulary = 4  # of the tokens of the recipe's model, the first few
    threading.Thread(target=server.serve_forever, daemon=True).start()
    recipe = write(
        tmp_path,
        source={"name": "rollouts"},
        objective={"name": "grpo"},
        rollouts={
            "engine": "completions",
            "options": {"url": f"http://127.0.0.1:{server.server_port}"},
            "prompts": 4,
            "samples": 4,
            "max_new_tokens": 3,
            "tolerance": 5.0,
        },
        training={
            "steps": 2,
            "checkpoint_every": 1,
            "threads": 1,
            "listeners": [{"name": "length_log", "limit": 2}],
        },
    )
    run = tmp_path / "run"
    done = lmrl(site, "train", recipe, "--output", str(run))
    assert done.returncode == 0, done.stderr
    assert "step 1: a completion has 3 tokens, more than 2" in done.stdout
    assert [line["longest"] for line in lines(run)] == [3, 3]
    assert Uniform.syncs and Uniform.syncs == sorted(Uniform.syncs)
    state = json.loads((run / "stages/main/final/state/trainer.json").read_text())
    assert state["listeners"]["length_log"] == {"said": True}
    server.shutdown()


def test_a_name_needs_its_package(tmp_path):
    recipe = write(tmp_path, task={"environment": "maze"}, objective={"name": "tilted"})
    done = lmrl(Path(os.devnull), "train", recipe, "--output", str(tmp_path / "run"))
    assert done.returncode == 2 and "tilted" in done.stderr and len(done.stderr.strip().splitlines()) == 1
