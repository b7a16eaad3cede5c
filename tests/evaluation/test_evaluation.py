"""Statistics, suites, and `lmrl.evaluate` on everything a policy can be."""

import json
import math
import shutil

import pytest

import lmrl
from lmrl.environments import limits_of
from lmrl.errors import PluginError, RecipeError, ScoreError
from lmrl.evaluation.api import Report, evaluator_for
from lmrl.evaluation.suites import load_suite
from tests.conftest import TINY_WALKS


def test_suite_takes_over_the_task_of_a_run(tmp_path):
    suite = load_suite("random_walks", task={"environment": "random_walks", "graph": 7})
    assert suite.task.graph == 7
    assert load_suite("random_walks", ["task.graph=9"], {"environment": "random_walks", "graph": 7}).task.graph == 9
    other = load_suite("sentiment", task={"environment": "random_walks", "graph": 7})
    assert other.task.prompts.path.endswith("prompts.jsonl")
    own = tmp_path / "own.jsonl"
    own.write_text("")
    imitation = {"prompts": {"path": str(own)}, "rewards": []}
    assert load_suite("sentiment", task=imitation) == load_suite("sentiment")
    judged = imitation | {"rewards": [{"function": "lmrl.reward_models.answers.exact"}]}
    assert load_suite("sentiment", task=judged).task.prompts.path == str(own)
    with pytest.raises(RecipeError, match="no suite called 'random_walk'; did you mean 'random_walks'"):
        load_suite("random_walk")
    with pytest.raises(RecipeError, match="unknown key 'rollouts.tempratur'"):
        load_suite("random_walks", ["rollouts.tempratur=1"])


def test_a_suite_that_does_not_follow_runs_stays_as_it_is(tmp_path):
    (tmp_path / "own.yaml").write_text("task: {environment: random_walks, graph: 2}\nmetrics: [optimality]\n")
    assert load_suite(tmp_path / "own.yaml", task={"environment": "random_walks", "graph": 7}).task.graph == 2


@pytest.mark.parametrize(
    ("suite", "metric"),
    [
        ("task: {environment: maze}", "return"),
        ("task: {prompts: {path: a.jsonl}, rewards: [{function: lmrl.reward_models.shaping.length}]}", "reward"),
        ("task: {prompts: {path: a.jsonl}}\nchoices: {texts: options, right: answer}", "acc"),
    ],
)
def test_the_main_metric_of_a_suite_that_names_none(tmp_path, suite, metric):
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "own.yaml").write_text(suite)
    assert load_suite(tmp_path / "own.yaml").metrics == [metric]


def test_prompts_that_nothing_scores_are_refused(tiny_folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "own.yaml").write_text("task: {prompts: {path: a.jsonl}}\nrollouts: {max_new_tokens: 2}\n")
    with pytest.raises(RecipeError, match=r"^task.rewards: the suite has no reward .*--rescore LOG$"):
        lmrl.evaluate(tiny_folder, tmp_path / "own.yaml")
    assert lmrl.evaluate(tiny_folder, tmp_path / "own.yaml", log=tmp_path / "log").metrics["length"]["n"] == 1


def test_names_of_lmrls_own_metrics_stay_its_own():
    from lmrl.evaluation.scoring import summarize_trajectories
    from lmrl.trajectories.trajectory import Trajectory

    scores = summarize_trajectories([Trajectory([], "", "", reward=0.5, components={"reward": 3.0})], "prompt")
    assert scores["reward"]["mean"] == 0.5 and scores["component/reward"]["mean"] == 3.0


def test_evaluate_a_run_and_its_checkpoints(tmp_path):
    recipe = lmrl.load_recipe(
        "random_walks/bc",
        ["training.steps=4", "training.checkpoint_every=2", "evaluation.every=2", "source.episodes=50", "task.graph=5"],
    )
    result = lmrl.train(recipe, output=tmp_path / "run")
    assert set(result.scores) == {"data", "BC", "optimum"} and result.scores["optimum"]["optimality"]["mean"] == 1
    report = lmrl.evaluate(tmp_path / "run")
    # in-run evaluation and evaluation afterwards play the same episodes with the same weights
    assert report.metrics == result.scores["BC"]
    assert lmrl.evaluate(result.checkpoint, "random_walks").metrics == report.metrics
    assert lmrl.evaluate(tmp_path / "run", checkpoint="step-2").metrics != report.metrics
    lmrl.evaluate(tmp_path / "run", checkpoint="best", overrides=["samples=1"])
    saved = json.loads(report.to_json())
    assert set(saved) == {"suite", "policy", "metrics"} and saved["suite"] == "random_walks"
    assert set(saved["metrics"]["optimality"]) == {"mean", "ci95", "n", "clusters", "holds_for"}
    assert saved["metrics"]["optimality"]["n"] == 20 * 32 and saved["metrics"]["optimality"]["clusters"] == 20
    assert saved["metrics"]["optimality"]["holds_for"] == "new samples of these start states"


def test_evaluate_any_folder_on_heldout_prompts(tiny_folder):
    report = lmrl.evaluate(tiny_folder, "sentiment", ["rollouts.max_new_tokens=4", "task.prompts.max_tokens=200"])
    assert report.metrics["reward"]["n"] == 64 and list(report.metrics)[0] == "reward"
    with pytest.raises(RecipeError, match="name a suite, --suite NAME"):
        lmrl.evaluate(tiny_folder)


# ------------------------------------------------------------------------------------------------------------- own task
@pytest.fixture(scope="module")
def walks_run(tmp_path_factory):
    """A finished run whose recipe names no suite."""
    folder = tmp_path_factory.mktemp("walks") / "run"
    changes = [*TINY_WALKS, "training.steps=2", "evaluation.suite=null", "rollouts.temperature=0.5"]
    lmrl.train("random_walks/bc", changes, output=folder)
    return folder


def test_run_without_a_suite_is_scored_on_its_environment(walks_run):
    evaluator = evaluator_for(walks_run)
    starts = len(evaluator.starts())
    assert evaluator.suite.task.nodes == 8 and evaluator.sampling.temperature == 0.5
    assert evaluator.suite.samples == math.ceil(100 / starts) > 1
    report = lmrl.evaluate(walks_run)
    assert list(report.metrics)[0] == "return" and report.metrics["return"]["n"] == starts * evaluator.suite.samples
    assert report.metrics["return"]["clusters"] == starts and report.suite == "its own task"
    assert report.played == f"all {starts} start states, {evaluator.suite.samples} fresh episodes from each"
    assert 0 <= report.metrics["optimality"]["ci95"][0] <= report.metrics["optimality"]["ci95"][1] <= 1
    few = lmrl.evaluate(walks_run, overrides=["samples=1", "episodes=2", "rollouts.temperature=1"])
    assert few.metrics["return"]["n"] == 2 and few.metrics["return"]["holds_for"] == "new start states"
    with pytest.raises(RecipeError, match="unknown key 'task.node'"):
        lmrl.evaluate(walks_run, overrides=["task.node=9"])


def test_checkpoint_of_an_older_version_takes_the_sampling_of_its_run(walks_run, tmp_path):
    final = walks_run / "stages" / "main" / "final"
    saved = json.loads((final / "lmrl.json").read_text())
    assert saved.pop("rollouts")["temperature"] == 0.5
    old = tmp_path / "run" / "stages" / "main" / "final"
    shutil.copytree(final, old)
    (old / "lmrl.json").write_text(json.dumps(saved))
    assert evaluator_for(old).sampling.temperature == 1.0  # outside of its run
    shutil.copy(walks_run / "recipe.yaml", tmp_path / "run")
    assert evaluator_for(old).sampling.temperature == 0.5


def prompts_run(folder, *changes):
    """A finished run on 20 prompts with a reward of 0 or 1."""
    rows = [{"prompt": "ab" * (1 + number % 5) + chr(97 + number), "id": number} for number in range(20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judge.py").write_text(
        "def starts_with_a(completions, **columns):\n    return [float(text[:1] == 'a') for text in completions]\n"
    )
    (folder / "recipe.yaml").write_text(
        "model: {config: {model_type: gpt2, n_embd: 16, n_layer: 1, n_head: 2, n_positions: 32}}\n"
        "task: {prompts: {path: prompts.jsonl, holdout: 0.3}, rewards: [{function: judge.py:starts_with_a}]}\n"
        "rollouts: {prompts: 4, max_new_tokens: 3}\nobjective: {name: ppo}\n"
        "training: {steps: 1, checkpoint_every: 0, threads: 1}\n"
    )
    lmrl.train(folder / "recipe.yaml", list(changes), output=folder / "run")
    return folder / "run"


def test_run_on_prompts_is_scored_on_those_held_out(tmp_path):
    run = prompts_run(tmp_path)
    report = lmrl.evaluate(run)
    assert report.played == "6 held-out prompts, 17 fresh episodes from each"
    reward = report.metrics["reward"]
    assert (reward["n"], reward["clusters"], reward["holds_for"]) == (102, 6, "new prompts")
    assert 0 <= reward["ci95"][0] < reward["ci95"][1] <= 1
    assert lmrl.evaluate(run / "stages" / "main" / "final").metrics == report.metrics
    seen = lmrl.evaluate(run, overrides=["task.prompts.holdout=0", "samples=2"])
    assert "20 prompts of the task itself" in seen.played
    assert seen.metrics["reward"]["holds_for"] == "new samples of these prompts"
    with pytest.raises(RecipeError, match="/run' has no reward to score by: name a suite, --suite NAME"):
        lmrl.evaluate(run, overrides=["task.rewards=[]"])


def test_drawn_start_states_are_new_ones(tmp_path):
    (tmp_path / "world.py").write_text(
        "import lmrl\n"
        "class Drawn(lmrl.TextEnvironment):\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        super().reset(seed=seed)\n"
        "        return 'xyz'[self.np_random.integers(3)], {}\n"
        "    def step(self, action): return '', float(len(action)), True, False, {}\n"
        "    def texts(self): return ['abcxyz']\n"
    )
    (tmp_path / "recipe.yaml").write_text(
        "model: {config: {model_type: gpt2, n_embd: 16, n_layer: 1, n_head: 2, n_positions: 32}}\n"
        "task: {environment: world.py:Drawn}\nrollouts: {prompts: 4, max_new_tokens: 3}\nobjective: {name: ppo}\n"
        "training: {steps: 1, checkpoint_every: 0, threads: 1}\n"
    )
    lmrl.train(tmp_path / "recipe.yaml", output=tmp_path / "run")
    report = lmrl.evaluate(tmp_path / "run")
    assert report.played == "100 fresh start states, 1 fresh episode from each"
    assert report.metrics["return"]["holds_for"] == "new start states" and report.metrics["return"]["clusters"] == 100


def test_limits_must_be_pairs():
    class Wrong(lmrl.TextEnvironment):
        metric_limits = {"return": 1}

    with pytest.raises(PluginError, match="metric_limits of Wrong"):
        limits_of(Wrong())


# --------------------------------------------------------------------------------------------------------------- floors
def report_of(**means):
    rows = {"policy": {name: {"mean": mean, "ci95": [mean, mean], "n": 1} for name, mean in means.items()}}
    return Report("suite", "run", rows, list(means), [])


def test_a_report_is_shown_without_its_episodes():
    shown = repr(report_of(reward=0.5))
    assert "'reward': {'mean': 0.5" in shown and "trajectories" not in shown and "episodes" not in shown


def test_scores_of_several_rows_are_taken_by_label():
    scores = report_of(reward=0.5).metrics
    report = Report("suite", "A, B", {"A": scores, "B": scores}, ["reward"], [])
    with pytest.raises(RecipeError, match=r"has 2 rows \(A, B\): .*for instance .rows\['A'\]$"):
        _ = report.metrics


def test_floor_is_checked_on_the_mean():
    report = report_of(**{"return": -3.0, "length": 8.0})
    report.require({"return": -3.0, "length": 7.5})
    with pytest.raises(ScoreError, match="return of policy is -3, below -2.5"):
        report.require({"return": -2.5, "length": 7.5})
    with pytest.raises(ScoreError):
        report_of(reward=math.nan).require({"reward": 0.0})
    report_of(reward=0.7 + 0.2 + 0.1).require({"reward": 1.0})  # less than 1, by rounding


def test_a_row_without_the_metric_misses_its_floor():
    """As of an environment that reports it only for episodes that reach the goal: here A's do, and none of B's."""
    first, second = report_of(reward=1.0, seconds=5.0), report_of(reward=1.0)
    report = Report("suite", "A, B", {"A": first.metrics, "B": second.metrics}, ["reward"], [])
    report.require({"reward": 1.0})
    with pytest.raises(ScoreError, match="^seconds of B is not known: no episode has a value of it$"):
        report.require({"seconds": 1.0})


def test_floor_of_an_unknown_metric_is_an_error():
    with pytest.raises(RecipeError, match="no metric 'retrun'.*: this evaluation has return, length"):
        report_of(**{"return": -3.0, "length": 8.0}).require({"retrun": -2.5})


def test_floors_are_read_from_the_command_line():
    from lmrl.cli.eval import _floors

    assert _floors(["return=-3", "length = 7.5"]) == {"return": -3.0, "length": 7.5}
    for text in ("return", "return=low", "return=nan"):
        with pytest.raises(RecipeError, match=f"--fail-under: '{text}' is not METRIC=VALUE, for instance return=-3"):
            _floors([text])


def test_an_evaluation_in_parts_is_the_same(ilql_run):
    evaluator = evaluator_for(ilql_run, overrides=["samples=2"])
    whole, trajectories = evaluator()
    sizes, play = [], evaluator.sampler.play
    evaluator.sampler.play = lambda starts, *args, **options: (
        sizes.append(len(starts)) or play(starts, *args, **options)
    )
    evaluator.at_once = 5  # two start states at a time
    parts, again = evaluator()
    assert sizes == [2, 2, 2, 1] and parts == whole
    assert [(one.group, one.episode, one.completion) for one in again] == [
        (one.group, one.episode, one.completion) for one in trajectories
    ]


def test_selection_uses_other_episodes(ilql_run):
    evaluator = evaluator_for(ilql_run, overrides=["samples=4"])
    chosen, again = evaluator(choosing=True), evaluator(choosing=True)
    assert chosen[0] == again[0] and chosen[0] != evaluator()[0]


def test_shuffled_start_states_are_always_the_same(ilql_run):
    evaluator = evaluator_for(ilql_run, overrides=["shuffled=true"])
    starts = evaluator.starts()
    assert sorted(starts) == list(range(7)) and starts != sorted(starts) and starts == evaluator.starts()
    evaluator.suite.episodes = 3
    assert evaluator.starts() == starts[:3]


def test_rows_with_the_same_prompt_are_one_prompt():
    from lmrl.evaluation.scoring import summarize_trajectories
    from lmrl.trajectories.trajectory import Trajectory, Turn

    rewards = [0.0, 0.2, 0.3, 0.9, 0.5, 0.6]

    def scored(groups):
        episodes = [
            Trajectory(
                [],
                prompt := f"question {place % 3}",
                "",
                reward=reward,
                components={"right": reward},
                group=group,
                turns=[Turn(prompt, "")],
            )
            for place, (reward, group) in enumerate(zip(rewards, groups, strict=True))
        ]
        return summarize_trajectories(episodes, "prompt")["reward"]

    twice, sampled = scored(range(6)), scored([0, 1, 2, 0, 1, 2])
    assert twice == sampled and twice["clusters"] == 3


def test_floors_of_unknown_metrics_are_refused_before_playing(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "reward.py").write_text("def length(completions):\n    return [1.0 for _ in completions]\n")
    task = "task:\n  prompts: {path: prompts.jsonl}\n  rewards: [{function: 'reward.py:length'}]\n"
    suite = tmp_path / "suite.yaml"
    suite.write_text(task + "rollouts: {max_new_tokens: 2}\n")
    monkeypatch.setattr(type(evaluator_for(tiny_folder, str(suite))), "play", None)
    known = "there is no metric 'nosuch': this suite has reward, component/length, length$"
    with pytest.raises(RecipeError, match=f"--fail-under: {known}"):
        lmrl.evaluate(str(tiny_folder), str(suite), floors=["length", "component/length", "length/part", "nosuch"])
    with pytest.raises(RecipeError, match="there is no metric 'kl'"):  # which only training measures
        lmrl.compare([tiny_folder, f"{tiny_folder}/."], str(suite), ["metrics=[reward, kl]"], metrics=["kl"])
    for asked in ({"metrics": ["nosuch"]}, {"control": "nosuch"}, {"claims": ["reward at equal nosuch: B - A > 0"]}):
        with pytest.raises(RecipeError, match=known):
            lmrl.compare([tiny_folder, f"{tiny_folder}/."], str(suite), **asked)
