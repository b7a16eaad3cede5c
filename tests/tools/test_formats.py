"""Calls of tools, as each family of models writes them."""

from types import SimpleNamespace

import jinja2
import pytest

from lmrl.tools.formats import Call, Parsed, format_of, parse_hermes, parse_llama, parse_mistral, parse_plain

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum.",
        "parameters": {"properties": {"a": {"type": "integer"}, "b": {"type": "string"}}},
    },
}
ONE, TWO = Call("add", {"a": 1}), Call("add", {"a": 2})


@pytest.mark.parametrize(
    ("parse", "text", "expected"),
    [
        (parse_hermes, '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', Parsed("", [ONE])),
        (
            parse_hermes,
            'So: <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>\n<tool_call>{"name": "add", "arguments": {"a": 2}}',
            Parsed("So:", [ONE, TWO]),
        ),
        (
            parse_hermes,
            "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n</function>\n</tool_call>",
            Parsed("", [Call("add", {"a": 1, "b": "2"})]),
        ),
        (parse_hermes, "<tool_call>{broken</tool_call> x ", Parsed("<tool_call>{broken</tool_call> x ", [])),
        (parse_llama, '{"name": "add", "parameters": {"a": 1}}', Parsed("", [ONE])),
        (
            parse_llama,
            'So<|python_tag|>{"name": "add", "parameters": {"a": 1}}; {"name": "add", "parameters": {"a": 2}}',
            Parsed("So", [ONE, TWO]),
        ),
        (parse_llama, "[add(a=1)]", Parsed("", [ONE])),
        (parse_llama, '{"name": "Ada"} is JSON', Parsed('{"name": "Ada"} is JSON', [])),
        (parse_mistral, 'So[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]', Parsed("So", [ONE])),
        (parse_mistral, '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]add[ARGS]{"a": 2}', Parsed("", [ONE, TWO])),
        (parse_mistral, '[TOOL_CALLS]add[CALL_ID]9[ARGS]{"a": 1}', Parsed("", [ONE])),
        (parse_mistral, "[TOOL_CALLS][{]", Parsed("[TOOL_CALLS][{]", [])),
        (parse_plain, "See [1]. [add(1), add(a=2)]\n", Parsed("See [1].", [ONE, TWO])),
        (parse_plain, "[add(a=open('x'))]", Parsed("[add(a=open('x'))]", [])),
        (parse_plain, "[sub(1)]", Parsed("[sub(1)]", [])),
        (parse_plain, "[add(1, a=2)]", Parsed("[add(1, a=2)]", [])),
        (parse_plain, "[add(1, 2, 3)]", Parsed("[add(1, 2, 3)]", [])),
        (parse_plain, "[add(**{})]", Parsed("[add(**{})]", [])),
        (parse_plain, "[add(1), 2]", Parsed("[add(1), 2]", [])),
        (parse_plain, "[add(1)] and more", Parsed("[add(1)] and more", [])),
        (parse_plain, "[add(" * 2000 + "]", Parsed("[add(" * 2000 + "]", [])),
    ],
)
def test_calls_are_read(parse, text, expected):
    assert parse(text, [ADD]) == expected


def tokenizer(template):
    def apply(messages, tools=None, tokenize=False, add_generation_prompt=True):
        return jinja2.Environment().from_string(template).render(messages=messages, tools=tools)

    return SimpleNamespace(chat_template=template, apply_chat_template=apply)


WORDS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
SHOWN = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "name", "tool_role"),
    [
        (SHOWN + WORDS + "{# <tool_call> #}", "hermes", True),
        (SHOWN + WORDS + "{# [TOOL_CALLS] #}", "mistral", True),
        (SHOWN + WORDS, "llama", True),
        (WORDS, "plain", True),
        ("{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}", "plain", False),
    ],
)
def test_the_template_says_the_format(template, name, tool_role):
    found = format_of(tokenizer(template))
    assert (found.name, found.tool_role) == (name, tool_role)


def test_messages_in_the_plain_form():
    plain = format_of(tokenizer("{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}"))
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "x"}}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "So", "tool_calls": [call, call]},
        {"role": "tool", "content": "3"},
    ]
    prepared, written = plain.prepare(messages, [ADD])
    assert written is None and prepared == [
        {
            "role": "system",
            "content": "To call a tool, end with [name(argument=value)]:\nadd(a, b): The sum.",
        },
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "So\n[add(a=1, b='x'), add(a=1, b='x')]"},
        {"role": "user", "content": "3"},
    ]
    assert plain.parse(prepared[2]["content"], [ADD]).calls == [Call("add", {"a": 1, "b": "x"})] * 2
