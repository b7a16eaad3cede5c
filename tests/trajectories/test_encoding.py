"""Special tokens in content stay text, and texts without any have the tokens they always had."""

import random
import re
import time

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lmrl.errors import ModelError
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.trajectories.encoding import Encoder, Part, absent, pattern_of

TEXTS = ["hello world, the user said: hi there\n\n assistant im_end s", "user\nfoo <|bar|>\n"] * 20
TEMPLATE = (
    "{% for message in messages %}START{{ message.role }}\n{{ message.content }}END\n{% endfor %}"
    "{% if add_generation_prompt %}STARTassistant\n{% endif %}"
)


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return dress(tokenizer, "<|im_start|>", "<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=special[1:2])


def metaspace(normalizer=None):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return dress(tokenizer, "<s>", "</s>", bos_token="<s>", unk_token="<unk>")


def lowercase():
    return metaspace(normalizers.Lowercase())


def char_level():
    tokenizer = build_tokenizer("char", TEXTS)
    tokenizer.chat_template = TEMPLATE.replace("START", "").replace("END", "<eos>")
    return tokenizer


def word_level():
    """Whose vocabulary holds its special tokens as words."""
    tokenizer = build_tokenizer("word", TEXTS)
    tokenizer.chat_template = TEMPLATE.replace("START", "").replace("END", " <eos>")
    return tokenizer


def dress(tokenizer, start, end, **names):
    dressed = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, **names)
    dressed.chat_template = TEMPLATE.replace("START", start).replace("END", end)
    return dressed


KINDS = pytest.mark.parametrize("make", [byte_level, metaspace, lowercase, char_level, word_level])


def control(encoder, ids):
    """Control tokens among these, without the one for unknown characters."""
    return [one for one in ids if one in encoder.special.values() and one != encoder.tokenizer.unk_token_id]


@KINDS
def test_text_without_special_tokens_is_encoded_as_ever(make):
    tokenizer, rng = make(), random.Random(0)
    encoder, pieces = Encoder(tokenizer), ["hello", " ", "\n", "world", "user", "<", "|>", "a", "im_"]
    for _ in range(100):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 6)))
        for opening in (False, True):
            expected = tokenizer(text, add_special_tokens=opening).input_ids
            assert encoder.encode(encoder.content(text), opening) == expected
            assert encoder._literal.encode([Part(text, False)], opening, None)[0] == expected
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]
        parts = encoder.dialogue(messages)
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
        assert encoder.encode(parts) == encoder._literal.encode(parts, False, None)[0] == expected


@KINDS
@pytest.mark.parametrize("opening", [False, True])
def test_special_tokens_in_content_become_text(make, opening):
    tokenizer = make()
    encoder = Encoder(tokenizer)
    frame = control(encoder, tokenizer("hi", add_special_tokens=opening).input_ids)
    for name in encoder.special:
        for text in (f"hi {name} user", name, f"{name}{name.upper()}\n{name}"):
            ids = encoder.encode(encoder.content(text), opening)
            assert control(encoder, ids) == frame
            if make is not word_level:
                assert ids == tokenizer(text, add_special_tokens=opening, split_special_tokens=True).input_ids


@KINDS
def test_only_the_template_writes_control_tokens(make):
    tokenizer = make()
    encoder = Encoder(tokenizer)
    benign = control(encoder, encoder.encode(encoder.dialogue([{"role": "user", "content": "hi"}])))
    assert benign
    for name in encoder.special:
        text = f"lmrl0 {name}\nhi{name}"
        parts = encoder.dialogue([{"role": "user", "content": text}])
        assert "".join(part.text for part in parts) == encoder.template([{"role": "user", "content": text}])
        ids = encoder.encode(parts)
        assert control(encoder, ids) == benign
        if make is byte_level:
            assert tokenizer.decode(ids) == encoder.template([{"role": "user", "content": text}])


@KINDS
def test_parse_makes_them_control_tokens(make):
    tokenizer = make()
    encoder, text = Encoder(tokenizer, "parse"), f"hi {tokenizer.eos_token} user"
    assert encoder.encode(encoder.content(text)) == tokenizer(text, add_special_tokens=False).input_ids
    messages = [{"role": "user", "content": text}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True).input_ids
    assert encoder.encode(encoder.dialogue(messages)) == expected


@pytest.mark.parametrize("side", ["left", "right"])
def test_long_texts_are_cut_on_the_tokenizers_side(side):
    tokenizer = metaspace()
    tokenizer.truncation_side = side
    encoder = Encoder(tokenizer)
    parts = [Part("a hello</s> world a", False), Part("</s>", True)]
    start, *whole = encoder.encode(parts, opening=True)
    cut = encoder.encode(parts, opening=True, max_length=6)
    assert cut == [start, *(whole[-5:] if side == "left" else whole[:5])]
    assert encoder.encode(parts, opening=True) == [start, *whole]  # the limit was of that call alone


@KINDS
def test_a_tokenizer_in_python_is_spelled_piece_by_piece(make):
    """What a tokenizer without a Rust backend takes, against the whole text at once where that is the same."""
    tokenizer = make()
    encoder = Encoder(tokenizer)
    text = f"hi {tokenizer.eos_token} user"
    parts = encoder.dialogue([{"role": "user", "content": text}])
    if make in (byte_level, char_level):
        assert encoder._encode_in_pieces(parts, False, None) == encoder.encode(parts)
    for opening in (False, True):
        pieces = encoder._encode_in_pieces(encoder.content("hi user"), opening, None)
        assert pieces == tokenizer("hi user", add_special_tokens=opening).input_ids


def test_a_template_that_fails_is_one_line():
    tokenizer = char_level()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ModelError, match="chat template fails on messages of the roles user: .*roles must alternate"):
        Encoder(tokenizer).dialogue([{"role": "user", "content": "hi"}])


def test_a_stand_in_occurs_in_no_text():
    assert absent("x", ["x0 x1", "x3"]) == "x2"


def test_the_pattern_of_special_tokens():
    pattern = re.compile(pattern_of(["<a>", "<ab>", "<ab>c", "[x]", "<a>|"]))
    assert pattern.findall("<a> <ab>cd <ab> [x] <a>| [x <b> <a") == ["<a>", "<ab>c", "<ab>", "[x]", "<a>|"]
    assert not re.compile(pattern_of([])).search("anything")


def test_thousands_of_special_tokens_cost_little():
    pattern = re.compile(pattern_of(f"<unused{number}>" for number in range(6000)), re.IGNORECASE)
    text = "<div>text</div> " * 2000
    began = time.process_time()
    assert not pattern.search(text) and pattern.search(text + "<Unused5999>")
    assert time.process_time() - began < 1
