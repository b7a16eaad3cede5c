"""Equality with lm-eval on the same model and local data, and its tasks as suites; where lm-eval is installed."""

import json
import random
from pathlib import Path

import pytest
import torch
from lmrl.reward_models.instructions import CHECKS, followed

import lmrl
from lmrl.errors import RecipeError
from tests.conftest import TINY_LLAMA
from tests.evaluation.test_benchmarks import file_of

lm_eval = pytest.importorskip("lm_eval")

from lmrl.evaluation.harness import manager_of  # noqa: E402 - needs lm_eval

LIKELIHOOD = {
    "arc_easy": ("arc/arc_easy.yaml", "arc"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "hellaswag"),
    "truthfulqa": ("truthfulqa/truthfulqa_mc1.yaml", "truthfulqa"),
    "mmlu": ("mmlu/default/mmlu_anatomy.yaml", "mmlu"),
}
"""Suites with the file of lm-eval's task, and the local data."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A byte-level BPE tokenizer and a random model, so that answers have several tokens and merge with what is before."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bpe") / "model"
    trained = ByteLevelBPETokenizer()
    texts = [path.read_text() for path in (Path(file_of("arc")).parent).glob("*.jsonl")]
    trained.train_from_iterator(texts, vocab_size=400, special_tokens=["<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(3)
    config = LlamaConfig(**(TINY_LLAMA | {"max_position_embeddings": 2048}), vocab_size=len(tokenizer), eos_token_id=0)
    network = LlamaForCausalLM(config)
    with torch.no_grad():
        network.lm_head.weight.mul_(20)  # opinions, so that answers differ
        network.lm_head.weight[0] = 0  # an end that is not the likeliest, so that completions go on
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def local_tasks(folder):
    """lm-eval's own tasks over local files, in a folder that it includes."""
    root = Path(lm_eval.__file__).parent / "tasks"
    for suite, (file, data) in LIKELIHOOD.items():
        splits = ("train", "validation", "dev", "test")  # what the task names beside the one that it plays
        write_task(folder, suite, root / file, dict.fromkeys(splits, file_of(data)))
    write_texts(folder)
    write_task(
        folder, "gsm8k", root / "gsm8k/gsm8k.yaml", {"test": file_of("gsm8k"), "train": file_of("gsm8k_examples")}
    )
    return folder


def write_task(folder, name, file, data_files):
    (folder / f"local_{name}.yaml").write_text(
        f"include: {file}\ntask: local_{name}\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {json.dumps({'data_files': data_files})}\ntag: null\n"
    )


def write_texts(folder):
    """A task of whole texts, and one of continuations that the model might say."""
    rows = [{"text": "The baker kneads dough. " * 60}, {"text": "Stones sink."}]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        "dataset_path: json\ndataset_kwargs: "
        f"{json.dumps({'data_files': {'test': str(folder / 'texts.jsonl')}})}\ntest_split: test\n"
    )
    (folder / "rolling.yaml").write_text(
        f'task: own_rolling\n{common}output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: text\n'
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n"
    )
    (folder / "said.yaml").write_text(
        f"task: own_said\n{common}output_type: loglikelihood\ndoc_to_text: text\ndoc_to_target: so\n"
        "metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc}]\n"
    )


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    """Samples of lm-eval's hf backend, by suite."""
    folder = local_tasks(tmp_path_factory.mktemp("tasks"))
    found = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(model), "dtype": "float32", "device": "cpu"},
        tasks=[f"local_{name}" for name in (*LIKELIHOOD, "gsm8k")],
        task_manager=manager_of(str(folder)),
        bootstrap_iters=0,
    )
    return folder, found


@pytest.mark.parametrize("suite", LIKELIHOOD)
def test_likelihoods_and_accuracy_equal_lm_evals(suite, model, theirs):
    data = LIKELIHOOD[suite][1]
    report = lmrl.evaluate(model, suite, [f"data={file_of(data)}"])
    samples = theirs[1]["samples"][f"local_{suite}"]
    if suite == "mmlu":  # each of lm-eval's tasks has one subject in its description, and all rows of the file here
        report.trajectories, samples = report.trajectories[:1], samples[:1]
    assert len(report.trajectories) == len(samples)
    for one, sample in zip(report.trajectories, samples, strict=True):
        assert one.prompt == sample["arguments"][0][0]
        assert one.columns["loglikelihoods"] == pytest.approx([each[0][0] for each in sample["resps"]], abs=1e-4)
        assert one.components["acc"] == sample["acc"]
        assert one.components["acc_norm"] == sample.get("acc_norm", one.components["acc_norm"])


def test_greedy_completions_equal_lm_evals(model, theirs):
    files = [f"data={file_of('gsm8k')}", f"examples={file_of('gsm8k_examples')}"]
    report = lmrl.evaluate(model, "gsm8k", files)
    samples = [one for one in theirs[1]["samples"]["local_gsm8k"] if one["filter"] == "strict-match"]
    assert [one.prompt for one in report.trajectories] == [one["arguments"][0][0] for one in samples]
    assert [one.completion for one in report.trajectories] == [one["resps"][0][0] for one in samples]
    assert sum(len(one.completion) > 20 for one in report.trajectories) >= 2
    assert [one.components["strict_match"] for one in report.trajectories] == [one["exact_match"] for one in samples]


@pytest.mark.parametrize("name", [*LIKELIHOOD, "gsm8k"])
def test_tasks_of_lm_eval_are_suites(name, model, theirs):
    folder, found = theirs
    report = lmrl.evaluate(model, f"lm-eval:local_{name}", [f"include={folder}"])
    samples = found["samples"][f"local_{name}"]
    for one in report.trajectories:
        their = next(each for each in samples if each["doc_id"] == one.columns["document"])
        assert one.prompt == their["arguments"][0][0]
        if name == "gsm8k":
            assert one.completion == their["resps"][0][0]
        else:
            assert one.columns["loglikelihoods"] == pytest.approx([each[0][0] for each in their["resps"]], abs=1e-4)
    for key, value in found["results"][f"local_{name}"].items():
        metric, comma, which = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            label = metric if which == "none" else f"{metric}/{which}"
            assert report.metrics[label]["mean"] == pytest.approx(value)
            assert report.metrics[label]["holds_for"] == "new documents"


def test_perplexity_and_greedy_accuracy_equal_lm_evals(model, theirs, tmp_path):
    """Whole texts in windows, and continuations that the model would have said."""
    folder, _ = theirs
    arguments = {"pretrained": str(model), "dtype": "float32", "device": "cpu", "max_length": 128}
    found = lm_eval.simple_evaluate(
        "hf",
        model_args=arguments,
        tasks=["own_rolling", "own_said"],
        task_manager=manager_of(str(folder)),
        bootstrap_iters=0,
    )
    short = tmp_path / "short"
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 128}
    short.mkdir()
    for file in model.iterdir():
        (short / file.name).write_bytes(file.read_bytes())
    (short / "config.json").write_text(json.dumps(config))
    for task in ("own_rolling", "own_said"):
        report = lmrl.evaluate(short, f"lm-eval:{task}", [f"include={folder}"])
        for key, value in found["results"][task].items():
            metric, comma, _ = key.partition(",")
            if comma and not metric.endswith("_stderr"):
                assert report.metrics[metric]["mean"] == pytest.approx(value, rel=1e-4), (task, metric)


def test_mistakes_are_named(model, theirs):
    with pytest.raises(RecipeError, match="has no task 'nothing'"):
        lmrl.evaluate(model, "lm-eval:nothing", [f"include={theirs[0]}"])
    with pytest.raises(RecipeError, match="unknown key 'shot'.*did you mean 'shots'"):
        lmrl.evaluate(model, "lm-eval:local_mmlu", ["shot=1"])
    with pytest.raises(RecipeError, match="it does not support --beta, --log, --log-every or --overlap"):
        lmrl.evaluate(model, "lm-eval:local_mmlu", log="x")
    with pytest.raises(RecipeError, match="which an address does not give"):
        lmrl.evaluate("http://127.0.0.1:1/v1#some-model", "lm-eval:local_mmlu", [f"include={theirs[0]}"])
    with pytest.raises(RecipeError, match="scored, not compared"):
        lmrl.compare([model, model], "lm-eval:local_mmlu")


def test_rules_of_ifeval_equal_lm_evals():
    """On answers put together at random from what the rules look at."""
    for module in ("langdetect", "immutabledict", "nltk"):
        pytest.importorskip(module)
    from lm_eval.tasks.ifeval import instructions_registry

    rng = random.Random(0)
    pieces = [
        "owl",
        "Owl",
        " ",
        "\n",
        "\n\n",
        "*",
        "**",
        "***",
        "******",
        "[a]",
        "<<b>>",
        "Section 1",
        "P.S.",
        "p. p. s",
        "- ",
        ",",
    ]
    pieces += ['"', "My answer is no.", "```json", "{}", "```", "say it", "Bye.", "so", "."]
    arguments = {
        "keywords:existence": {"keywords": ["owl", "so"]},
        "keywords:frequency": {"keyword": "owl", "frequency": 2, "relation": "at least"},
        "keywords:forbidden_words": {"forbidden_words": ["owl", "say"]},
        "keywords:letter_frequency": {"letter": "s", "let_frequency": 3, "let_relation": "less than"},
        "length_constraints:number_paragraphs": {"num_paragraphs": 2},
        "length_constraints:number_words": {"num_words": 6, "relation": "at least"},
        "length_constraints:nth_paragraph_first_word": {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Owl"},
        "detectable_content:number_placeholders": {"num_placeholders": 1},
        "detectable_content:postscript": {"postscript_marker": "P.P.S"},
        "detectable_format:number_bullet_lists": {"num_bullets": 1},
        "detectable_format:number_highlighted_sections": {"num_highlights": 1},
        "detectable_format:multiple_sections": {"section_spliter": "Section", "num_sections": 1},
        "combination:repeat_prompt": {"prompt_to_repeat": "Say it"},
        "startend:end_checker": {"end_phrase": "Bye."},
    }
    for name in CHECKS:
        theirs = instructions_registry.INSTRUCTION_DICT[name](name)
        theirs.build_description(**arguments.get(name, {}))
        verdicts = set()
        for _ in range(1500):
            text = "".join(rng.choices(pieces, k=rng.randint(1, 8)))
            if name.startswith(("detectable_format:json", "startend:quotation")) and rng.random() < 0.3:
                text = rng.choice(['```json\n{"a": [1]}\n```', "[1, 2]", '"a"', '"'])
            verdicts.add(followed(name, text, arguments.get(name, {})))
            assert followed(name, text, arguments.get(name, {})) == bool(theirs.check_following(text)), (name, text)
        assert verdicts == {True, False}, name
