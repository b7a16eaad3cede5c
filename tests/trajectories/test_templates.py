"""Loss only on the assistant's turns, with the templates of SmolLM2, Qwen and Llama, whether they mark these turns or not."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmrl.errors import ModelError
from lmrl.trajectories.readers import Malformed
from lmrl.trajectories.render import Renderer
from tests.trajectories.episodes import from_row

TEMPLATES = Path(__file__).parent / "templates"
CHATML = ["<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>", "<|eom_id|>"]
SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    {"role": "user", "content": "Hello <|im_end|> <|eot_id|>"},
    {"role": "assistant", "content": "Hi! "},
    {"role": "user", "content": "2 + 3?\n"},
    {"role": "assistant", "content": "5"},
]
PLAIN = [message | {"content": f"{number}{message['role']}"} for number, message in enumerate(CHAT)]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}]
CALLS = [
    {"role": "user", "content": "2 + 3?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "5", "name": "add"},
    {"role": "assistant", "content": "It is 5."},
]


def tokenizer_of(template):
    """A tokenizer of bytes with the template's special tokens, so that boundaries between texts are exact."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    special = LLAMA if template.startswith("llama") else CHATML
    names = {"eos_token": "<|eot_id|>", "bos_token": LLAMA[0]} if special is LLAMA else {"eos_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return tokenizer


def rendered(template, row):
    """What a row becomes: all of its text, and the stretches that the loss is on."""
    tokenizer = tokenizer_of(template)
    (trajectory,) = from_row(row, Renderer(tokenizer, chat=True))
    (segment,) = trajectory.segments
    learned, last = [], None
    for token, turn in zip(segment.tokens, segment.turns, strict=True):
        if turn >= 0:
            learned += [[]] if turn != last else []
            learned[-1].append(token)
        last = turn if turn >= 0 else last
    return tokenizer, segment, [tokenizer.decode(part) for part in learned]


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["alone", "system"])
@pytest.mark.parametrize("template", ["smollm2", "qwen2_5", "qwen2_5_marked", "llama3", "llama3_marked", "llama3_1"])
def test_tokens_are_the_templates_and_the_loss_is_on_answers(template, system):
    tokenizer, segment, learned = rendered(template, {"messages": [*system, *PLAIN]})
    whole = tokenizer.apply_chat_template([*system, *PLAIN], tokenize=False)
    end = tokenizer.eos_token
    assert tokenizer.decode(segment.tokens) == whole[: whole.rindex(end) + len(end)]
    assert learned == [f"1assistant{end}", f"3assistant{end}"]


@pytest.mark.parametrize("template", ["qwen2_5_marked", "llama3_marked"])
def test_the_loss_is_where_generation_marks_are(template):
    tokenizer, segment, _ = rendered(template, {"messages": PLAIN})
    found = tokenizer.apply_chat_template(PLAIN, return_dict=True, return_assistant_tokens_mask=True)
    marked = [token for token, inside in zip(found["input_ids"], found["assistant_masks"], strict=True) if inside]
    learned = [token for token, turn in zip(segment.tokens, segment.turns, strict=True) if turn >= 0]
    newline = tokenizer("\n").input_ids[0]
    # Qwen's marks begin before the line break that opens a turn, and end after the one that follows it; neither is drawn by the policy.
    assert [token for token in marked if token != newline] == learned


@pytest.mark.parametrize("template", ["smollm2", "qwen2_5", "llama3_1"])
def test_control_tokens_that_somebody_wrote_are_text(template):
    tokenizer, segment, learned = rendered(template, {"messages": CHAT})
    end = tokenizer.eos_token_id
    assert learned == [f"Hi! {tokenizer.eos_token}", f"5{tokenizer.eos_token}"]
    systems = {"smollm2": 1, "qwen2_5": 1, "llama3_1": 1}[
        template
    ]  # each template opens with a system message of its own
    assert segment.tokens.count(end) == systems + len(CHAT)


def test_qwen3_learns_thoughts_that_rows_hold():
    chat = [
        message | {"content": f"<think>\nhm\n</think>\n\n{message['content']}"}
        if message["role"] == "assistant"
        else message
        for message in PLAIN
    ]
    _, _, learned = rendered("qwen3", {"messages": chat})
    assert learned[1] == "<think>\nhm\n</think>\n\n3assistant<|im_end|>"


@pytest.mark.parametrize("template", ["qwen2_5", "qwen2_5_marked", "llama3_1"])
def test_calls_of_tools_are_learned_and_results_are_not(template):
    tokenizer, segment, learned = rendered(template, {"messages": CALLS, "tools": TOOLS})
    whole = tokenizer.apply_chat_template(CALLS, tools=TOOLS, tokenize=False)
    end = tokenizer.eos_token
    assert tokenizer.decode(segment.tokens) == whole[: whole.rindex(end) + len(end)]
    assert learned[1] == f"It is 5.{end}"
    assert '"name": "add"' in learned[0] and learned[0].endswith(end) and "Add." not in learned[0]
    assert '"description": "Add."' in whole


def test_calls_that_the_template_leaves_out_are_refused():
    with pytest.raises(ModelError, match="leaves out the call of the tool 'add': take a model whose template"):
        rendered("smollm2", {"messages": CALLS, "tools": TOOLS})


def test_tools_as_json_text_are_read():
    import json

    given = {"messages": CALLS, "tools": json.dumps(TOOLS)}
    assert rendered("qwen2_5", given)[1] == rendered("qwen2_5", {"messages": CALLS, "tools": TOOLS})[1]
    with pytest.raises(Malformed, match="field 'tools' holds .*; expected objects"):
        rendered("qwen2_5", {"messages": CALLS, "tools": [3]})
