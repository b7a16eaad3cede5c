"""`lmrl new`: what it writes says what it saw, and trains."""

import json

import pytest
from typer.testing import CliRunner

import lmrl
from lmrl.cli import app
from lmrl.errors import DataError, LmrlError, RecipeError
from lmrl.recipe.files import load_recipe
from lmrl.training import dry_run

GAME = '''
from lmrl import TextEnvironment


class Coin(TextEnvironment):
    """Call it three times."""

    players = ("random",)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turn = 0
        return "call it", {}

    def step(self, action):
        self.turn += 1
        right = action.strip() == ("heads" if self.np_random.random() < 0.9 else "tails")
        return "again", float(right), self.turn == 3, False, {}

    def act(self, player, rng):
        return str(rng.choice(["heads", "tails"]))

    def texts(self):
        return ["call it", "again", "heads", "tails"]


class Silent(Coin):
    players = ()


class Numbered(Silent):
    def reset(self, **options):
        return 7, {}


class Counted(Coin):
    def step(self, action):
        observation, *rest = super().step(action)
        return f"turn {self.turn}", *rest

    def texts(self):
        return ["call it", "turn 0123456789", "heads", "tails"]


class Logbook(Coin):
    """Observations of 1,000 and 2,000 letters: both at once are too long."""

    def step(self, action):
        observation, *rest = super().step(action)
        return "x" * 1000 * self.turn, *rest

    def texts(self):
        return []


class TimeLimit(Coin):
    def step(self, action):
        observation, reward, over, _, info = super().step(action)
        return observation, reward, False, over, info


class Survival(Coin):
    def step(self, action):
        self.turn += 1
        return "again", 1.0, self.np_random.random() < 0.3, False, {}


class Strict(Coin):
    def step(self, action):
        return super().step({"heads": "heads", "tails": "tails"}[action])

    def allowed_actions(self):
        return ["heads", "tails"]
'''


def new(*arguments) -> str:
    done = CliRunner().invoke(app, ["new", *map(str, arguments)])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


@pytest.mark.parametrize("method", ["ppo", "mc"])
def test_an_environment(tmp_path, method):
    (tmp_path / "game.py").write_text(GAME)
    file = tmp_path / "mine.yaml"
    said = new(file, "-e", f"{tmp_path}/game.py:Coin", "-m", method, "--tiny")
    assert "64 episodes of player 'random': 3 turns" in said and f"lmrl train {file}" in said
    recipe = load_recipe(file)
    assert recipe.model.tokenizer == "word" and recipe.rollouts.max_new_tokens == 4  # a word and its end, and room
    assert recipe.model.config["max_position_embeddings"] == 32
    dry_run(recipe)


@pytest.mark.parametrize(
    ("game", "tokenizer", "history", "allowed", "positions"),
    [
        ("Coin", "word", "all", False, 32),
        ("Counted", "char", "all", False, 64),  # its texts have the digits of "turn 2", not the word
        ("Logbook", "char", 1, False, 4096),  # the longest: 2,000 letters and an action of 6 tokens
        ("Strict", "word", "all", True, 32),
        ("Survival", "word", "all", False, 512),  # up to 100 turns of 4 tokens, though those seen end much sooner
    ],
)
def test_the_recipe_fits_the_game(tmp_path, game, tokenizer, history, allowed, positions):
    (tmp_path / "game.py").write_text(GAME)
    new(tmp_path / "mine.yaml", "-e", f"{tmp_path}/game.py:{game}", "--tiny")
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.model.tokenizer == tokenizer and recipe.model.config["max_position_embeddings"] == positions
    assert recipe.task.history == history and recipe.task.allowed_actions == allowed


def test_a_game_that_only_a_limit_ends_is_noted(tmp_path):
    (tmp_path / "game.py").write_text(GAME)
    for game in ("Coin", "TimeLimit"):
        said = new(tmp_path / f"{game}.yaml", "-e", f"{tmp_path}/game.py:{game}", "-m", "mc", "--tiny")
        assert ("all were truncated" in said) == (game == "TimeLimit")


def test_a_models_tokens_are_counted(tmp_path, tiny_folder):
    (tmp_path / "game.py").write_text(GAME)
    seen = []
    for model in (tiny_folder, "somebody/unknown"):
        file = tmp_path / f"{len(seen)}.yaml"
        new(file, "-e", f"{tmp_path}/game.py:Logbook", "--model", model)
        task = load_recipe(file).task
        seen.append((task.history, task.chat))
    assert seen == [(1, True), ("all", True)]  # a letter is a token, or a quarter


def test_written_recipes_learn(tmp_path):
    (tmp_path / "game.py").write_text(GAME)
    new(tmp_path / "mine.yaml", "-e", f"{tmp_path}/game.py:Coin", "--tiny")
    changes = ["training.steps=20", "training.threads=1", "stages.imitation.training.steps=50"]
    scores = lmrl.train(tmp_path / "mine.yaml", changes, output=tmp_path / "run").scores
    assert scores["PPO"]["return"]["mean"] > 2.4 > 1.8 > scores["data"]["return"]["mean"]  # 2.7 is the optimum


def test_rows(tmp_path, tiny_folder):
    def rows(name, make):
        (tmp_path / name).write_text("".join(json.dumps(make(i)) + "\n" for i in range(40)))
        return tmp_path / name

    (tmp_path / "r.py").write_text(
        "def f(completions, answer, **_): return [float(a in c) for c, a in zip(completions, answer)]"
    )
    prompts = rows("prompts.jsonl", lambda i: {"prompt": f"{i}?", "answer": "y"})
    pairs = rows("pairs.jsonl", lambda i: {"prompt": f"{i}?", "chosen": "yes", "rejected": "no"})
    chats = rows(
        "chats.jsonl",
        lambda i: {"messages": [{"role": "user", "content": "a" * i + "?"}, {"role": "assistant", "content": "yes"}]},
    )
    for number, (options, objective) in enumerate(
        [
            (["--prompts", prompts, "--reward", f"{tmp_path}/r.py:f"], "grpo"),
            (["--pairs", pairs], "dpo"),
            (["--pairs", pairs, "-m", "rm"], "reward_model"),
            (["--messages", chats], "likelihood"),
        ]
    ):
        file = tmp_path / f"{number}.yaml"
        assert "40 rows" in new(file, *options, "--model", tiny_folder)
        recipe = load_recipe(file)
        assert recipe.objective.name == objective
        dry_run(recipe)
    assert (
        load_recipe(tmp_path / "3.yaml").source.max_tokens == 128
        and load_recipe(tmp_path / "3.yaml").training.steps == 11
    )


def test_logged_rewards_are_learned_from(tmp_path, tiny_folder):
    data, file = tmp_path / "log.jsonl", tmp_path / "mine.yaml"
    data.write_text(
        '{"prompt": "a", "completion": "b", "reward": 1}\n{"prompt": "a", "completion": "c", "reward": 0}\n' * 4
    )
    assert "rows have rewards" in new(file, "--messages", data, "--model", tiny_folder, "-m", "ilql")
    assert load_recipe(file).objective.name == "ilql"
    dry_run(load_recipe(file))
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match="no row has a reward, and mc learns from rewards: add the column"):
        new(tmp_path / "other.yaml", "--messages", data, "--model", tiny_folder, "-m", "mc")


def test_odd_names_are_quoted(tmp_path, tiny_folder):
    data = tmp_path / "my, {odd} #1: rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    new(tmp_path / "sub" / "mine.yaml", "--messages", data, "--model", tiny_folder)
    assert load_recipe(tmp_path / "sub" / "mine.yaml").source.path == str(data)


def test_rows_that_would_not_train_are_refused(tmp_path, tiny_folder):
    (tmp_path / "r.py").write_text("def f(completions, weather): return [1.0] * len(completions)")
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "named.jsonl").write_text('{"question": "a", "completion": "b"}\n')
    file, rows = tmp_path / "mine.yaml", tmp_path / "rows.jsonl"
    for arguments, message in [
        (["--messages", tmp_path / "pairs.jsonl"], "has chosen and rejected: look at it with --pairs"),
        (["--messages", tmp_path / "named.jsonl"], "has no field 'prompt' .*: rename the columns, or set `columns`"),
        (["--pairs", rows], "line 1: has no chosen and rejected"),
        (["--prompts", rows, "--reward", f"{tmp_path}/r.py:f"], "has the parameter 'weather'"),
        (["--prompts", rows, "--reward", f"{tmp_path}/r.py:g"], "defines no 'g'"),
        (["--messages", rows, "--max-turns", "3"], "--max-turns is for --environment"),
    ]:
        with pytest.raises(LmrlError, match=message):
            new(file, *arguments, "--model", tiny_folder)
        assert not file.exists()


def test_refusals(tmp_path):
    (tmp_path / "game.py").write_text(GAME)
    (tmp_path / "taken.yaml").touch()
    file, game = tmp_path / "mine.yaml", f"{tmp_path}/game.py:Coin"
    for arguments, message in [
        ([file], "name one of --environment"),
        ([file, "-e", game, "--pairs", "x"], "name one of --environment"),
        ([tmp_path / "taken.yaml", "-e", game], "exists: choose another name"),
        ([tmp_path / "mine", "-e", game], "ends in .yaml"),
        ([file, "--prompts", "p.jsonl"], "--prompts and --reward go together"),
        ([file, "--pairs", "p.jsonl"], "--pairs needs --model"),
        ([file, "-e", game, "-m", "dpo"], "does not go with --environment"),
        ([file, "-e", game, "--tiny", "--model", "m"], "leave one of them out"),
        ([file, "-e", f"{tmp_path}/game.py:Silent", "--tiny"], "players = .*random.* and act.self, player, rng."),
        ([file, "-e", f"{tmp_path}/game.py:Numbered", "--tiny"], r"the observation is 7 \(int\), expected text"),
    ]:
        with pytest.raises(RecipeError, match=message):
            new(*arguments)
    with pytest.raises(DataError, match="file 'none.py' does not exist"):
        new(file, "-e", "none.py:Game")
    assert not file.exists()
