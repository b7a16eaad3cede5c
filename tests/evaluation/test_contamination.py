"""Prompts that share stretches of words with training data."""

import json

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

import lmrl
from lmrl import cli
from lmrl.errors import DataError, RecipeError, RunError
from lmrl.evaluation import contamination
from lmrl.evaluation.evaluate import Evaluator
from lmrl.evaluation.suites import load_suite
from lmrl.recipe.files import load_recipe
from lmrl.rollouts.task import build_task
from lmrl.trajectories.trajectory import Trajectory, Turn

SHARED = "the quick brown fox jumps over the lazy dog and runs far away from here today"
UPPER = SHARED.upper() + "!"
OTHER = "seven small ships sail slowly across a silent sea of blue glass while nobody is watching"


@pytest.fixture
def suite(tmp_path):
    rows = [
        {"prompt": UPPER, "answer": "a"},
        {"prompt": OTHER, "answer": "b"},
        {"prompt": "short", "answer": ""},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(
        "def judge(prompts, completions, **columns):\n    return [float(len(prompt)) for prompt in prompts]\n"
    )
    (tmp_path / "suite.yaml").write_text(
        "task:\n  prompts: {path: prompts.jsonl}\n  rewards: [judge.py:judge]\n"
        "rollouts: {max_new_tokens: 2}\nmetrics: [reward]\n"
    )
    return tmp_path / "suite.yaml"


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_shared_words_are_found_in_any_field(suite, tiny_folder, tmp_path):
    chat = [{"role": "user", "content": f"Once, {SHARED.replace(' ', '  ')}."}]
    file = write(tmp_path / "train.jsonl", {"messages": chat}, {"text": OTHER[:40]})
    report = lmrl.evaluate(tiny_folder, suite, overlap=[file])
    assert (
        list(report.overlap.shared) == [UPPER]
        and report.overlap.short == ["short"]
        and len(report.overlap.prompts) == 3
    )
    assert report.overlap.shared[UPPER] == " ".join(SHARED.split()[:13])
    assert report.metrics["reward"]["n"] == 3
    assert report.clean["policy"]["reward"]["mean"] == (len(OTHER) + len("short")) / 2
    data = json.loads(report.to_json())
    assert data["overlap"]["shared"] == {UPPER: report.overlap.shared[UPPER]} and "rows_without_overlap" in data


def test_fewer_words_than_asked_are_no_overlap(suite, tiny_folder, tmp_path):
    file = write(tmp_path / "train.jsonl", {"text": " ".join(SHARED.split()[:12])})
    assert lmrl.evaluate(tiny_folder, suite, overlap=[file]).overlap.shared == {}
    assert list(lmrl.evaluate(tiny_folder, suite, overlap=[file], overlap_words=12).overlap.shared) == [UPPER]


def test_json_inside_of_a_field_is_read(suite, tiny_folder, tmp_path):
    file = write(tmp_path / "log.jsonl", {"turns": json.dumps([{"action": "so\n" + SHARED}])})
    assert list(lmrl.evaluate(tiny_folder, suite, overlap=[file]).overlap.shared) == [UPPER]


def test_examples_before_a_prompt_are_no_overlap(suite, tiny_folder, tmp_path):
    examples = write(tmp_path / "examples.jsonl", {"prompt": OTHER, "answer": SHARED})
    changes = [
        "task.prompts.template='{{ prompt }}'",
        f"task.prompts.shots={{count: 1, path: {examples}, template: '{{{{ answer }}}} '}}",
        "task.prompts.where=\"prompt == 'short'\"",
        "task.prompts.fields={kept: answer}",
    ]
    report = lmrl.evaluate(tiny_folder, suite, changes, overlap=[examples])
    assert SHARED in report.trajectories[0].prompt and report.overlap.shared == {}


def test_a_prompt_inside_of_a_template_is_found(suite, tiny_folder, tmp_path):
    file = write(tmp_path / "train.jsonl", {"text": SHARED})
    report = lmrl.evaluate(tiny_folder, suite, ["task.prompts.template='Say: {{ prompt }}'"], overlap=[file])
    assert report.trajectories[1].prompt == f"Say: {OTHER}"
    assert list(report.overlap.shared) == [f"Say: {UPPER}"] and report.overlap.short == ["Say: short"]
    assert report.clean["policy"]["reward"]["n"] == 2


def test_prompts_that_could_not_be_judged_are_found(suite, tiny_folder, tmp_path):
    file = write(tmp_path / "train.jsonl", {"text": SHARED})
    (tmp_path / "judge.py").write_text(
        "def judge(prompts, completions):\n    return [None if 'QUICK' in prompt else 1.0 for prompt in prompts]\n"
    )
    report = lmrl.evaluate(tiny_folder, suite, ["task.max_failed=0.5"], overlap=[file])
    assert [one.group for one in report.trajectories] == [1, 2]
    assert list(report.overlap.shared) == [UPPER] and len(report.overlap.prompts) == 3


def test_what_all_prompts_say_is_no_overlap(suite, tiny_folder, tmp_path):
    """A system message of 14 words, which the training data has as well."""
    system = {"role": "system", "content": "you are kind and " * 3 + "very brief"}

    def chat(text):
        return [system, {"role": "user", "content": text}]

    write(tmp_path / "prompts.jsonl", *({"prompt": chat(text)} for text in (SHARED, OTHER, "what is it")))
    train = write(tmp_path / "train.jsonl", {"messages": chat("what a day")}, {"messages": chat(SHARED)})
    found = lmrl.evaluate(tiny_folder, suite, ["task.prompts.chat=true"], overlap=[train]).overlap
    assert [SHARED in key for key in found.shared] == [True] and ["what is it" in key for key in found.short] == [True]


def test_prompts_are_known_by_their_text(suite, tiny_folder, tmp_path):
    """Of two policies, only the second, by its own tokenizer, plays the first prompt: numbers of prompts differ."""
    file, loaded = write(tmp_path / "train.jsonl", {"text": SHARED}), load_suite(suite)
    task = build_task(loaded.task, AutoTokenizer.from_pretrained(tiny_folder))
    found = contamination.Overlap([file], 13)
    contamination.find_overlap(found, loaded, task, [1, 2])
    assert found.shared == {} and found.prompts == [OTHER, "short"]
    contamination.find_overlap(found, loaded, task, [0, 1, 2])
    assert list(found.shared) == [UPPER] and found.prompts == [OTHER, "short", UPPER] and found.short == ["short"]
    first = [Trajectory([], text, "", group=group, turns=[Turn(text, "")]) for group, text in enumerate([OTHER, UPPER])]
    assert found.clean(first) == first[:1]


def test_a_run_that_continues_another_has_learned_its_data(tiny_folder, tmp_path, monkeypatch):
    """DPO from the final checkpoint of a run of SFT."""
    monkeypatch.setattr(contamination, "final_checkpoint", lambda folder: tiny_folder)
    write(tmp_path / "answers.jsonl", {"prompt": "p", "completion": "imitated"})
    write(tmp_path / "pairs.jsonl", {"prompt": "p", "chosen": "preferred", "rejected": "r"})
    recipe = (
        "model: {{path: {}}}\nobjective: {{name: {}}}\n"
        "task: {{prompts: {{path: {}, holdout: 0}}}}\nsource: {{name: dataset, path: {}}}\n"
    )
    for run, method, model, data in (
        ("sft", "likelihood", "M", tmp_path / "answers.jsonl"),
        ("dpo", "dpo", tmp_path / "sft/stages/main/final", tmp_path / "pairs.jsonl"),
    ):
        (tmp_path / run / "stages/main/final").mkdir(parents=True)
        (tmp_path / run / "recipe.yaml").write_text(recipe.format(model, method, data, data))
    assert {"preferred", "imitated"} <= set(contamination.training_texts(str(tmp_path / "dpo")))
    assert "preferred" not in set(contamination.training_texts(str(tmp_path / "sft")))


def test_a_blend_learns_from_its_parts(tiny_folder, tmp_path, monkeypatch):
    """A log of four prompts, one of them held out, and a task of its own with two."""
    monkeypatch.setattr(contamination, "final_checkpoint", lambda folder: tiny_folder)
    write(tmp_path / "log.jsonl", *({"prompt": f"p{number}", "completion": "c"} for number in range(4)))
    write(tmp_path / "task.jsonl", {"prompt": "q0"}, {"prompt": "q1"})
    (tmp_path / "judge.py").write_text("def judge(completions):\n    return [0.0 for _ in completions]\n")
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{path: {tiny_folder}}}\nobjective: {{name: mc}}\n"
        "task: {prompts: {path: log.jsonl, holdout: 0.25}, rewards: judge.py:judge}\n"
        "source:\n  name: blend\n  parts:\n    - {name: log, log: {path: log.jsonl}}\n"
        "    - {name: other, task: {prompts: {path: task.jsonl, holdout: 0}, rewards: judge.py:judge}}\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    texts = list(contamination.stage_texts(recipe, tmp_path))
    assert sorted(text for text in texts if text[0] == "q") == ["q0", "q1"]
    assert len([text for text in texts if text[0] == "p"]) == 3


def test_pairs_that_a_reward_model_holds_out_are_clean(tiny_folder, tmp_path, monkeypatch):
    """Of five prompts with two pairs each, the task holds out one, and the reward model two in all."""
    monkeypatch.setattr(contamination, "final_checkpoint", lambda folder: tiny_folder)
    rows = [{"prompt": f"p{number}", "chosen": f"c{number}", "rejected": "r"} for number in range(5)]
    write(tmp_path / "pairs.jsonl", *rows, *rows)
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{path: {tiny_folder}}}\nobjective: {{name: reward_model, holdout: 0.4}}\n"
        "task: {prompts: {path: pairs.jsonl, holdout: 0.2}, rewards: []}\nsource: {name: dataset, path: pairs.jsonl}\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    task = build_task(recipe.task, AutoTokenizer.from_pretrained(tiny_folder))
    texts = list(contamination.stage_texts(recipe, tmp_path))
    prompts = [text for text in texts if text[0] == "p"]
    assert len(prompts) == 6 and len(set(prompts)) == 3
    assert task.heldout_prompts().isdisjoint(key for text in prompts for key in task.renderer.keys(text))
    assert sorted(text[1] for text in texts if text[0] == "c") == sorted(prompt[1] for prompt in prompts)


def test_held_out_prompts_of_a_run_are_clean(suite, tiny_folder, tmp_path):
    """A run that trains on four of five prompts, scored on all five."""
    rows = [{"prompt": f"{number} {' '.join(f'w{number}x{word}' for word in range(14))}"} for number in range(5)]
    write(tmp_path / "prompts.jsonl", *rows)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {tiny_folder}}}\n"
        "task: {prompts: {path: prompts.jsonl, holdout: 0.2}, rewards: [judge.py:judge]}\n"
        "rollouts: {prompts: 2, samples: 2, max_new_tokens: 2}\nobjective: {name: rloo}\n"
        "training: {steps: 1, checkpoint_every: 0}\n"
    )
    run = tmp_path / "run"
    lmrl.train(str(recipe), [], output=run)
    report = lmrl.evaluate(run, suite, overlap=[run])
    assert len(report.overlap.shared) == 4 and report.clean["policy"]["reward"]["n"] == 1


def test_a_run_without_text_is_refused(suite, tiny_folder, ilql_run):
    with pytest.raises(RunError, match="learned from no prompts or logged data, only from an environment"):
        lmrl.evaluate(tiny_folder, suite, overlap=[ilql_run])


def test_command_reports_overlap(suite, tiny_folder, tmp_path):
    file = write(tmp_path / "train.jsonl", {"text": SHARED})
    arguments = ["eval", str(tiny_folder), "--suite", str(suite), "--overlap", file, "--overlap-words", "12"]
    shown = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and "overlap: 1 of 3 prompts share 12 words in a row with" in shown.output
    assert "Without overlapping prompts" in shown.output


def test_mistakes_are_named_before_anything_is_played(suite, tiny_folder, ilql_run, monkeypatch):
    monkeypatch.setattr(Evaluator, "play", None)
    with pytest.raises(DataError, match="there is no 'nowhere.jsonl'"):
        lmrl.evaluate(tiny_folder, suite, overlap=["nowhere.jsonl"])
    with pytest.raises(RecipeError, match="plays an environment"):
        lmrl.evaluate(ilql_run, overlap=["x.jsonl"])
