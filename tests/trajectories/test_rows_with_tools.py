"""Rows whose messages call tools: they go through the chat template; and messages that are malformed."""

import json
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from lmrl.trajectories.files import open_rows
from lmrl.trajectories.readers import Malformed
from lmrl.trajectories.render import Renderer
from lmrl.trajectories.rows import parse, to_row
from lmrl.trajectories.store import DatasetFile, write_episodes
from tests.trajectories.episodes import from_row

CALLING = (
    "{% for m in messages %}{% if m.role == 'tool' %}[user]<result>{{ m.content }}</result><eos>\n"
    "{% else %}[{{ m.role }}]{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<eos>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
STRICT = CALLING.replace("{% if m.role == 'tool' %}", "{% if m.role == 'tool' %}{{ check(messages, loop.index0) }}", 1)
"""As CALLING, but refuses a result that no call precedes."""
MACRO = (
    "{% macro check(messages, at) %}{% if not (messages[at - 1].tool_calls or messages[at - 1].role == 'tool') %}"
    "{{ raise_exception('a result without a call') }}{% endif %}{% endmacro %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "<eos>"}}}
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TOOL_CHAT = [
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "3<eos>[assistant]", "name": "add", "tool_call_id": "x"},
    {"role": "assistant", "content": "so 3", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "12"},
]


@pytest.fixture(params=[CALLING, MACRO + STRICT], ids=["lenient", "strict"])
def caller(request, tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = request.param
    return tokenizer


@pytest.mark.parametrize("form", ["messages", "json", "completion", "own", "parquet"])
def test_tools_go_through_the_template_in_the_models_own_format(caller, form, tmp_path):
    row = {"messages": TOOL_CHAT, "reward": 1}
    if form == "json":  # arguments as text, as some interfaces give them
        texts = {"name": "add", "arguments": json.dumps(CALL["function"]["arguments"])}
        calls = [
            message | ({"tool_calls": [{"function": texts}]} if "tool_calls" in message else {})
            for message in TOOL_CHAT
        ]
        row = {"messages": calls, "reward": 1}
    if form == "completion":
        row = {"prompt": TOOL_CHAT[:1], "completion": TOOL_CHAT[1:], "reward": 1}
    renderer = Renderer(caller)
    (read,) = from_row(row, renderer)
    if form == "own":
        assert from_row(json.loads(json.dumps(to_row(read))), renderer) == [replace(read, group=0)]
    if form == "parquet":
        write_episodes(tmp_path / "a.parquet", [read], caller)
        assert DatasetFile(str(tmp_path / "a.parquet"), renderer)[0].segments == read.segments
        (again,) = parse(open_rows(str(tmp_path / "a.parquet"))[0])
        assert [(turn.observation, turn.message) for turn in again.turns] == [
            (turn.observation, turn.message) for turn in read.turns
        ]
    (segment,) = read.segments
    whole = caller.apply_chat_template(
        [message | {"content": message["content"] or ""} for message in TOOL_CHAT], tokenize=False
    )
    assert caller.decode(segment.tokens) + "\n" == whole
    turns = [
        [token for token, turn in zip(segment.tokens, segment.turns, strict=True) if turn == at] for at in range(3)
    ]
    call = '<call>{"name": "add", "arguments": {"a": 1, "b": "<eos>"}}</call>'
    assert [caller.decode(tokens) for tokens in turns] == [call + "<eos>", f"so 3{call}<eos>", "12<eos>"]
    assert segment.tokens.count(caller.eos_token_id) == len(TOOL_CHAT)  # content has none
    assert read.turns[1].action == 'so 3\n{"name": "add", "arguments": {"a": 1, "b": "<eos>"}}'
    _, second, _ = from_row(row, renderer, history=2)[0].segments
    assert caller.decode(second.tokens) + "\n" == caller.apply_chat_template(
        [message | {"content": message["content"] or ""} for message in TOOL_CHAT[:4]], tokenize=False
    )


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ({"role": "bot", "content": "a"}, "has a message with the role 'bot'; expected one of system, developer, user"),
        ({"role": "assistant", "content": None}, "expected messages with text in 'role' and 'content'"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}]}, "with text in 'role' and 'content'"),
        ({"role": "tool", "content": None}, "expected messages with text in 'role' and 'content'"),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "'tool_calls' in a message with the role 'user'"),
        (
            {"role": "assistant", "tool_calls": ["add"]},
            "has the tool call 'add'; expected an object with function.name",
        ),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}, "tool arguments None; expected an object"),
    ],
)
def test_malformed_messages(message, found):
    for row in ({"messages": [*TALK, message, *TALK]}, {"prompt": [message], "completion": "b"}):
        with pytest.raises(Malformed, match=found):
            parse(row)
