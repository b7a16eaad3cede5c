"""Learned rewards: scores that depend only on their text, labels, ensembles, and what is refused."""

import math

import pytest
import torch
import transformers

from lmrl.errors import ModelError, PluginError, RecipeError, RewardError
from lmrl.policy.load import open_classifier
from lmrl.recipe import Reward
from lmrl.rewards.load import load_rewards
from lmrl.rewards.model import RewardModel
from lmrl.rewards.rewards import judge, score
from lmrl.trajectories.trajectory import Segment, Trajectory

TEXTS = ["a", "some longer text, with words", "bb", "", "a question? an answer!", "zzzz" * 9]


def save_classifier(folder, tiny_folder, kind="llama", labels=1, seed=0, pad="own", **settings):
    """A classifier with large random weights, so that different texts score differently."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    sizes = {
        "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
        "bert": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    }[kind]
    pad_id = tokenizer.pad_token_id if pad == "own" else pad
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=len(tokenizer), num_labels=labels, pad_token_id=pad_id, **sizes, **settings
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def classifier(tmp_path, tiny_folder):
    return lambda name="rm", **settings: save_classifier(tmp_path / name, tiny_folder, **settings)


def scores_of(reward, completions=TEXTS, prompts=None):
    return score(reward, {"prompts": prompts or ["p: "] * len(completions), "completions": completions}).values


def learned(path, **settings):
    return load_rewards([Reward(model=path, **settings)])[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("pad", ["own", "none", "end"])
def test_a_score_does_not_depend_on_its_batch(classifier, kind, pad):
    """One at a time, all together, and in small batches; also without a pad token, and where padding looks like the end."""
    if kind == "bert" and pad != "own":
        pytest.skip("an encoder always has a pad token")
    path = classifier(kind=kind, pad={"own": "own", "none": None, "end": 1}[pad])
    together = scores_of(learned(path))
    alone = [scores_of(learned(path), [text])[0] for text in TEXTS]
    small = scores_of(learned(path, options={"batch_tokens": 20}))
    assert together == pytest.approx(alone, abs=1e-5) and small == pytest.approx(alone, abs=1e-5)
    assert len({round(value, 3) for value in together}) == len(TEXTS)


def test_the_score_is_the_transformers_logit(classifier):
    path = classifier()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    ids = transformers.AutoTokenizer.from_pretrained(path)("p: bb<eos>", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = float(model(input_ids=ids).logits)
    assert scores_of(learned(path), ["bb"]) == pytest.approx([expected], abs=1e-6)


def test_messages_go_through_the_models_own_template(classifier):
    reward, plain = learned(classifier()), learned(classifier(), options={"chat": True})
    prompt, answer = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "yo"}]
    bare = learned(classifier(), options={"eos": False, "special_tokens": "parse"})
    raw = scores_of(bare, ["[user]hi<eos>\n[assistant]yo<eos>\n"], [""])
    assert scores_of(reward, [answer], [prompt]) == pytest.approx(raw, abs=1e-6)
    assert scores_of(plain, ["yo"], ["hi"]) == pytest.approx(raw, abs=1e-6)
    alone = learned(classifier(), options={"prompt": False})
    assert scores_of(alone, [answer], [prompt]) == scores_of(reward, ["yo"], [""])


def test_a_whole_text_ends_with_end_of_sequence(classifier):
    """One that the token limit cut does not, and neither does any with `eos: false`."""
    reward = learned(classifier())
    bare = learned(classifier(), options={"eos": False, "special_tokens": "parse"})
    assert scores_of(reward, ["yo"]) == scores_of(bare, ["yo<eos>"]) != scores_of(bare, ["yo"])
    parsing = learned(classifier(), options={"special_tokens": "parse"})
    assert scores_of(parsing, ["yo<eos>"]) == scores_of(bare, ["yo<eos>"])
    whole, cut = episode("yo"), episode("yo")
    cut.cut_turns = [0]
    judge([reward], [whole, cut])
    assert [whole.reward, cut.reward] == pytest.approx(scores_of(bare, ["yo<eos>", "yo"]), abs=1e-6)


def test_special_tokens_in_a_completion_are_text(classifier):
    member = RewardModel(classifier(), max_tokens=9).members[0]
    end, decode = member.tokenizer.eos_token_id, member.tokenizer.decode
    tokens = member.tokens("a", "b<eos>")
    assert tokens.count(end) == 1 and tokens[-1] == end and decode(tokens) == "ab<eos><eos>"
    assert len(member.tokens("a", "bcdef<eos>")) == 9  # of a longer text the end is kept, as of any
    messages = [{"role": "user", "content": "<eos>"}]
    rendered = RewardModel(classifier()).members[0].tokens(messages, "y")
    assert rendered.count(end) == 2 and decode(rendered) == "[user]<eos><eos>\n[assistant]y<eos>\n"
    with pytest.raises(RecipeError, match="'special_tokens' cannot be 'both'"):
        RewardModel(classifier(), special_tokens="both")


def test_a_reward_model_follows_its_tasks_special_tokens(classifier):
    rewards = [Reward(model=classifier()), Reward(model=classifier(), name="own", options={"special_tokens": "text"})]
    follows, own = load_rewards(rewards, "parse")
    (text,), (parsed,) = (scores_of(reward, ["y<eos>o"]) for reward in (own, follows))
    assert text != parsed
    assert [parsed] == scores_of(learned(classifier(), options={"special_tokens": "parse"}), ["y<eos>o"])


def test_a_long_text_keeps_its_end_of_sequence(classifier, tiny_folder):
    member = RewardModel(classifier(), max_tokens=4).members[0]
    assert member.tokenizer.decode(member.tokens("", "123456")) == "456<eos>"
    assert member.tokenizer.decode(member.tokens("", "123456", ended=False)) == "3456"
    assert member.tokenizer.decode(member.tokens("", "")) == "<eos>"


def test_a_tokenizer_that_ends_text_itself_is_left_to_it(classifier):
    from tokenizers.processors import TemplateProcessing

    path = classifier()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    eos = ("<eos>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[eos])
    tokenizer.save_pretrained(path)
    member = open_classifier(path)
    assert member.tokenizer.decode(member.tokens("a", "b")) == "ab<eos>"


def test_of_a_longer_text_the_end_is_kept(classifier):
    reward = learned(classifier(), options={"max_tokens": 8})
    assert scores_of(reward, ["12345678"]) == scores_of(reward, ["something else 12345678"])
    assert scores_of(reward, ["12345678"]) != scores_of(reward, ["12345679"])


def test_labels_and_probabilities(classifier):
    path = classifier(labels=3, id2label={0: "BAD", 1: "FAIR", 2: "GOOD"}, label2id={"BAD": 0, "FAIR": 1, "GOOD": 2})
    with pytest.raises(
        RecipeError, match=r"task.rewards.0.model: .* choose one with options.label \(BAD, FAIR, GOOD\)"
    ):
        learned(path)
    with pytest.raises(RecipeError, match="has no label 'GOD'; did you mean 'GOOD'"):
        learned(path, options={"label": "GOD"})
    by_name, by_index = (scores_of(learned(path, options={"label": label})) for label in ("GOOD", 2))
    assert by_name == by_index
    shares = [scores_of(learned(path, options={"label": label, "probability": True})) for label in range(3)]
    assert [math.fsum(column) for column in zip(*shares, strict=True)] == pytest.approx([1.0] * len(TEXTS))
    one = classifier("one")
    logit, probability = scores_of(learned(one), ["a"]), scores_of(learned(one, options={"probability": True}), ["a"])
    assert probability[0] == pytest.approx(1 / (1 + math.exp(-logit[0])))


def test_an_ensemble_reports_its_disagreement(classifier):
    paths = [classifier(f"rm{seed}", seed=seed) for seed in range(3)]
    members = torch.tensor([scores_of(learned(path)) for path in paths], dtype=torch.float64)
    mean, std = members.mean(0), members.std(0, correction=0)
    assert scores_of(learned(paths)) == pytest.approx(mean.tolist())
    assert scores_of(learned(paths, options={"combine": "min"})) == pytest.approx(members.amin(0).tolist())
    careful = learned(paths, name="rm", options={"combine": "mean_minus_std", "std_coef": 0.5})
    assert scores_of(careful) == pytest.approx((mean - 0.5 * std).tolist())
    one = episode("bb")
    judge([careful], [one])
    alone = torch.tensor([scores_of(learned(path), ["bb"])[0] for path in paths], dtype=torch.float64)
    assert one.components["rm/std"] == pytest.approx(float(alone.std(correction=0)))
    assert one.reward == one.components["rm"]


def episode(completion):
    segment = Segment()
    segment.observe([1])
    segment.act([2, 3], [-1.0, -1.0], 0)
    return Trajectory([segment], "p: ", completion)


def test_a_score_that_is_not_finite_is_no_score(tmp_path, classifier):
    reward = learned(classifier())
    (member,) = reward.call.args[0].members
    member.model.score.weight.data.fill_(float("nan"))
    verdict = score(reward, {"prompts": ["p"], "completions": ["a"]})
    assert verdict.values == [None] and verdict.causes == ["rm returned nan"]


def test_a_model_that_can_score_nothing_is_refused(classifier):
    path = classifier()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    model.score.weight.data.fill_(float("nan"))
    model.save_pretrained(path)
    with pytest.raises(ModelError, match="has NaN or infinity in 'score.weight'"):
        learned(path)


def test_bfloat16_weights_with_a_float32_head(classifier):
    path = classifier()
    coarse, exact = scores_of(learned(path, options={"dtype": "bfloat16"})), scores_of(learned(path))
    assert coarse != exact and coarse == pytest.approx(exact, abs=0.3)
    assert RewardModel(path, dtype="bfloat16").members[0].model.score.weight.dtype == torch.float32


def test_training_and_evaluation_share_the_weights(classifier):
    path = classifier()
    assert RewardModel(path).members[0] is not RewardModel(path, max_tokens=9).members[0]
    one = RewardModel(path)
    assert one.members[0] is RewardModel(path).members[0]


def test_what_cannot_be_a_reward_is_refused(classifier, tiny_folder, tmp_path):
    with pytest.raises(ModelError, match="has no weights for 'score.weight', so its scores would be random: train it"):
        learned(str(tiny_folder))
    with pytest.raises(ModelError, match="task.rewards.0.model: reward model: there is no '.*nowhere' here"):
        learned(str(tmp_path / "nowhere"))
    with pytest.raises(PluginError, match="takes no option 'lable'; did you mean 'label'"):
        learned(classifier(), options={"lable": 1})
    with pytest.raises(RecipeError, match="'combine' cannot be 'max'"):
        learned(classifier(), options={"combine": "max"})
    with pytest.raises(RewardError, match="'stages/rm' is a run's reward model, but no run is given"):
        learned("stages/rm")


def test_a_classifier_is_no_policy(classifier):
    from lmrl.policy.load import open_policy

    with pytest.raises(ModelError, match="is a sequence classifier, such as a reward model, and no language model"):
        open_policy(classifier())


def test_an_adapter_of_a_classifier(classifier, tiny_folder, tmp_path):
    """As trl leaves reward models trained with LoRA: an adapter with the head inside."""
    from peft import LoraConfig, get_peft_model

    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_folder, num_labels=1)
    base.config.pad_token_id = 0
    config = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    transformers.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "adapter")
    own = open_classifier(str(tmp_path / "adapter"))
    ids = own.tokens("p: ", "hello")
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.tensor([ids])).logits[0, 0]
    assert float(own.logits([ids])[0, 0]) == pytest.approx(float(expected), abs=1e-5)
