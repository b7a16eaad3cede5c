"""What a task is built from."""

import string

import pytest

from lmrl.errors import RecipeError
from lmrl.recipe import Recipe
from lmrl.rollouts.task import task_texts


class Silent:
    """An environment without texts()."""

    def reset(self, *, seed=None, options=None):
        return "?", {}

    def step(self, action):
        return "!", 1.0, True, False, {}


def recipe_with(tokenizer):
    return Recipe.model_validate(
        {
            "model": {"config": {"model_type": "llama"}, "tokenizer": tokenizer},
            "task": {"environment": Silent},
            "source": {"name": "rollouts"},
            "objective": {"name": "ppo"},
            "training": {"steps": 1},
        }
    )


def test_letters_of_an_environment_without_texts_are_printable_ascii():
    assert task_texts(recipe_with("char")) == [string.printable]
    with pytest.raises(RecipeError, match=r"no texts\(\): add it, set model.tokenizer=char, or set model.path"):
        task_texts(recipe_with("word"))
