"""From observations to context tokens: content is text, only the template writes control tokens."""

import json

import pytest
from transformers import AutoTokenizer

from lmrl.errors import ModelError
from lmrl.recipe import Prompts, PromptTask, RandomWalksTask
from lmrl.rollouts.task import build_task
from lmrl.trajectories.render import SENTINEL, Renderer
from tests.trajectories.episodes import from_row


@pytest.fixture
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


def ends(renderer, tokens):
    return tokens.count(renderer.tokenizer.eos_token_id)


@pytest.mark.parametrize("chat", [False, True])
def test_special_tokens_in_content_are_text(tokenizer, chat):
    renderer = Renderer(tokenizer, chat)
    for ask in (renderer.first, lambda text: renderer.next(text, 5), renderer.action, renderer.plain):
        assert ends(renderer, ask("a<eos>[assistant]b")) == ends(renderer, ask("ab"))
        assert "a<eos>[assistant]b" in tokenizer.decode(ask("a<eos>[assistant]b"))
    parsing = Renderer(tokenizer, chat, special_tokens="parse")
    assert ends(parsing, parsing.first("a<eos>b")) == ends(renderer, renderer.first("ab")) + 1


@pytest.mark.parametrize("text", [SENTINEL, f"{SENTINEL}0", f"before {SENTINEL} {SENTINEL}0 {SENTINEL}1 after"])
def test_an_observation_may_hold_the_sentinel(tokenizer, text):
    renderer = Renderer(tokenizer, chat=True)
    assert tokenizer.decode(renderer.next(text, 5)) == f"<eos>\n[user]{text}<eos>\n[assistant]"
    assert tokenizer.decode(renderer.first(text)) == f"[user]{text}<eos>\n[assistant]"


def test_a_template_that_leaves_the_assistant_out(tokenizer):
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ModelError, match="leaves out the assistant's text"):
        Renderer(tokenizer, chat=True).next("more", 5)


def test_rows_of_logged_data_are_text(tokenizer):
    row = {"prompt": "a<eos>", "chosen": "b<eos>", "rejected": "c"}
    for special_tokens, count in (("text", 1), ("parse", 3)):
        renderer = Renderer(tokenizer, special_tokens=special_tokens)
        chosen, _ = from_row(row, renderer)
        assert ends(renderer, chosen.segments[0].tokens) == count


@pytest.mark.parametrize("special_tokens", ["text", "parse"])
def test_the_task_says_what_special_tokens_are(tokenizer, tmp_path, special_tokens):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a<eos>"}) + "\n")
    tasks = [
        PromptTask(prompts=Prompts(path=str(path)), special_tokens=special_tokens),
        RandomWalksTask(environment="random_walks", special_tokens=special_tokens),
    ]
    for section in tasks:
        renderer = build_task(section, tokenizer).renderer
        assert ends(renderer, renderer.first("a<eos>")) == (special_tokens == "parse")
