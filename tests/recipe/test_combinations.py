"""Combinations of sections that make no sense: each is refused with its reason and its fix."""

import pytest

from lmrl.errors import RecipeError
from lmrl.recipe.files import load_recipe

MODEL = "model: {config: {model_type: llama}}\n"
ADAPTED = "model: {path: some/model, lora: {r: 4}}\n"
WALKS = "task: {environment: random_walks}\n"
PROMPTS = "task: {prompts: {path: prompts.jsonl}}\n"
RUNNING = (
    "task: {prompts: {path: prompts.jsonl}, "
    "rewards: [{function: lmrl.reward_models.answers.exact, normalize: running}]}\n"
)
UNHELD = "task: {prompts: {path: prompts.jsonl, holdout: 0}, rewards: [{function: lmrl.reward_models.answers.exact}]}\n"
DATA = "source: {name: dataset, player: random}\n"
MIXTURE = "source: {name: mixture, player: random}\n"
ROLLOUTS = "source: {name: rollouts}\n"

REFUSED = [
    (MODEL + WALKS + DATA + "objective: {name: ppo}", "'ppo' learns from its own fresh episodes: set source.name=rollouts"),
    (MODEL + WALKS + MIXTURE + "objective: {name: ppo}", "'ppo' learns from its own fresh episodes: set"),
    (
        MODEL + WALKS + "source: {name: rollouts, best: 0.5}\nobjective: {name: ppo}",
        "'ppo' learns from bad episodes as well as good ones: leave source.best at 1",
    ),
    (MODEL + WALKS + "rollouts: {top_p: 0.9}\nobjective: {name: ppo}", "set rollouts.top_p=1 and rollouts.top_k=0"),
    (MODEL + WALKS + "rollouts: {top_k: 9}\nobjective: {name: ppo}", "set rollouts.top_p=1 and rollouts.top_k=0"),
    (MODEL + WALKS + "rollouts: {temperature: 0}\nobjective: {name: ppo}", "set rollouts.temperature above 0"),
    (
        MODEL + WALKS + "source: {name: rollouts, best: 0.5}\nrollouts: {correction: token_mask}\nobjective: {name: likelihood}",
        "'likelihood' is none: leave it at auto",
    ),
    (MODEL + WALKS + "objective: {name: likelihood}", r"set source.best=0.3 to keep the best \(expert iteration\)"),
    *(
        (
            MODEL + WALKS + f"source: {{{source}, best_among: prompt}}\nobjective: {{name: {name}}}",
            "`source.best_among=prompt` has no effect .* set source.best below 1",
        )
        for source in ("name: dataset, player: random", "name: rollouts", "name: mixture, player: random")
        for name in ("likelihood", "ilql", "ppo", "reward_model")
    ),
    (
        MODEL + WALKS + "source: {name: rollouts, best: 0.5, best_among: prompt}\nrollouts: {samples: 1}\n"
        + "objective: {name: likelihood}",
        "ranks samples of the same prompt: set rollouts.samples to 2 or more",
    ),
    (MODEL + WALKS + MIXTURE + "objective: {name: likelihood}", "'likelihood' would imitate both: set source.name=dataset"),
    (MODEL + WALKS + ROLLOUTS + "objective: {name: q_sft}", "which fresh episodes change: set source.name=dataset"),
    (MODEL + WALKS + MIXTURE + "objective: {name: q_sft}", "which fresh episodes change: set source.name=dataset"),
    *(
        (
            MODEL + WALKS + f"source: {{name: dataset, player: random, best: 0.5}}\nobjective: {{name: {name}}}",
            f"'{name}' learns from bad episodes as well as good ones: leave source.best at 1",
        )
        for name in ("ilql", "mc", "q_sft")
    ),
    (ADAPTED + WALKS + DATA + "objective: {name: q_sft}", "'q_sft' trains a second copy of all weights: leave model.lora out"),
    (ADAPTED + WALKS + DATA + "objective: {name: ilql, trunk: separate}", "with model.lora use shared"),
    (MODEL + PROMPTS + ROLLOUTS + "objective: {name: ppo}", "list at least one under task.rewards"),
    (MODEL + PROMPTS + "source: {name: mixture, path: prompts.jsonl}\nobjective: {name: ilql}", "list at least one under"),
    *(
        (MODEL + RUNNING + source + "objective: {name: ilql}", "together with logged rewards, .*: set `normalize: ")
        for source in (
            "source: {name: mixture, path: prompts.jsonl}\n",
            "source: {name: blend, parts: [{}, {name: log, log: {path: prompts.jsonl}}]}\n",
        )
    ),
    (
        MODEL + RUNNING + "source: {name: blend, curriculum: {}}\nobjective: {name: ppo}",
        "`source.curriculum.solved` is one number for all steps: set `normalize: ",
    ),
    (MODEL + PROMPTS + DATA + "objective: {name: ilql}", "prompts have none: give source.path"),
    (
        MODEL + WALKS + "evaluation: {suite: null, gate: {drop: 1}}\nobjective: {name: ppo}",
        "`evaluation.gate` measures on a suite: set evaluation.suite",
    ),
    *(
        (
            MODEL + task + ROLLOUTS + f"evaluation: {{suite: {suite}}}\ntraining: {{final: best}}\nobjective: {{name: ppo}}",
            "`training.final=best` keeps the policy with the best score, but nothing is scored: set evaluation.suite",
        )
        for task, suite in ((WALKS, "null"), (UNHELD, "task"))
    ),
    (
        MODEL + WALKS + "source: {name: dataset, player: random, turns: 2}\nobjective: {name: ilql}",
        "all turns share a context: set task.history=1",
    ),
    *(
        (
            MODEL
            + "task: {environment: maze}\nsource: {name: dataset, player: random, turns: 2}\n"
            + f"objective: {{{objective}}}",
            "`source.turns` cuts off the returns that followed",
        )
        for objective in ("name: mc", "name: ilql, calibrated: true")
    ),
    *(
        (
            MODEL
            + f"task: {{{task}}}\nobjective: {{name: {objective}}}\n"
            + f"source: {{name: blend, parts: [{{name: a, log: {{player: random, {log}}}}}]}}",
            said,
        )
        for task, objective, log, said in (
            ("environment: maze", "ilql", "best: 0.5", "leave source.parts.a.log.best at 1"),
            ("environment: maze", "mc", "turns: 2", "`source.parts.a.log.turns` cuts off the returns that followed"),
            ("environment: maze, history: all", "ilql", "turns: 2", "all turns share a context: set task.history=1"),
            ("environment: maze", "likelihood", "best_among: prompt", "set source.parts.a.log.best below 1"),
            ("environment: maze", "dpo", "turns: 2", "compares whole episodes: leave source.parts.a.log.turns out"),
            ("prompts: {path: prompts.jsonl}", "likelihood", "best: 0.5", "prompts have none: give source.parts.a.log.path"),
        )
    ),
]  # fmt: skip

ALLOWED = [
    MODEL + RUNNING + ROLLOUTS + "objective: {name: ppo}",
    MODEL + RUNNING + "source: {name: dataset, path: prompts.jsonl}\nobjective: {name: ilql}",
    MODEL
    + RUNNING.replace("running", "[0, 2]")
    + "source: {name: mixture, path: prompts.jsonl}\nobjective: {name: ilql}",
    MODEL + WALKS + ROLLOUTS + "objective: {name: ppo}",
    MODEL + WALKS + "source: {name: rollouts, best: 0.3}\nobjective: {name: likelihood}",
    MODEL + WALKS + "source: {name: dataset, player: random, best: 0.3}\nobjective: {name: likelihood}",
    MODEL
    + WALKS
    + "source: {name: dataset, player: random, best: 0.3, best_among: prompt}\nobjective: {name: likelihood}",
    MODEL
    + WALKS
    + "source: {name: rollouts, best: 0.3, best_among: prompt}\nrollouts: {samples: 4}\n"
    + "objective: {name: likelihood}",
    *(MODEL + WALKS + DATA + f"objective: {{name: {name}}}" for name in ("ilql", "mc", "q_sft")),
    *(MODEL + WALKS + MIXTURE + f"objective: {{name: {name}}}" for name in ("ilql", "mc")),
    MODEL + WALKS + ROLLOUTS + "objective: {name: ilql}",
    ADAPTED + WALKS + DATA + "objective: {name: ilql, trunk: detached}",
    MODEL + PROMPTS + "source: {name: dataset, path: prompts.jsonl}\nobjective: {name: ilql}",
    MODEL + "task: {environment: maze}\nsource: {name: dataset, player: random, turns: 2}\nobjective: {name: ilql}",
    MODEL + WALKS + "evaluation: {suite: random_walks, gate: {drop: 1}}\nobjective: {name: ppo}",
    MODEL + WALKS + "evaluation: {gate: {drop: 1}}\ntraining: {final: best}\nobjective: {name: ppo}",
    MODEL
    + PROMPTS
    + DATA.replace("player: random", "path: prompts.jsonl")
    + "objective: {name: dpo}\n"
    + "evaluation: {metric: heldout/accuracy}\ntraining: {final: best}",
]


def load(folder, text):
    (folder / "prompts.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / "mine.yaml").write_text(text)
    return load_recipe(folder / "mine.yaml")


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_refused(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value) and "mine.yaml" in str(caught.value)


@pytest.mark.parametrize("text", ALLOWED)
def test_allowed(tmp_path, text):
    assert load(tmp_path, text).objective.name in text


# ---------------------------------------------------------------------------------------------------------------- starts
STAGED = MODEL + WALKS + DATA + "objective: {name: likelihood}\nstages: {one: {}, two: {}}\n"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("start: three", "`start`: 'three' is no earlier stage"),
        ("start: main", "`start`: 'main' is no earlier stage"),
        ("stages: {one: {start: two}, two: {}}", "`stages.one.start`: 'two' is no earlier stage"),
        ("stages: {one: {}, two: {start: two}}", "`stages.two.start`: 'two' is no earlier stage"),
        ("stages: {}\nstart: one", "`start`: 'one' is no earlier stage"),
        ("stages: {one: {start: 3}}", "`stages.one.start`: '3' is no earlier stage"),
    ],
)
def test_an_unknown_start_is_refused(tmp_path, lines, message):
    staged = STAGED if "stages" not in lines else STAGED.partition("stages")[0]
    with pytest.raises(RecipeError, match=message):
        load(tmp_path, staged + lines + "\n")


def test_starts_of_stages(tmp_path):
    from lmrl.recipe.files import stages_of

    text = STAGED.replace("two: {}", "two: {start: one}, three: {start: model}") + "start: two\n"
    starts = {name: stage.start for name, stage in stages_of(load(tmp_path, text)).items()}
    assert starts == {"one": "previous", "two": "one", "three": "model", "main": "two"}
