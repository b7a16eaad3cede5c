"""Learning rates where a recipe states none."""

import pytest

from lmrl.recipe import OBJECTIVES, DatasetSource, Lora, Model, Optimizer, Recipe, RolloutsSource
from lmrl.recipe.rates import default_rates, with_rates

SCRATCH, PRETRAINED = {"config": {"model_type": "llama"}}, {"path": "folder"}


LOGGED = DatasetSource(name="dataset", player="random")


def recipe(objective: str, model: dict, source=None, **optimizer) -> Recipe:
    return Recipe.model_construct(
        model=Model(**model),
        objective=OBJECTIVES[objective](name=objective),
        optimizer=Optimizer(**optimizer),
        source=source or RolloutsSource(),
    )


@pytest.mark.parametrize(
    ("objective", "model", "parameters", "lr"),
    [
        ("likelihood", PRETRAINED, 7e9, 1.2e-5),
        ("likelihood", PRETRAINED, 135e6, 8.6e-5),
        ("likelihood", PRETRAINED | {"lora": Lora()}, 7e9, 1.2e-4),
        ("likelihood", SCRATCH, 6e4, 1e-3),
        ("ilql", SCRATCH, 1e8, 3.2e-4),
        ("ppo", PRETRAINED, 7e9, 1.2e-6),
        ("grpo", PRETRAINED | {"lora": Lora()}, 7e9, 1.2e-5),
        ("grpo", PRETRAINED | {"lora": Lora()}, 135e6, 1.8e-4),
        ("ppo", SCRATCH, 6e4, 5e-4),
        ("ppo", PRETRAINED, 6e4, 5e-4),  # a small model from a folder, as one that lmrl has trained from scratch
        ("dpo", PRETRAINED, 7e9, 6.1e-7),
    ],
)
def test_default_rates(objective, model, parameters, lr):
    assert default_rates(recipe(objective, model), int(parameters), 64).lr == pytest.approx(lr)


def test_heads_have_a_rate_of_their_own():
    assert default_rates(recipe("ppo", SCRATCH), 60_000, 64).head_lr == 0.01
    assert default_rates(recipe("ppo", PRETRAINED), int(7e9), 4096).head_lr == pytest.approx(2.4e-4)
    assert default_rates(recipe("ilql", PRETRAINED), int(7e9), 4096).head_lr == 1e-3


def test_stated_rates_stay():
    def rates(objective, **stated):
        found = with_rates(recipe(objective, SCRATCH, **stated), 60_000, 64)
        return found.lr, found.head_lr

    assert rates("ppo", lr=3e-4) == (3e-4, 0.01)
    assert rates("ppo", lr=3e-4, head_lr=5e-3) == (3e-4, 5e-3)
    assert rates("ilql", lr=3e-4) == (3e-4, 3e-4)
    assert rates("ppo", head_lr=5e-3) == (5e-4, 5e-3)


def test_policy_gradients_have_a_lower_beta2():
    def chosen(objective, **stated):
        found = with_rates(recipe(objective, SCRATCH, LOGGED, **stated), 60_000, 64)
        return found.betas, found.schedule

    assert chosen("ppo")[0] == (0.9, 0.95)
    assert chosen("ilql") == ((0.9, 0.999), "linear")
    assert chosen("ppo", betas=(0.8, 0.9), schedule="constant") == ((0.8, 0.9), "constant")


@pytest.mark.parametrize(
    ("objective", "source", "model", "parameters", "name"),
    [
        ("ppo", None, SCRATCH, 6e4, "namo"),
        ("grpo", None, PRETRAINED, 6e4, "namo"),
        ("rloo", None, SCRATCH, 1e7, "adamw"),
        ("grpo", None, PRETRAINED | {"lora": Lora()}, 6e4, "adamw"),
        ("archer", None, SCRATCH, 6e4, "adamw"),
        ("likelihood", LOGGED, SCRATCH, 6e4, "adamw"),
        ("ilql", LOGGED, SCRATCH, 6e4, "muon"),
        ("mc", LOGGED, PRETRAINED, 6e4, "muon"),
        ("mc", LOGGED, PRETRAINED, 1e7, "adamw"),
        ("ilql", LOGGED, PRETRAINED | {"lora": Lora()}, 6e4, "adamw"),
        ("ilql", None, SCRATCH, 6e4, "adamw"),  # with fresh episodes, whose rate does not fall
    ],
)
def test_small_models_need_not_be_trained_by_adamw(objective, source, model, parameters, name):
    made = recipe(objective, model, source)
    assert with_rates(made, int(parameters), 64).name == name
    assert with_rates(made, int(parameters), 64, sharded=True).name == "adamw"
    stated = recipe(objective, model, source, name="adamw_8bit")
    assert with_rates(stated, int(parameters), 64).name == "adamw_8bit"


def test_q_values_are_not_held_to_the_usual_gradients():
    def norm(objective, **stated):
        return with_rates(recipe(objective, SCRATCH, **stated), 60_000, 64).max_grad_norm

    assert [norm(name) for name in ("ppo", "likelihood", "ilql", "mc")] == [1.0, 1.0, 10.0, 10.0]
    assert norm("mc", max_grad_norm=1) == 1 and norm("ppo", max_grad_norm=None) is None


def test_the_reason_is_stated():
    assert default_rates(recipe("ppo", PRETRAINED), int(7e9), 4096).reason == (
        "policy gradients, all weights of a pretrained model of 7,000M parameters"
    )


def test_only_ppo_has_a_floor_of_norms():
    floors = {name: with_rates(recipe(name, SCRATCH), 60_000, 64).norm_floor for name in ("ppo", "grpo", "rloo", "mc")}
    assert floors == {"ppo": 0.5, "grpo": 0.0, "rloo": 0.0, "mc": 0.0}
    assert with_rates(recipe("ppo", SCRATCH, name="namo", norm_floor=0.1), 60_000, 64).norm_floor == 0.1
    with pytest.raises(ValueError, match="norm_floor is an option of NAMO: set name to namo too"):
        recipe("ppo", SCRATCH, norm_floor=0.1)
