"""Talking to policies: the dialogue that the model sees, streamed answers, and the command."""

import pytest
from typer.testing import CliRunner

from lmrl.cli import app
from lmrl.cli.speaker import Speaker
from lmrl.engines.base import Sampling
from lmrl.errors import RecipeError
from lmrl.policy.load import open_policy


def test_a_dialogue_goes_on_in_the_models_own_tokens(tiny_folder):
    policy = open_policy(str(tiny_folder))
    speaker = Speaker("tiny", policy, Sampling(4, temperature=0), system="Be brief.")
    heard = []
    answer = speaker.say("hello", heard.append)
    assert heard[-1] == answer and len(heard) == 4 and all(answer.startswith(part) for part in heard)
    speaker.say("again")
    (segment,) = speaker.recorder.trajectory.segments
    text = policy.tokenizer.decode(segment.tokens)
    opening = "[system]Be brief.<eos>\n[user]hello<eos>\n[assistant]"
    assert text.startswith(opening + answer) and "[user]again<eos>\n[assistant]" in text
    assert len(segment.actions) == 8
    speaker.forget()
    assert speaker.say("hello") == answer  # greedy, and nothing of before is left


def test_without_a_template_plain_text_is_continued(tiny_policy):
    speaker = Speaker("raw", tiny_policy, Sampling(3, temperature=0))
    answer = speaker.say("ab")
    (segment,) = speaker.recorder.trajectory.segments
    assert tiny_policy.tokenizer.decode(segment.tokens).startswith("ab") and len(segment.actions) <= 3
    assert isinstance(answer, str)


def test_the_verb(tiny_folder):
    run = CliRunner()
    one = run.invoke(app, ["chat", str(tiny_folder), "-p", "hello", "--max-new-tokens", "4", "-t", "0"])
    assert one.exit_code == 0 and one.output.strip()
    two = run.invoke(
        app, ["chat", str(tiny_folder), str(tiny_folder), "-p", "hello", "--max-new-tokens", "4", "-t", "0"]
    )
    lines = two.output.splitlines()
    assert [line.partition(":")[0] for line in lines[:1]] == [tiny_folder.name] and one.output.strip() in two.output
    talk = "hello\n/temperature 0\n/temperature hot\n/new\n/system Be brief.\nhello\n/what\n/quit\nnever said\n"
    many = run.invoke(app, ["chat", str(tiny_folder), "--max-new-tokens", "4", "-t", "0"], input=talk)
    assert (
        many.exit_code == 0
        and "takes a number of 0 or more, got 'hot'" in many.output
        and "/new  start over" in many.output
    )
    refused = run.invoke(app, ["chat", str(tiny_folder), "--beta", "4", "-p", "a"])
    assert isinstance(refused.exception, RecipeError) and "weighs Q values" in str(refused.exception)
    with pytest.raises(RecipeError, match="one policy or two"):
        run.invoke(app, ["chat", "a", "b", "c"], catch_exceptions=False)


def test_empty_lines_of_a_pipe_do_not_end_the_talk(tiny_folder):
    arguments = ["chat", str(tiny_folder), "--max-new-tokens", "4", "-t", "0"]
    found = CliRunner().invoke(app, arguments, input="\n  \r\n/temperature nan\n\n/temperature cold")
    assert [line[-4:] for line in found.output.splitlines()] == ["nan'", "old'"]


def test_an_answer_in_a_pipe_is_one_unchanged_line(tiny_folder, monkeypatch):
    answer = "word :smile: [b]bold[/b] " * 20
    monkeypatch.setattr(Speaker, "say", lambda self, text, heard: answer)
    assert CliRunner().invoke(app, ["chat", str(tiny_folder), "-p", "hello"]).output == answer + "\n"


def test_bytes_that_are_not_text_are_replaced(tiny_folder, monkeypatch):
    heard = []
    monkeypatch.setattr(Speaker, "say", lambda self, text, live: heard.append(text) or "")
    CliRunner().invoke(app, ["chat", str(tiny_folder)], input=b"a\xffb\n")
    assert heard == ["a\ufffdb"]
