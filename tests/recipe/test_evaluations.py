"""How many evaluations a stage has room for, by hand."""

import pytest

from lmrl.recipe.evaluations import BETWEEN, OFFLINE_SHARE, SHARE, Plan, own_plan, suite_interval
from lmrl.recipe.files import load_recipe, stages_of

OWN = ["evaluation.suite=task", "rollouts.prompts=10", "rollouts.samples=10"]


def ppo(*changes):
    return load_recipe("random_walks/ppo", [*OWN, *changes])


@pytest.mark.parametrize(
    ("changes", "plan"),
    [
        (["training.steps=90"], Plan(10, 60)),  # 8 % of 9,000 are 720, for 8 evaluations between and 4 around
        (["training.steps=900"], Plan(100, 256)),  # 600 each, of which 256 are enough
        (["training.steps=40"], Plan(8, 40)),  # 320: with 8 between 26 each, too few; with 4 between 40
        (["training.steps=8"], Plan(0, 32)),  # 64, at the start and the end
        (["training.steps=4"], Plan(0, 16)),
        (["training.steps=3"], None),  # 12 each: too few
        (["training.steps=3", "evaluation.every=0"], Plan(0, 16)),  # asked for
        (["training.steps=3", "training.final=best"], Plan(0, 16)),
        (["training.steps=90", "evaluation.every=30"], Plan(30, 120)),  # at 30 and 60, and 4 around
        (["training.steps=90", "evaluation.every=0"], Plan(0, 256)),
        (["training.steps=90", "evaluation.episodes=100"], Plan(30, 100)),  # room for 7
        (["training.steps=3", "evaluation.episodes=100"], Plan(0, 100)),
    ],
)
def test_plan_by_hand(changes, plan):
    assert own_plan(ppo(*changes)) == plan


def test_imitation_of_a_log_is_scored_at_its_ends():
    warmup = stages_of(ppo("stages.warmup.training.steps=400"))["warmup"]
    assert own_plan(warmup) == Plan(0, 64)  # of 2 % of 400 x 128
    assert own_plan(load_recipe("random_walks/bc", ["evaluation.suite=task", "training.steps=2"])) is None


def test_an_offline_stage_has_less_room():
    recipe = load_recipe("maze/ilql", ["evaluation.suite=task", "training.steps=1000", "source.batch_size=24"])
    assert own_plan(recipe) == Plan(112, 40)  # 2 % of 24,000 are 480, for 12
    assert (SHARE, OFFLINE_SHARE) == (0.08, 0.02)


def test_every_plan_stays_within_its_share():
    for steps in range(4, 400, 7):
        recipe = ppo(f"training.steps={steps}")
        plan = own_plan(recipe)
        between = (steps - 1) // plan.every if plan.every else 0
        assert between <= BETWEEN and plan.episodes * (between + 4 if between else 2) <= 8 * steps + 1e-6


def test_suite_interval_by_hand():
    recipe = ppo("training.steps=90")  # room for 720 episodes
    assert [suite_interval(recipe, size) for size in (60, 90, 144, 180, 672)] == [10, 18, 45, 0, 0]
    assert suite_interval(ppo("training.steps=90", "evaluation.every=0"), 1) == 0
    assert suite_interval(ppo("training.steps=90", "evaluation.every=7"), 672) == 7
    assert suite_interval(stages_of(recipe)["warmup"], 1) == 0


@pytest.mark.parametrize(
    ("changes", "scored"),
    [
        ([], True),
        (["evaluation.suite=null"], False),
        (["task.prompts.holdout=0"], False),
        (["task.rewards=[]", "source={name: dataset, path: x.jsonl}", "objective={name: likelihood}"], False),
        (["source={name: dataset, path: x.jsonl}", "objective={name: likelihood}"], True),
        (
            [
                "source={name: dataset, path: x.jsonl}",
                "objective={name: likelihood}",
                "task.rewards=[{url: 'http://a'}]",
            ],
            False,  # offline, nothing else asks the server
        ),
        (["task.rewards=[{url: 'http://a'}]"], True),
    ],
)
def test_which_prompts_are_scored(tmp_path, monkeypatch, changes, scored):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    recipe = load_recipe("arithmetic/grpo", ["evaluation.suite=task", *changes])
    assert recipe.scores_own_task is scored
