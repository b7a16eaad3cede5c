"""Shipped benchmarks: rows in the original schema (files beside this one, written for these tests) to prompts and scores."""

import json
import math
from pathlib import Path

import pytest
import torch
from lmrl.reward_models.instructions import followed, follows

import lmrl
from lmrl.errors import DataError, ModelError, RecipeError
from lmrl.evaluation.choices import continued
from lmrl.evaluation.suites import load_suite
from lmrl.policy.likelihood import Continued, likelihoods
from lmrl.rollouts.templates import prompt_rows
from lmrl.trajectories.render import Renderer
from tests.conftest import TINY_LLAMA

FILES = Path(__file__).parent / "benchmarks"


def file_of(name):
    return str(FILES / f"{name}.jsonl")


def rows_of(suite, *overrides, data=None):
    return prompt_rows(load_suite(suite, [f"data={file_of(data or suite)}", *overrides]).task.prompts)


@pytest.fixture(scope="module")
def long_model(tmp_path_factory):
    """A character-level model with room for examples."""
    from lmrl.policy.load import load_policy
    from lmrl.recipe import Model

    torch.manual_seed(0)
    letters = "\n" + "".join(chr(code) for code in range(32, 127))
    config = TINY_LLAMA | {"max_position_embeddings": 4096}
    folder = tmp_path_factory.mktemp("long") / "model"
    load_policy(Model(config=config), texts=lambda: [letters]).save(folder)
    return folder


# ---------------------------------------------------------------------------------------------------------------- prompts
def test_gsm8k_prompt_has_five_examples_and_the_question():
    rows = rows_of("gsm8k", f"examples={file_of('gsm8k_examples')}")
    shown = rows[0]["prompt"].split("\n\n")
    assert len(shown) == 6 and shown[5] == "Question: Ada has 3 pens and buys 4 more. How many pens has she?\nAnswer:"
    known = {f"Question: What is {n} + {n}?\nAnswer: {n} + {n} = {2 * n}.\n#### {2 * n}" for n in range(1, 9)}
    assert len(set(shown[:5])) == 5 and set(shown[:5]) <= known
    assert rows[1]["prompt"].split("\n\n")[:5] != shown[:5]


def test_math_500_prompt_is_minervas(tmp_path):
    examples = tmp_path / "examples.jsonl"
    examples.write_text("".join(json.dumps({"problem": f"{n}?", "solution": f"${n}$."}) + "\n" for n in range(4)))
    row = rows_of("math_500", f"examples={examples}", "shots=4")[0]
    assert row["prompt"].startswith("Problem:\n0?\n\nSolution: $0$.\n\nProblem:\n1?")
    assert row["prompt"].count("Solution: $") == 4
    assert row["prompt"].endswith("\n\nProblem:\nWhat is $2+3$?\n\nSolution:")
    assert rows_of("math_500")[0]["prompt"] == "Problem:\nWhat is $2+3$?\n\nSolution:"
    assert row["answer"] == "We add: $2+3=\\boxed{5}$."


def test_mmlu_prompt_names_the_subject_and_takes_its_examples():
    anatomy, physics = rows_of("mmlu", "shots=1", f"examples={file_of('mmlu_examples')}")
    assert anatomy["prompt"] == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Which organ pumps blood?\nA. Lung\nB. Heart\nC. Liver\nD. Skin\nAnswer: B\n\n"
        "Which bone is in the arm?\nA. Femur\nB. Humerus\nC. Tibia\nD. Patella\nAnswer:"
    )
    assert "about high school physics.\n\nWhich planet is red?" in physics["prompt"]


def test_mmlu_pro_prompt_thinks_aloud():
    row = rows_of("mmlu_pro", "shots=1", f"examples={file_of('mmlu_pro_examples')}", "task.prompts.limit=1")[0]
    assert row["prompt"] == (
        "The following are multiple choice questions (with answers) about chemistry. Think step by step and then finish your "
        'answer with "the answer is (X)" where X is the correct letter choice.\n'
        "Question:\nWhich is a gas?\nOptions:\nA. Gold\nB. Helium\nAnswer: Let's think step by step. Gold is solid. "
        "The answer is (B).\n\n"
        "Question:\nWhich of these is a metal?\nOptions:\nA. Oxygen\nB. Neon\nC. Iron\nAnswer: Let's think step by step."
    )


@pytest.mark.parametrize("data", ["arc", "arc_original"])
def test_arc_reads_the_hubs_rows_and_the_original_ones(data, long_model):
    report = lmrl.evaluate(long_model, "arc_challenge", [f"data={file_of(data)}", "task.prompts.limit=1"])
    (one,) = report.trajectories
    assert one.prompt == "Question: Which of these is frozen water?\nAnswer:"
    assert one.columns["choices"] == ["steam", "ice", "sand"] and one.columns["right"] == 1


def test_hellaswag_texts_are_tidied(long_model):
    report = lmrl.evaluate(long_model, "hellaswag", [f"data={file_of('hellaswag')}"])
    first, second = report.trajectories
    assert first.prompt == "Baking bread: A baker kneads dough. The baker"
    assert first.columns["choices"][:2] == ["puts it into the oven.", "throws it at the wall."]
    assert first.columns["right"] == 0
    assert second.prompt == "Garden: How to water a plant. Take a can." and second.columns["right"] == 1


def test_gpqa_options_have_an_order_of_their_own():
    rows = rows_of("gpqa")
    for row, correct in zip(rows, ("the neutron", "carbon dioxide"), strict=True):
        letter = "ABCD"[row["place"]]
        assert f"\n({letter}) {correct}\n" in row["prompt"]
    assert rows[0]["prompt"].startswith(
        "What is the correct answer to this question:Which particle has no charge?\nChoices:\n(A) "
    )
    assert rows == rows_of("gpqa")


def test_truthfulqa_prompt_ends_with_the_question(long_model):
    report = lmrl.evaluate(long_model, "truthfulqa", [f"data={file_of('truthfulqa')}"])
    assert report.trajectories[0].prompt.endswith("in Barcelona, Spain.\n\nQ: Can stones swim?\nA:")
    assert report.trajectories[0].columns["right"] == 0


def test_truthfulqa_reads_the_original_array(tmp_path):
    from lmrl.rollouts.templates import compiled

    hub = [json.loads(line) for line in Path(file_of("truthfulqa")).read_text().splitlines()]
    original = [row | {"mc1_targets": dict(zip(*row["mc1_targets"].values(), strict=True))} for row in hub]
    (tmp_path / "mc_task.json").write_text(json.dumps(original, indent=4))
    suite = load_suite("truthfulqa", [f"data={tmp_path / 'mc_task.json'}"])
    rows = prompt_rows(suite.task.prompts)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in rows_of("truthfulqa")]
    texts, right = compiled(suite.choices.texts, "texts"), compiled(suite.choices.right, "right")
    assert [texts(row) for row in rows] == [row["mc1_targets"]["choices"] for row in hub]
    assert [right(row) for row in rows] == [0, 0]


def test_mbpp_takes_its_splits_from_the_original_file(tmp_path):
    (row,) = [json.loads(line) for line in Path(file_of("mbpp")).read_text().splitlines()][:1]
    tasks = [row | {"task_id": number, "text": f"Task {number}."} for number in (1, 2, 3, 4, 10, 11, 510, 511, 974)]
    whole = tmp_path / "mbpp.jsonl"
    whole.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    rows = prompt_rows(load_suite("mbpp", [f"data={whole}", f"examples={whole}"]).task.prompts)
    assert [row["task_id"] for row in rows] == [11, 510]
    assert [f"Task {number}." in rows[0]["prompt"] for number in (1, 2, 3, 4, 10)] == [False, True, True, True, False]


def test_folder_of_data_does_not_hide_a_suite(tmp_path, monkeypatch):
    (tmp_path / "mmlu").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_suite("mmlu").task.prompts.path == "cais/mmlu"


def test_mbpp_examples_are_tasks_two_to_four():
    row = rows_of("mbpp", f"examples={file_of('mbpp_examples')}")[0]
    assert [f"return {n}.\n" in row["prompt"] or f"return {n}. Your" in row["prompt"] for n in (1, 2, 3, 4)] == [
        False,
        True,
        True,
        True,
    ]
    assert row["prompt"].endswith(
        "[DONE]\n\nYou are an expert Python programmer, and here is your task: Write a function to add one to a number. Your "
        "code should pass these tests:\n\nassert add_one(1) == 2\nassert add_one(-1) == 0\nassert add_one(9) == 10\n[BEGIN]\n"
    )


# ----------------------------------------------------------------------------------------------------------------- scores
def rewards_of(suite, completions, *overrides):
    """Scores of one completion to each row, by reward."""
    from lmrl.rewards.load import load_rewards

    loaded = load_suite(suite, [f"data={file_of(suite)}", *overrides])
    rows = prompt_rows(loaded.task.prompts)[: len(completions)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns |= {"prompts": columns["prompt"], "completions": completions}
    return {one.label: one.call(**columns) for one in load_rewards(loaded.task.rewards)}


def test_gsm8k_is_scored_strictly_and_flexibly():
    said = ["So 7.\n#### 7", "It is $1,200.", "#### 11"]
    assert rewards_of("gsm8k", said, "shots=0") == {"strict_match": [1, 0, 0], "flexible_extract": [1, 1, 0]}


def test_math_500_compares_values():
    pytest.importorskip("math_verify")
    assert rewards_of("math_500", ["It is $\\boxed{\\frac{10}{2}}$", "$\\boxed{0.5}$"]) == {"math_verify": [1, 0]}


def test_mmlu_pro_takes_the_letter_after_the_answer_is():
    assert rewards_of("mmlu_pro", ["Iron conducts. The answer is (C).", "the answer is A"], "shots=0") == {
        "exact_match": [1, 0]
    }


def test_ifeval_counts_instructions_strictly_and_loosely():
    said = ["Owl and wren. Done.", "Here they are:\n* red\n* green\n* deep blue\n- end"]
    found = rewards_of("ifeval", said)
    assert found["strict"] == [{"score": 1.0, "share": 1.0}, {"score": 0.0, "share": 0.5}]
    # Without its last line the second has three bullets.
    assert found["loose"] == [{"score": 1.0, "share": 1.0}, {"score": 1.0, "share": 1.0}]


def test_ifeval_leaves_out_what_no_rule_checks():
    assert [row["key"] for row in rows_of("ifeval")] == [1, 3]
    assert follows(["Bonjour"], [["language:response_language"]], [[{"language": "fr"}]]) == [None]
    assert follows(["Bonjour"], [[]], [[]]) == [None]


@pytest.mark.parametrize(
    ("name", "arguments", "right", "wrong"),
    [
        ("keywords:existence", {"keywords": ["owl", "wren"]}, "Owls and a wren", "An owl"),
        ("keywords:frequency", {"keyword": "owl", "frequency": 2, "relation": "at least"}, "owl owls", "owl"),
        ("keywords:frequency", {"keyword": "owl", "frequency": 2, "relation": "less than"}, "owl", "owl owl"),
        ("keywords:forbidden_words", {"forbidden_words": ["owl"]}, "owls", "an Owl."),
        ("keywords:letter_frequency", {"letter": "O", "let_frequency": 2, "let_relation": "at least"}, "oO", "o"),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***", "a *** *** b"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "a b", "a b c"),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
            'a\n\n"So, it is',
            "a\n\nIt is so",
        ),
        ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b]", "[a]"),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Yes\nP. S. no", "PS no"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "** a\n* b"),
        ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "* * and *a*"),
        (
            "detectable_format:multiple_sections",
            {"section_spliter": "Section", "num_sections": 2},
            "Section 1 a Section 2 b",
            "Section 1",
        ),
        ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
        ("detectable_format:title", {}, "<<a>> text", "<< >> text"),
        ("combination:two_responses", {}, "a******b", "a******a"),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}, "say it: so", "so"),
        ("startend:end_checker", {"end_phrase": "Bye."}, 'ok "bye."', "Bye. ok"),
        ("punctuation:no_comma", {}, "a b", "a, b"),
        ("startend:quotation", {}, '"a"', '"a'),
    ],
)
def test_rules_of_instructions(name, arguments, right, wrong):
    assert followed(name, right, arguments) and not followed(name, wrong, arguments)


def test_humaneval_and_mbpp_run_the_program():
    wrong = "    return x\n"
    assert rewards_of("humaneval", ["    return x + x\n", "    return items[1]\n"]) == {"passes": [1, 0]}
    assert rewards_of("humaneval", [wrong]) == {"passes": [0]}
    said = ["def add_one(x):\n    return x + 1\n", "def root(x):\n    return round(x ** 0.5)\n"]
    assert rewards_of("mbpp", said, "shots=0") == {"passes": [1, 1]}


def test_code_that_hangs_or_exits_fails():
    assert rewards_of("humaneval", ["    while True: pass\n"], "task.rewards.0.options={seconds: 0.5}") == {
        "passes": [0]
    }
    assert rewards_of("humaneval", ["    pass\nimport os\nos._exit(0)\n"]) == {"passes": [0]}


def test_code_runs_only_with_permission(long_model):
    name = f"data={file_of('humaneval')}"
    with pytest.raises(RecipeError, match="runs code that the policy writes.*--run-code"):
        lmrl.evaluate(long_model, "humaneval", [name])
    report = lmrl.evaluate(long_model, "humaneval", [name, "rollouts.max_new_tokens=8"], run_code=True)
    assert report.metrics["passes"]["n"] == 2
    with pytest.raises(RecipeError, match="--run-code: nothing of this suite runs code"):
        lmrl.evaluate(long_model, "truthfulqa", [f"data={file_of('truthfulqa')}"], run_code=True)


# --------------------------------------------------------------------------------------------------------- log-likelihood
def by_hand(folder, prompt, texts):
    """Log-likelihood of each text after a prompt, by transformers alone, in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).double()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        context, whole = (tokenizer(one).input_ids for one in (prompt, prompt + text))
        with torch.no_grad():
            logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        found.append(sum(logprobs[at - 1, whole[at]].item() for at in range(len(context), len(whole))))
    return found


@pytest.mark.parametrize("suite", ["arc_easy", "hellaswag", "mmlu", "truthfulqa", "gpqa"])
def test_choices_have_the_likelihoods_of_plain_passes(suite, long_model):
    data = "arc" if suite == "arc_easy" else suite
    report = lmrl.evaluate(long_model, suite, [f"data={file_of(data)}"])
    for one in report.trajectories:
        prompt = one.prompt.rstrip()
        texts = [one.prompt[len(prompt) :] + " " + text for text in one.columns["choices"]]
        expected = by_hand(long_model, prompt, texts)
        assert one.columns["loglikelihoods"] == pytest.approx(expected, abs=1e-4)
        best = max(range(len(expected)), key=expected.__getitem__)
        assert one.completion == one.columns["choices"][best]
        assert one.components["acc"] == one.reward == float(best == one.columns["right"])
        per_letter = [value / len(text) for value, text in zip(expected, one.columns["choices"], strict=True)]
        best = max(range(len(expected)), key=per_letter.__getitem__)
        assert one.components["acc_norm"] == float(best == one.columns["right"])
        (segment,) = one.segments
        assert math.fsum(segment.logprobs[place] for place in segment.actions) == pytest.approx(max(expected), abs=1e-4)


def test_choices_go_into_a_log_and_a_comparison(long_model, tmp_path):
    overrides = [f"data={file_of('hellaswag')}"]
    report = lmrl.evaluate(long_model, "hellaswag", overrides, log=tmp_path / "log", part=1)
    again = lmrl.evaluate(long_model, "hellaswag", overrides, log=tmp_path / "log")
    assert again.metrics == report.metrics and report.metrics["acc"]["n"] == 2
    assert report.played == "all 2 prompts, each answer by its log-likelihood"
    row = json.loads((tmp_path / "log" / "samples.jsonl").read_text().splitlines()[0])
    assert len(json.loads(row["columns"])["loglikelihoods"]) == 4
    found = lmrl.compare([tmp_path / "log", long_model])
    assert [one.mean for one in found.differences] == [0.0, 0.0]
    with pytest.raises(RecipeError, match="choices by log-likelihood, which have no rewards"):
        lmrl.evaluation.api.rescored(tmp_path / "log")


def test_white_space_at_the_end_belongs_to_the_answer(tiny_policy):
    renderer = Renderer(tiny_policy.tokenizer)
    found = continued(renderer, "ab ", ["c", "de"], "")
    letters = {letter: renderer.first(letter)[0] for letter in "abcde "}
    assert found.context == [letters["a"], letters["b"]]
    assert found.continuations == [[letters[" "], letters["c"]], [letters[" "], letters["d"], letters["e"]]]


def test_likeliest_tokens_are_greedy(tiny_policy):
    """Of every token after a context, one is greedy: the likeliest."""
    wanted = Continued([3, 4, 5], [[token] for token in range(len(tiny_policy.tokenizer))])
    (found,) = likelihoods(tiny_policy, [wanted])
    best = max(range(len(found)), key=lambda token: found[token].total)
    assert [token for token, one in enumerate(found) if one.is_greedy] == [best]
    (pair,) = likelihoods(tiny_policy, [Continued([3, 4, 5], [[best, 0], [best]])])
    assert pair[1].is_greedy and pair[1].total == pytest.approx(found[best].total, abs=1e-6)
    assert pair[0].logprobs[0] == pytest.approx(found[best].total, abs=1e-6)


def test_a_context_is_computed_once_for_its_continuations(tiny_policy, monkeypatch):
    assert tiny_policy.shares_prompts
    computed = []
    score = tiny_policy.score
    monkeypatch.setattr(tiny_policy, "score", lambda batch, *args: computed.append(batch) or score(batch, *args))
    (found,) = likelihoods(tiny_policy, [Continued([3, 4, 5, 6], [[1, 2], [7, 8, 9]])])
    (batch,) = computed
    assert [one.tokens.numel() for one in batch.sequences] == [4 + 1 + 2]  # last tokens are only predicted
    (alone,) = likelihoods(tiny_policy, [Continued([3, 4, 5, 6], [[7, 8, 9]])])
    assert found[1].logprobs == pytest.approx(alone[0].logprobs, abs=1e-6)


def test_too_long_a_continuation_is_refused(tiny_policy):
    with pytest.raises(ModelError, match="needs 65 positions, but the model has 64"):
        likelihoods(tiny_policy, [Continued([1] * 60, [[1] * 6])])


# --------------------------------------------------------------------------------------------------------------- mistakes
def test_examples_of_a_file_have_to_be_named():
    with pytest.raises(RecipeError, match="another split .'train'. of the data.*examples=FILE.*shots=0"):
        rows_of("gsm8k")


def test_row_of_another_schema_names_its_place():
    with pytest.raises(
        DataError,
        match=r"gsm8k.jsonl, row 1: does not fit task.prompts.template: 'problem' is undefined .columns: question",
    ):
        rows_of("math_500", "task.prompts.fields={}", data="gsm8k")


def test_invalid_template_is_refused():
    with pytest.raises(RecipeError, match="task.prompts.where: 'subject ==' cannot be read"):
        rows_of("mmlu", "task.prompts.where='subject =='")


def test_rows_are_not_templates(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "{{ 7 * 7 }}{% raw %}", "answer": "#### 1"}) + "\n")
    suite = load_suite("gsm8k", [f"data={tmp_path / 'rows.jsonl'}", "shots=0"])
    assert prompt_rows(suite.task.prompts)[0]["prompt"] == "Question: {{ 7 * 7 }}{% raw %}\nAnswer:"


def test_templates_reach_no_python():
    with pytest.raises(DataError, match="unsafe"):
        rows_of("gsm8k", "shots=0", "task.prompts.template='{{ question.__class__.__mro__ }}'")


def test_where_chooses_rows():
    rows = rows_of("mmlu", "task.prompts.where=\"subject == 'anatomy'\"")
    assert [row["subject"] for row in rows] == ["anatomy"]
    with pytest.raises(DataError, match="leaves no row"):
        rows_of("mmlu", "task.prompts.where='1 > 2'")


def test_too_few_examples_are_counted():
    with pytest.raises(DataError, match="count=2 examples are wanted, but there are only 1 with subject='anatomy'"):
        rows_of("mmlu", "shots=2", f"examples={file_of('mmlu_examples')}")
