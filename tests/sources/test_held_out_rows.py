"""Prompts that are held out for evaluation, in the rows of a log."""

import pytest
from transformers import AutoTokenizer

from lmrl.evaluation.suites import Suite
from lmrl.recipe import Prompts, PromptTask
from lmrl.rollouts.task import PromptEnvironment, Task, build_task
from lmrl.sources.dataset import open_dataset_file
from lmrl.training.build import watch_suite
from lmrl.trajectories.render import Renderer
from tests.sources.conftest import dataset, lines, said


def test_heldout_prompts_are_kept_out_of_logged_data(tmp_path, tokenizer):
    path = lines(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}])
    prompts = [{"prompt": "a"}, {"prompt": "e"}]
    task = Task(
        lambda: PromptEnvironment(prompts, "prompt"), Renderer(tokenizer), [1], [0], judged_by="reward"
    )  # fmt: skip
    file = open_dataset_file(dataset(path=path), task)
    assert [file[index].prompt for index in range(len(file))] == ["c"]
    assert [episode.prompt for episode in file.heldout()] == ["a"]


def row_prompt(row):
    return row["prompt"] if isinstance(row.get("prompt"), str) else ""


RENDERED = "[user]a<eos>\n[assistant]"
SYSTEM = {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "a"},
        {"prompt": "a", "chat": True},
        {"prompt": "a", "chat": True, "system": "be brief"},
        {"prompt": said("a")},
        {"prompt": [SYSTEM, *said("a")]},
        {"prompt": RENDERED, "special_tokens": "parse"},
    ],
)
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "x"},
        {"messages": said("a", "x")},
        {"messages": [SYSTEM, *said("a", "x")]},
        {"prompt": said("a"), "completion": said("a", "x")[1:]},
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        {"chosen": said("a", "x"), "rejected": said("a", "y")},
        {"turns": [{"observation": "a", "action": "x"}], "prompt_messages": said("a")},
        {"prompt": RENDERED, "completion": "x"},
    ],
)
def test_a_held_out_prompt_is_known_in_any_form(tmp_path, tiny_folder, options, row):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    options = dict(options)
    prompts = [{"prompt": options.pop("prompt")}, {"prompt": "other"}]
    renderer = Renderer(tokenizer, **options)
    task = Task(lambda: PromptEnvironment(prompts, "prompt"), renderer, [1], [0], judged_by="reward")
    other = {"chosen": "m n", "rejected": "m o"} if "chosen" in row else {"prompt": "z", "completion": "y"}
    stated = "" if renderer.chat or isinstance(prompts[0]["prompt"], list) else prompts[0]["prompt"]
    if {stated, row_prompt(row)} == {"a", RENDERED}:
        pytest.skip("raw text is another prompt than rendered text")
    file = open_dataset_file(dataset(path=lines(tmp_path / "data.jsonl", [row, other])), task)
    assert {episode.completion for episode in file.heldout()} == {"x", "y"} - ({"y"} if "chosen" not in row else set())
    assert len(file) == (2 if "chosen" in row else 1)


def test_a_held_out_dialogue_is_found_inside_a_longer_one(tmp_path, tiny_folder):
    renderer = Renderer(AutoTokenizer.from_pretrained(tiny_folder))
    prompts = [{"prompt": said("a", "b", "c")}, {"prompt": said("z")}]
    task = Task(lambda: PromptEnvironment(prompts, "prompt"), renderer, [1], [0], judged_by="reward")
    rows = [{"messages": said("a", "b", "c", "d", "e", "f")}, {"messages": said("a", "other", "c", "d")}]
    file = open_dataset_file(dataset(path=lines(tmp_path / "data.jsonl", rows)), task)
    assert [episode.turns[0].action for episode in file.heldout()] == ["b"] and len(file) == 1


def test_a_holdout_that_matches_no_row_is_reported(tmp_path, tokenizer):
    path = lines(tmp_path / "data.jsonl", [{"prompt": "c", "completion": "d"}])
    prompts = [{"prompt": "a"}, {"prompt": "b"}]
    task = Task(lambda: PromptEnvironment(prompts, "prompt"), Renderer(tokenizer), [1], [0], judged_by="reward")
    assert open_dataset_file(dataset(path=path), task).notes == [
        f"{path}: none of its prompts is held out by task.prompts.holdout, so no row is left out"
    ]


def test_prompts_that_are_trained_on_and_scored_are_reported(tmp_path, tokenizer):
    path = lines(tmp_path / "prompts.jsonl", [{"prompt": letter} for letter in "abcdefghij"])
    scored = lines(tmp_path / "scored.jsonl", [{"prompt": "a"}, {"prompt": "z"}])
    suite = Suite(task=PromptTask(prompts=Prompts(path=scored, holdout=0)))
    section = PromptTask(prompts=Prompts(path=path, holdout=0))
    task = build_task(section, tokenizer)
    watch_suite(task, suite, tokenizer, plays=True)
    (note,) = task.notes
    assert note.startswith("warning: 1 of 10 training prompts are also in evaluation.suite")
    task = build_task(section, tokenizer)
    watch_suite(task, suite, tokenizer, plays=False)
    assert task.notes == [] and {"a", "z"} <= task.scored
    log = lines(tmp_path / "log.jsonl", [{"prompt": "a", "completion": "d"}, {"prompt": "b", "completion": "d"}])
    (note,) = open_dataset_file(dataset(path=log), task).notes
    assert note.startswith(f"warning: {log}: the prompts of 1 episode are also in evaluation.suite")
    own = build_task(PromptTask(prompts=Prompts(path=path, holdout=0.1)), tokenizer)
    watch_suite(own, Suite(task=PromptTask(prompts=Prompts(path=path, holdout=0.1))), tokenizer, plays=True)
    assert own.notes == []  # the held-out tenth of its own prompts
