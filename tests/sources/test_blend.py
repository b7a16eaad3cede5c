"""Several tasks and logs in one run: shares by weight, metrics by part, the curriculum, resume."""

import json

import pytest

import lmrl
from lmrl.errors import RecipeError
from lmrl.recipe.blend import Curriculum
from lmrl.recipe.files import load_recipe
from lmrl.sources.blend import Shares
from lmrl.sources.curriculum import Schedule
from tests.runs import assert_same_run

TINY = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1} | {
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
REWARDS = """
def short(completions, **_):
    return [float(len(text) < 2) for text in completions]

def never(completions, **_):
    return [0.0 for _ in completions]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(REWARDS)
    for name, letters in (("a", "abcdefgh"), ("b", "stuvwxyz")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": letter}) + "\n" for letter in letters))
        rows = [{"prompt": letter, "completion": letter * 2} for letter in letters]
        (tmp_path / f"{name}-log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def task(name, reward="short"):
    return {"prompts": {"path": f"{name}.jsonl", "holdout": 0}, "rewards": f"r.py:{reward}"}


def blended(parts, **sections):
    return {
        "model": {"config": dict(TINY)},
        "task": task("a"),
        "source": {"name": "blend", "parts": parts},
        "rollouts": {"prompts": 6, "samples": 2, "max_new_tokens": 3},
        "objective": {"name": "rloo"},
        "training": {"steps": 3, "threads": 1},
        "evaluation": {"suite": None},
    } | sections


# ----------------------------------------------------------------------------------------------------------------- shares
def test_shares_by_hand():
    shares = Shares([2, 1], 4)
    # lags: unit 1 -> part 0, 2 -> 1 (2/3 against 1/3), 3 -> 0, 4 -> 0, ...
    assert [shares(step) for step in (1, 2, 3)] == [([3, 1], [0, 0]), ([2, 2], [3, 1]), ([3, 1], [5, 3])]
    assert shares(2) == ([2, 2], [3, 1])  # a step is asked for again


def test_shares_follow_the_weights():
    weights = [0.1, 3, 1.7, 0.01]
    shares = Shares(weights, 7)
    for step in range(1, 200):
        counts, before = shares(step)
        assert sum(counts) == 7 and min(counts) >= 0
        for weight, count, earlier in zip(weights, counts, before, strict=True):
            assert abs(count + earlier - weight / sum(weights) * 7 * step) < 1.5


# ------------------------------------------------------------------------------------------------------------- curriculum
def schedule(**options):
    return Schedule([0, 1, 2, 3], Curriculum(episodes=2, rest=3, **options), ("test",))


def test_all_start_states_come_in_each_pass():
    one = schedule()
    assert sorted(one.next(1, 3) + one.next(2, 1)) == [0, 1, 2, 3]
    assert sorted(one.next(3, 4)) == [0, 1, 2, 3]


def test_always_and_never_solved_rest_and_come_back():
    one = schedule()
    rewards = {0: [1, 1], 1: [0, 0], 2: [1, 0], 3: [0, 1]}
    one.record(1, [(start, reward) for start, both in rewards.items() for reward in both])
    assert one.resting(2) == 2
    assert set(one.next(2, 6)) == {2, 3} and set(one.next(4, 4)) == {2, 3}
    assert set(one.next(5, 8)) == {0, 1, 2, 3}  # three steps of rest are over
    one.record(5, [(0, 1), (0, 1), (1, 1), (1, 0)])
    assert one.records[0].rest == 6 and one.rests(0, 11) and not one.rests(0, 12)  # twice as long
    assert one.records[1].rest == 0 and not one.rests(1, 6)


def test_a_rounded_sum_of_rewards_is_solved():
    one = schedule()
    one.record(1, [(0, 0.7 + 0.2 + 0.1), (0, 0.7)])  # .9999999999999999
    assert one.resting(2) == 0 and one.records[0].rest == 0


def test_a_rest_has_a_limit():
    one = schedule(longest=5)
    for step in (1, 10, 20):
        one.record(step, [(0, 0), (0, 0)])
    assert one.records[0].rest == 5 and one.records[0].until == 25


def test_where_all_rest_the_next_to_wake_is_played():
    one = schedule()
    for step, start in enumerate((2, 0, 3, 1), start=1):
        one.record(step, [(start, 0), (start, 0)])
    assert one.next(4, 5) == [2, 0, 3, 1, 2]


def test_few_episodes_are_not_judged():
    one = schedule()
    one.record(1, [(0, 0)])
    assert not one.rests(0, 2)
    one.record(2, [(0, 0)])
    assert one.rests(0, 3)


# ------------------------------------------------------------------------------------------------------------------- runs
def test_two_tasks_share_the_prompts_and_have_metrics(folder):
    parts = [{"name": "own", "weight": 2}, {"name": "hard", "task": task("b", "never")}]
    result = lmrl.train(blended(parts), output=folder / "run")
    metrics = result.metrics
    assert list(metrics["own/episodes"]) == [8, 8, 8] and list(metrics["hard/episodes"]) == [4, 4, 4]
    assert (metrics["hard/reward"] == 0).all() and metrics["own/reward/short"].notna().all()
    weighted = (metrics["own/reward"] * 8 + metrics["hard/reward"] * 4) / 12
    assert weighted.tolist() == pytest.approx(metrics["reward"].tolist())
    prompts = set(result.samples["prompt"])
    assert prompts & set("abcdefgh") and all(len(prompt) == 1 for prompt in prompts)


def test_groups_of_parts_are_kept_apart(folder):
    """The baseline of RLOO is among samples of one prompt: numbers that parts shared would mix them."""
    from lmrl.sources import blend

    seen = []
    original = blend.Blend.next

    def watched(self, step):
        batch = original(self, step)
        seen.append([(one.group, one.episode, one.prompt) for one in batch.learn])
        return batch

    blend.Blend.next = watched
    try:
        lmrl.train(blended([{"name": "own"}, {"name": "b", "task": task("b")}]), output=folder / "run")
    finally:
        blend.Blend.next = original
    for step in seen:
        assert [group for group, _, _ in step] == [number // 2 for number in range(12)]
        assert [episode for _, episode, _ in step] == list(range(12))
        assert all(step[place][2] == step[place + 1][2] for place in range(0, 12, 2))


def test_logs_are_learned_from_by_weight(folder):
    recipe = blended(
        [{"name": "a", "weight": 3, "log": {"path": "a-log.jsonl"}}, {"name": "b", "log": {"path": "b-log.jsonl"}}],
        task={"prompts": {"holdout": 0.25}},
        objective={"name": "likelihood"},
    )
    recipe["source"]["batch_size"] = 8
    result = lmrl.train(recipe, output=folder / "run")
    assert set(result.metrics["a/episodes"]) == {6} and set(result.metrics["b/episodes"]) == {2}
    assert result.scores["SFT"]["heldout/nll"]["n"] == 4  # a quarter of each file
    again = lmrl.train(folder / "run", ["training.steps=4"], resume=True)
    assert len(again.metrics) == 4


def test_tasks_and_logs_together(folder):
    logged = {"name": "logged", "log": {"path": "b-log.jsonl"}, "task": task("b")}
    rows = [json.loads(line) | {"reward": 1.0} for line in (folder / "b-log.jsonl").read_text().splitlines()]
    (folder / "b-log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = blended([{"name": "own"}, logged], objective={"name": "ilql", "q_head": "linear"})
    recipe["source"]["batch_size"] = 4
    metrics = lmrl.train(recipe, output=folder / "run").metrics
    assert set(metrics["own/episodes"]) == {12} and set(metrics["logged/episodes"]) == {4}
    assert len(metrics) == 3 and metrics["q_loss"].notna().all()


def test_a_resumed_run_is_the_same(folder):
    recipe = blended(
        [{"name": "own"}, {"name": "hard", "task": task("b", "never")}], training={"steps": 6, "threads": 1}
    )
    recipe["source"]["curriculum"] = {"episodes": 2, "rest": 2}
    recipe["training"]["checkpoint_every"] = 3
    whole = lmrl.train(recipe, output=folder / "whole")
    assert whole.metrics["hard/resting"].max() > 0
    part = folder / "part"
    import shutil

    shutil.copytree(folder / "whole", part)
    shutil.rmtree(part / "stages/main/final")
    shutil.rmtree(part / "stages/main/checkpoints/step-000006", ignore_errors=True)
    lmrl.train(part, resume=True)
    assert_same_run(folder / "whole", part, weights=1)


def test_objects_are_parts(folder):
    def zero(completions, **_):
        return [0.0] * len(completions)

    rows = [{"prompt": letter} for letter in "xyz"]
    parts = [{"name": "own"}, {"name": "mine", "task": {"prompts": rows, "rewards": zero}}]
    recipe = load_recipe(blended(parts))
    assert recipe.source.parts[1].task.rewards[0].function == "python:zero"
    assert recipe.source.parts[1].task.prompts.path.startswith("python:rows_")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"source": {"name": "blend", "parts": [{"name": "x"}, {"name": "x"}]}}, "two parts are called 'x'"),
        ({"source": {"name": "blend", "batch_size": 4}}, "no part is a log"),
        ({"source": {"name": "blend", "parts": [{"log": {"path": "a-log.jsonl", "batch_size": 3}}]}}, "set source.batch_size"),
        ({"source": {"name": "blend", "parts": [{"task": {"promts": 3}}]}}, "task"),
        ({"rollouts": {"prompts": 2, "samples": 2, "ahead": 1}}, "source 'blend' plays several"),
        ({"source": {"name": "blend", "curriculum": {"low": 0.5, "high": 0.5}}}, "`low` has to be below `high`"),
        ({"objective": {"name": "likelihood"}, "source": {"name": "blend", "parts": [{"name": "a"}, {"name": "b", "log": {"path": "a-log.jsonl"}}]}}, "source 'blend' with fresh and logged"),
    ],
)  # fmt: skip
def test_mistakes(folder, change, said):
    with pytest.raises(RecipeError, match=said):
        load_recipe(blended([{"name": "own"}]) | change)


def test_a_curriculum_needs_numbered_starts(folder):
    (folder / "g.py").write_text(
        "import lmrl\nclass G(lmrl.TextEnvironment):\n"
        "    def reset(self, *, seed=None, options=None): return 'a', {}\n"
        "    def step(self, action): return '', 1.0, True, False, {}\n"
        "    def texts(self): return ['a']\n"
    )
    recipe = blended([{"name": "own"}], task={"environment": "g.py:G"})
    recipe["source"]["curriculum"] = {}
    with pytest.raises(RecipeError, match="part 'own' draws its start states"):
        lmrl.train(recipe, output=folder / "run")
