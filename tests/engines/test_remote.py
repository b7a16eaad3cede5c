"""Policies served at an address, with a local server: requests, scores, logs and collected episodes."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import lmrl
from lmrl.cli import app
from lmrl.engines.base import Sampling
from lmrl.engines.remote import Endpoint, RemoteEngine, RemotePolicy
from lmrl.errors import EndpointError, RecipeError, RunError
from lmrl.rewards import http
from lmrl.trajectories.render import Renderer
from tests.stub_openai import chat_answer, stub_openai

SUMS = [{"prompt": f"{n} + {n} = ", "answer": str(2 * n)} for n in range(1, 9)]
REWARD = "def right(completions, answer, **_):\n    return [float(a == b) for a, b in zip(completions, answer)]\n"
GAME = """
import lmrl

class Count(lmrl.TextEnvironment):
    num_starts = 2
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = options["start"]
        return f"at {self.at}", {}
    def step(self, action):
        self.at += 1
        return f"at {self.at}", float(action == f"go {self.at - 1}"), self.at > 2, False, {}
"""


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(http, "FIRST_PAUSE", 0.01)
    monkeypatch.chdir(tmp_path)
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    Path("r.py").write_text(REWARD)
    Path("game.py").write_text(GAME)
    task = {"prompts": {"path": "sums.jsonl", "chat": True}, "rewards": "r.py:right"}
    Path("sums.yaml").write_text(
        yaml.safe_dump({"task": task, "metrics": ["reward"], "rollouts": {"max_new_tokens": 9}})
    )


def adds(path, body, number):
    """Adds, and errs above 12."""
    text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    total = 2 * int(text.split()[0])
    text = str(total if total <= 12 else 0)
    return chat_answer(text) if "messages" in body else {"choices": [{"text": text, "finish_reason": "stop"}]}


def test_a_context_is_sent_as_the_messages_it_was_made_of():
    seen = [{"role": "system", "content": "brief <|end|>"}, {"role": "user", "content": "héllo\n<|user|> 漢"}]
    with stub_openai(lambda path, body, number: chat_answer("<|end|> wörld", finish_reason="stop")) as stub:
        policy = RemotePolicy(f"{stub.url}#m")
        renderer = Renderer(policy.tokenizer, chat=True)
        context = renderer.first(seen)
        (done,) = RemoteEngine(policy).complete(
            [context], Sampling(max_new_tokens=7, temperature=0.5, stop=("x",)), [(1,)]
        )
        then = [*context, *done.tokens, *renderer.next("next", done.tokens[-1])]
    assert policy.decode(done.tokens) == "<|end|> wörld" and done.finish_reason == "eos"
    assert policy.messages(then) == [
        *seen,
        {"role": "assistant", "content": "<|end|> wörld"},
        {"role": "user", "content": "next"},
    ]
    body = stub.seen[0][2]
    assert body["messages"] == seen and (body["max_tokens"], body["temperature"], body["stop"]) == (7, 0.5, ["x"])
    assert isinstance(body["seed"], int) and "top_p" not in body


def test_a_cut_answer_has_no_end():
    with stub_openai(lambda *_: chat_answer("abc", finish_reason="length")) as stub:
        policy = RemotePolicy(f"{stub.url}#m")
        context = Renderer(policy.tokenizer, chat=True).first("x")
        (done,) = RemoteEngine(policy).complete([context], Sampling(), [(1,)])
    assert done.finish_reason == "length" and policy.decode(done.tokens) == "abc" and len(done.tokens) == 3


def test_a_suite_scores_an_address():
    with stub_openai(adds) as stub:
        report = lmrl.evaluate(f"{stub.url}#m", suite="sums.yaml")
    assert report.metrics["reward"]["mean"] == 6 / 8 and len(stub.seen) == 8
    assert len({body["seed"] for _, _, body in stub.seen}) == 8


def test_plain_prompts_are_completed_as_text():
    with stub_openai(adds) as stub:
        report = lmrl.evaluate(f"{stub.url}#m", "sums.yaml", ["task.prompts.chat=false"])
    assert report.metrics["reward"]["mean"] == 6 / 8
    assert {path for path, _, _ in stub.seen} == {"/v1/completions"}
    assert sorted(body["prompt"] for _, _, body in stub.seen) == sorted(row["prompt"] for row in SUMS)


def test_an_endpoint_without_completions_is_explained():
    with stub_openai(lambda *_: (404, {}, {})) as stub:
        with pytest.raises(EndpointError, match="answered 404.*task.prompts.chat=true"):
            lmrl.evaluate(f"{stub.url}#m", "sums.yaml", ["task.prompts.chat=false"])


@pytest.mark.parametrize("chat", [True, False])
def test_a_refused_request_costs_its_sample(chat):
    """As an endpoint with a filter of contents does."""

    def filters(path, body, number):
        text = body["messages"][-1]["content"] if chat else body["prompt"]
        return (400, {}, {"error": "filtered"}) if text.startswith("3 ") else adds(path, body, number)

    with stub_openai(filters) as stub:
        report = lmrl.evaluate(
            f"{stub.url}#m", "sums.yaml", [f"task.prompts.chat={chat}", "task.max_failed=0.2"], log="log"
        )
    assert report.metrics["reward"]["n"] == 7 and report.metrics["reward"]["mean"] == pytest.approx(5 / 7)
    failed = [row for row in map(json.loads, Path("log/samples.jsonl").read_text().splitlines()) if row["failure"]]
    assert len(failed) == 1 and "answered 400" in failed[0]["failure"] and "filtered" in failed[0]["failure"]


def test_a_spent_budget_is_no_lack_of_completions():
    limits = Endpoint(prices=(1e6, 1e6), max_spend=1, connections=1)
    with stub_openai(lambda *_: {"choices": [{"text": "6"}], "usage": {"prompt_tokens": 1}}) as stub:
        with pytest.raises(EndpointError, match="of max_spend=.1$"):
            lmrl.evaluate(f"{stub.url}#m", "sums.yaml", ["task.prompts.chat=false"], endpoint=limits)


def test_an_interrupted_log_goes_on_where_it_was():
    broken = [True]

    def fails(path, body, number):
        return (401, {}, {}) if broken[0] and number >= 4 else adds(path, body, number)

    with stub_openai(fails) as stub:
        address = f"{stub.url}#m"
        with pytest.raises(EndpointError):
            lmrl.evaluate(address, "sums.yaml", log="log", part=2, endpoint=Endpoint(connections=1))
        assert len(Path("log/samples.jsonl").read_text().splitlines()) == 4
        broken[0], before = False, len(stub.seen)
        report = lmrl.evaluate(address, "sums.yaml", log="log")
    assert report.metrics["reward"]["mean"] == 6 / 8 and len(stub.seen) == before + 4
    written = json.loads(Path("log/eval.json").read_text())
    assert written["engine"]["name"] == "openai" and written["policy"]["hash"] == address


def test_the_command_line_scores_with_limits_and_a_cache():
    options = [
        "--endpoint",
        "cache=kept",
        "--endpoint",
        "prices=[1, 2]",
        "--endpoint",
        "max_spend=5",
        "--json",
        "out.json",
    ]
    with stub_openai(adds) as stub:
        for _ in range(2):
            done = CliRunner().invoke(app, ["eval", f"{stub.url}#m", "--suite", "sums.yaml", *options])
            assert done.exit_code == 0, done.output
    assert json.loads(Path("out.json").read_text())["metrics"]["reward"]["mean"] == 6 / 8 and len(stub.seen) == 8


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["eval", "http://user:secret@h/v1#m", "--suite", "sums.yaml"], "an address holds no user or password"),
        (["eval", "http://127.0.0.1:1/v1#m", "--suite", "sums.yaml", "--endpoint", "retry=1"], "unknown key 'retry'"),
        (["eval", "runs/x", "--suite", "sums.yaml", "--endpoint", "retries=1"], "for policies that are addresses"),
        (
            ["eval", "http://127.0.0.1:1/v1#m", "--suite", "sums.yaml", "--checkpoint", "best"],
            "is an address, not a run",
        ),
        (["eval", "http://127.0.0.1:1/v1#m"], "does not say what it was trained for: name a suite"),
        (["collect", "http://127.0.0.1:1/v1#m"], "name what to play, --environment NAME"),
    ],
)
def test_mistakes(arguments, said):
    with pytest.raises((RecipeError, RunError), match=said):
        CliRunner().invoke(app, arguments, catch_exceptions=False, standalone_mode=False)


def test_an_address_plays_an_environment_and_is_learned_from():
    def reply(path, body, number):
        return chat_answer(body["messages"][-1]["content"].replace("at", "go"))

    with stub_openai(reply) as stub:
        arguments = ["collect", f"{stub.url}#m", "-e", "game.py:Count", "-n", "6", "-o", "out.jsonl", "task.chat=true"]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all(
        row["reward"] == len(row["turns"]) and row["player"] == f"{stub.url}#m" for row in rows
    )
    assert not any(row.get("segments") for row in rows)
    longest = max((body["messages"] for _, _, body in stub.seen), key=len)
    assert [one["content"] for one in longest] == ["at 0", "go 0", "at 1", "go 1", "at 2"]


def test_two_addresses_are_compared():
    def knows_all(path, body, number):
        return chat_answer(str(2 * int(body["messages"][-1]["content"].split()[0])))

    with stub_openai(adds) as some, stub_openai(knows_all) as all_:
        names = [f"{some.url}#m", f"{all_.url}#m"]
        options = ["--endpoint", "retries=0", "--json", "out.json"]
        done = CliRunner().invoke(app, ["compare", *names, "--suite", "sums.yaml", *options])
    assert done.exit_code == 0, done.output
    assert len(some.seen) == len(all_.seen) == 8
    assert "0.250" in done.output  # 8 / 8 - 6 / 8


@pytest.mark.parametrize("player", ["address", "folder"])
def test_prompts_of_a_file_are_played(player, tiny_folder):
    with stub_openai(adds) as stub:
        policy = f"{stub.url}#m" if player == "address" else str(tiny_folder)
        changes = [
            "task.prompts.path=sums.jsonl",
            "task.prompts.holdout=0",
            "task.rewards=r.py:right",
            "rollouts.max_new_tokens=4",
        ]
        done = CliRunner().invoke(app, ["collect", policy, *changes, "-n", "5", "-o", "out.jsonl"])
        assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and all(row["reward"] in (0, 1) for row in rows)
