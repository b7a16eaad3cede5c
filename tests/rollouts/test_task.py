"""What a task is built from."""

import string

import pytest

from lmrl.errors import ModelError, RecipeError
from lmrl.recipe import Recipe
from lmrl.rollouts.task import Task, task_texts


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


def test_a_prompt_beyond_the_model_is_refused():
    task = Task(None, None, None, None, longest_prompt=61, positions=64)
    task.check_prompts_fit(3)
    with pytest.raises(
        ModelError, match="longest prompt has 61 tokens, .*max_new_tokens=4 more need 65 positions.* has 64"
    ):
        task.check_prompts_fit(4)
