"""Tasks, and files of logged episodes, for the tests of sources."""

import json

import pytest

from lmrl.policy.tokenizers import build_tokenizer
from lmrl.recipe import DatasetSource, RandomWalksTask
from lmrl.rollouts.task import build_task


@pytest.fixture
def tokenizer():
    return build_tokenizer("char", ["abcdefghijklmnopqrstuvwxyz "])


@pytest.fixture
def walks(tokenizer):
    return build_task(RandomWalksTask(environment="random_walks", graph=1000), tokenizer)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def dataset(**options):
    return DatasetSource(name="dataset", **options)


def rewarded(*triples):
    return [{"prompt": prompt, "completion": text, "reward": reward} for prompt, text, reward in triples]


def said(*contents):
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
