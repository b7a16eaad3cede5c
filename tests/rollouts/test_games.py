"""Games of several players: self-play with a trajectory a side, opponents of each kind, and their failures."""

import json
from functools import partial

import pytest
from typer.testing import CliRunner

import lmrl
from lmrl import cli
from lmrl.engines.base import Completion, Engine, Sampling
from lmrl.engines.hf import HFEngine
from lmrl.environments import GameEnvironment, environment_factory
from lmrl.environments.games import Game, Referee
from lmrl.environments.nim import Nim
from lmrl.errors import EpisodeError, PluginError, RecipeError
from lmrl.objectives.groups import groups_of
from lmrl.policy.load import load_policy
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.recipe import CustomTask, Model, NimTask, Rollouts
from lmrl.rollouts.collect import collect
from lmrl.rollouts.parties import against_other
from lmrl.rollouts.replay import replay_episode
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import Match, Task, build_task
from lmrl.training.monitoring.measures import sample_line
from lmrl.trajectories.render import Renderer
from tests.conftest import TINY_LLAMA
from tests.stub_openai import chat_answer, stub_openai

LETTERS = "0123456789 left:pabcx!"


class Echo(Game):
    """Each player hears what the other said last. A move earns the mover 1, and the other .25; `x` ends it, `!` raises."""

    players = ("random",)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.said = ["", ""]
        return {"columns": {"seed": seed}}

    def observe(self, player):
        return f"p{player}:{self.said[1 - player]}"

    def step(self, action):
        mover, self.to_move = self.to_move, 1 - self.to_move
        if action == "!":
            raise RuntimeError("exclaimed")
        self.said[mover] = action
        return [1.0 if player == mover else 0.25 for player in (0, 1)], action == "x", False, {"metrics": {"moves": 1}}

    def act(self, player, rng):
        return "c"


class Says(Engine):
    """Says the text that `choose` gives for a context; remembers the contexts of each batch."""

    def __init__(self, tokenizer, choose):
        super().__init__(None)
        self.tokenizer, self.choose, self.batches = tokenizer, choose, []

    def sample(self, prompts, sampling, keys):
        contexts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in prompts]
        self.batches.append(contexts)
        return [self._completion(self.choose(context)) for context in contexts]

    def _completion(self, text):
        tokens = [*self.tokenizer(text, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
        return Completion(tokens, [-0.5] * len(tokens), "eos")


@pytest.fixture
def tokenizer():
    return build_tokenizer("char", [LETTERS])


def sampler_of(tokenizer, choose, party=None, make=Echo, max_turns=3, **options):
    task = Task(make, Renderer(tokenizer), None, None, max_turns, match=Match(2, party), max_failed=1, **options)
    decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)  # noqa: E731
    return Sampler(task, Says(tokenizer, choose), decode)


# --------------------------------------------------------------------------------------------------------------- self-play
def test_each_side_is_a_trajectory(tokenizer):
    """Player 0 says a, 1 says b, 0 says a, 1 says x. Player 1 earns .25 before its first turn, which goes to that turn."""
    calls = []

    def choose(context):
        if "p0" in context:
            return "a"
        calls.append(context)
        return "b" if len(calls) == 1 else "x"

    sampler = sampler_of(tokenizer, choose, max_turns=9, history=1)
    first, second = sampler.play([None], 1, Sampling(), ("s",))
    assert [(one.observation, one.action, one.reward) for one in first.turns] == [
        ("p0:", "a", 1.25),
        ("p0:b", "a", 1.25),
    ]
    assert [(one.observation, one.action, one.reward) for one in second.turns] == [
        ("p1:a", "b", 1.5),
        ("p1:a", "x", 1.0),
    ]
    assert (first.reward, second.reward) == (2.5, 2.5) and first.terminated and second.terminated
    assert first.metrics == {"moves": 1.0, "won": 0.0} and first.columns == second.columns == {"seed": first.seed}
    moves = [[0, "a"], [1, "b"], [0, "a"], [1, "x"]]
    assert first.game == {"player": 0, "start": None, "moves": moves}
    assert second.game == {"player": 1, "start": None, "moves": moves}


def test_only_own_turns_are_actions(tokenizer):
    """With the whole history in sight, what the other said is context, tokens of one's own are as sampled."""
    sampler = sampler_of(tokenizer, lambda context: "b" if context.endswith("p1:a") else "a", max_turns=2)
    for side, trajectory in enumerate(sampler.play([None], 1, Sampling(), ("s",))):
        (segment,) = trajectory.segments
        acted = tokenizer.decode([segment.tokens[place] for place in segment.actions], skip_special_tokens=True)
        assert acted.replace(" ", "") == ("aa", "bb")[side]
        assert all(segment.logprobs[place] == -0.5 for place in segment.actions)
        assert sum(segment.rewards) == pytest.approx(trajectory.reward)


def test_a_limit_truncates_all_sides(tokenizer):
    """After two moves a player; each side ends with what it would have seen next."""
    sampler = sampler_of(tokenizer, lambda context: "a", max_turns=2)
    first, second = sampler.play([None], 1, Sampling(), ("s",))
    assert (len(first.turns), len(second.turns)) == (2, 2) and not first.terminated and not second.terminated
    assert (first.final_observation, second.final_observation) == ("p0:a", "p1:a")
    assert first.segments[-1].turns[-1] == -1


def test_a_context_that_is_full_ends_the_game(tokenizer):
    sampler = sampler_of(tokenizer, lambda context: "a", max_turns=50, positions=24)
    first, second = sampler.play([None], 1, Sampling(max_new_tokens=4), ("s",))
    assert not first.terminated and not second.terminated and 1 < len(first.turns) < 50
    assert max(len(one.segments[0].tokens) for one in (first, second)) <= 28


def test_groups_are_of_one_side_and_one_start(tokenizer):
    """Two starts with three samples: four groups of three, numbered by start and side."""
    sampler = sampler_of(tokenizer, lambda context: "x")
    played = sampler.play([None, None], 3, Sampling(), ("s",), first=5)
    assert [one.group for one in played] == [10, 11] * 3 + [12, 13] * 3
    assert [one.episode for one in played] == list(range(30, 42))
    assert [len(group) for group in groups_of(played)] == [3] * 4
    assert len({one.seed for one in played if one.group in (10, 11)}) == 1
    # `x` ends a game at once: the second side has no turn, counts with what it earned, and is not learned from.
    assert [one.reward for one in played] == [1.0, 0.25] * 6
    assert [one.group for one in sampler.task.keep_groups(played)] == [10] * 3 + [12] * 3


def test_games_form_one_batch_a_move(tokenizer):
    sampler = sampler_of(tokenizer, lambda context: "a", max_turns=2)
    sampler.play([None] * 4, 2, Sampling(), ("s",))
    assert [len(batch) for batch in sampler.engine.batches] == [8, 8, 8, 8]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failure_is_of_the_whole_game(tokenizer, workers):
    sampler = sampler_of(tokenizer, lambda context: "!" if context.endswith("p1:a") else "a", workers=workers)
    before = sampler.task.make
    made = []
    sampler.task.make = lambda: made.append(before()) or made[-1]
    played = sampler.play([None, None], 1, Sampling(), ("s",))
    assert {one.failure for one in played} == {"environment raised RuntimeError: exclaimed"}
    assert [one.reward for one in played] == [None] * 4 and [len(one.turns) for one in played] == [1] * 4
    assert len(made) == 4  # those of the two games that failed are made anew


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": lambda self, action: ([1.0], True, False, {})}, "expected one for each of 2 players"),
        ({"step": lambda self, action: ([1.0, float("nan")], True, False, {})}, "returned the reward nan"),
        ({"step": lambda self, action: (1.0, True, False)}, "expected rewards, terminated, truncated, info"),
        ({"reset": lambda self, **_: None}, "expected the info"),
        ({"observe": lambda self, player: 3}, "the observation is a int"),
        ({"to_move": 2}, "to_move is 2; expected a player from 0 to 1"),
    ],
)
def test_wrong_games_are_failures(tokenizer, change, message):
    wrong = type("Wrong", (Echo,), change | ({"reset": lambda self, **_: {}} if "to_move" in change else {}))
    played = sampler_of(tokenizer, lambda context: "a", make=wrong).play([None], 1, Sampling(), ("s",))
    assert all(message in one.failure for one in played)


def test_collected_games_are_numbered_throughout(tokenizer):
    task = build_task(NimTask(environment="nim", sticks=7), tokenizer)
    parts = list(collect(Sampler(task), {"random": 0.5, "optimal": 0.5}, Rollouts(prompts=4), 10, 0))
    played = [one for part in parts for one in part]
    assert len({one.episode for one in played}) == len(played) and all(one.turns for one in played)
    assert {one.group // 2 for one in played} == set(range(10)) and {one.player for one in played} == {
        "random",
        "optimal",
    }
    assert all(one.group == one.episode and one.game["player"] == one.episode % 2 for one in played)


# --------------------------------------------------------------------------------------------------------------- opponents
def nim(**options):
    return NimTask(environment="nim", sticks=7, **options)


def test_a_scripted_opponent_plays_the_other_side(tokenizer):
    """Every start from both sides; the optimal player beats it from each heap that is no multiple of 4."""
    task = build_task(nim(opponent="optimal"), tokenizer)
    assert task.sides == 1 and task.training == list(range(14))
    played = Sampler(task).play_scripted("optimal", task.training, ("n",))
    first = {one.start // 2 + 1: one.reward for one in played if one.game["player"] == 0}
    second = {one.start // 2 + 1: one.reward for one in played if one.game["player"] == 1}
    assert first == {heap: (1.0 if heap % 4 else -1.0) for heap in range(1, 8)}
    assert second == {heap: -value for heap, value in first.items()}
    assert all(
        [mover for mover, _ in one.game["moves"]] == [place % 2 for place in range(len(one.game["moves"]))]
        for one in played
    )


def test_an_address_is_the_other_side(tokenizer):
    """It hears the game as a dialogue; one seed a request, and another one for another sample."""
    with stub_openai(lambda path, body, number: chat_answer("b stop c")) as stub:
        options = {"player": f"{stub.url}#m", "system": "You are p1.", "stop": [" stop"], "temperature": 0.5}
        task = build_task(CustomTask(environment=f"{__file__}:Echo", max_turns=2, opponent=options), tokenizer)
        sampler = Sampler(task, Says(tokenizer, lambda context: "a"), lambda tokens: tokenizer.decode(tokens[:-1]))
        played = sampler.play([None], 2, Sampling(), ("s",))
    assert [one.failure for one in played] == [None, None] and [one.game["player"] for one in played] == [0, 0]
    assert played[0].game["moves"] == [[0, "a"], [1, "b"], [0, "a"], [1, "b"]]
    last = next(body for _, _, body in stub.seen if len(body["messages"]) == 4)
    roles = ["system", "user", "assistant", "user"]
    assert [(one["role"], one["content"]) for one in last["messages"]] == list(
        zip(roles, ["You are p1.", "p1:a", "b", "p1:a"], strict=True)
    )
    assert last["temperature"] == 0.5 and last["stop"] == [" stop"]
    assert len({body["seed"] for _, _, body in stub.seen}) == len(stub.seen) == 4


def test_an_address_that_fails_costs_its_episodes(tokenizer):
    """One request in four is refused: that episode alone has failed, with its cause and seed."""

    def reply(path, body, number):
        return (400, {}, {"error": "no"}) if number == 2 else chat_answer("x")

    with stub_openai(reply) as stub:
        options = {"player": f"{stub.url}#m", "connections": 1}
        task = build_task(CustomTask(environment=f"{__file__}:Echo", max_failed=0.5, opponent=options), tokenizer)
        sampler = Sampler(task, Says(tokenizer, lambda context: "a"), lambda tokens: tokenizer.decode(tokens[:-1]))
        played = sampler.play([None, None, None, None], 1, Sampling(), ("s",))
    failed = [one for one in played if one.failure]
    assert (
        len(failed) == 1
        and failed[0].failure.startswith("opponent raised EndpointError: ")
        and "400" in failed[0].failure
    )
    assert failed[0].seed is not None and len(task.keep_judged(played)) == 3
    line = sample_line("main", 1, "train", failed[0], task.environment)
    told, same = replay_episode(json.loads(json.dumps(line)))
    assert same and told[-1].startswith("1 turn, opponent raised EndpointError")
    task.max_failed = 0.1
    with pytest.raises(EpisodeError, match="failed on 1 of 4"):
        task.keep_judged(played)


@pytest.fixture(scope="module")
def nim_model(tmp_path_factory):
    import torch

    torch.manual_seed(0)
    policy = load_policy(Model(config=dict(TINY_LLAMA)), texts=lambda: [*Nim(7).texts()])
    folder = tmp_path_factory.mktemp("models") / "nim"
    policy.save(folder)
    return policy, folder


@pytest.mark.parametrize("workers", [0, 3])
def test_a_model_answers_all_games_in_one_batch(nim_model, workers):
    policy, folder = nim_model
    options = {"player": str(folder), "max_new_tokens": 2}
    task = build_task(nim(opponent=options, workers=workers), policy.tokenizer)
    sampler = Sampler(task, HFEngine(policy), policy.decode)
    engine, calls = task.match.party.engine, []
    advance = engine.advance

    async def counted(arrived):
        calls.append(len(arrived))
        await advance(arrived)

    engine.advance = counted
    try:
        starts = [start for start in task.training if start % 2]  # the model begins
        played = sampler.play(starts, 2, Sampling(max_new_tokens=2), ("s",))
        again = sampler.play(starts, 2, Sampling(max_new_tokens=2), ("s",))
    finally:
        del engine.advance
    assert calls[0] == len(played) == 14 and all(one.failure is None for one in played)
    assert again == played and [one.game for one in again] == [one.game for one in played]
    assert len({json.dumps(one.game["moves"][0]) for one in played}) > 1


def test_allowed_actions_hold_for_each_side(nim_model):
    """An untrained policy then never loses by an illegal move."""
    policy, _ = nim_model
    task = build_task(nim(allowed_actions=True), policy.tokenizer)
    played = Sampler(task, HFEngine(policy), policy.decode).play(task.training, 2, Sampling(max_new_tokens=2), ("s",))
    assert {one.failure for one in played} == {None} and {one.metrics["illegal"] for one in played} == {0.0}
    assert {turn.action for one in played for turn in one.turns} == {"1", "2", "3"}
    with pytest.raises(PluginError, match=r"Echo' has no method allowed_actions\(\)"):
        build_task(CustomTask(environment=f"{__file__}:Echo", allowed_actions=True), policy.tokenizer)


def test_scores_are_against_another(nim_model):
    assert against_other(nim()).opponent.player == "random"
    assert against_other(nim(opponent="self", opponent_in_evaluation="optimal")).opponent.player == "optimal"
    assert against_other(nim(opponent="optimal")).opponent.player == "optimal"
    silent = CustomTask(environment=f"{__file__}:Silent")
    with pytest.raises(RecipeError, match="task.opponent_in_evaluation: .*Silent' has no scripted player"):
        against_other(silent)
    assert against_other(CustomTask(environment="lmrl.environments.maze.Maze")).opponent is None


class Silent(Echo):
    players = ()


class Own(lmrl.TextEnvironment):
    def __init__(self, opponent="none"):
        self.opponent = opponent

    def reset(self, *, seed=None, options=None):
        return self.opponent, {}

    def step(self, action):
        return "", 0.0, True, False, {}


def test_an_own_option_called_opponent_stays():
    assert environment_factory(CustomTask(environment=f"{__file__}:Own", opponent="strong"))().opponent == "strong"
    with pytest.raises(PluginError, match="is no game of several players: leave it out"):
        environment_factory(CustomTask(environment=f"{__file__}:Own", opponent_in_evaluation="strong"))


@pytest.mark.parametrize(
    ("opponent", "message"),
    [
        ("optimum", "the game has no player 'optimum'; did you mean 'optimal'?"),
        ("http://user:secret@host/v1", "an address holds no user or password"),
    ],
)
def test_unknown_opponents_are_refused(tokenizer, opponent, message):
    with pytest.raises(RecipeError, match=message.replace("?", r"\?")):
        build_task(nim(opponent=opponent), tokenizer)


# --------------------------------------------------------------------------------------------------------- as environments
def test_a_game_with_an_opponent_is_an_environment():
    """The player's turns alone are steps; the optimal opponent answers 5 - 2 = 3 by taking all."""
    game = environment_factory(nim(opponent="optimal"))()
    assert isinstance(game, GameEnvironment) and game.num_starts == 14
    assert game.reset(seed=0, options={"start": 8})[0] == "5 left"
    assert game.step("2") == ("", -1.0, True, False, {"metrics": {"illegal": 0.0, "won": 0.0}})
    # Of a heap of one as the second player nothing is left: the first side is played instead.
    assert game.reset(seed=0, options={"start": 1})[0] == "1 left"
    assert game.step("1")[1:3] == (1.0, True)


def test_without_an_opponent_all_sides_are_played():
    game = environment_factory(nim())()
    assert game.reset(seed=0, options={"start": 4})[0] == "5 left"
    assert game.step("3")[:3] == ("2 left", 0.0, False) and game.step("2")[1] == -1.0  # the second player has won


def test_play_and_by_hand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    play = partial(CliRunner().invoke, cli.app)
    shown = play(["play", "nim", "sticks=2", "--player", "optimal", "--seed", "1"]).output
    assert "player 1" in shown and "over after" in shown
    result = play(["collect", "--by-hand", "-e", "nim", "-n", "1", "-o", "m.jsonl", "task.sticks=2"], input="1\n")
    assert isinstance(result.exception, RecipeError) and "task.opponent=NAME" in str(result.exception)
    arguments = [
        "collect",
        "--by-hand",
        "-e",
        "nim",
        "-n",
        "2",
        "-o",
        "m.jsonl",
        "task.sticks=3",
        "task.opponent=optimal",
    ]
    result = play(arguments, input="9\n9\n")
    assert result.exit_code == 0 and result.output.count("\n  -1\nover\n") == 2, result.output
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in rows] == [-1.0, -1.0] and {row["player"] for row in rows} == {"person"}


def test_referee_counts_wins():
    referee = Referee(Nim(7))
    referee.begin(0, 4)
    for action in ("1", "3", "1"):
        referee.step(action)
    assert referee.totals == [1.0, -1.0] and referee.terminated
    assert (referee.metrics_of(0)["won"], referee.metrics_of(1)["won"]) == (1.0, 0.0)


# ------------------------------------------------------------------------------------------------------------------ replay
@pytest.mark.parametrize("opponent", [None, "random"])
def test_games_are_played_again(tokenizer, opponent):
    task = build_task(nim(opponent=opponent), tokenizer)
    for one in Sampler(task).play_scripted("random", task.training, ("r",)):
        line = json.loads(json.dumps(sample_line("main", 1, "train", one, task.environment)))
        told, same = replay_episode(line)
        assert same, told
        if one.turns:
            line["turns"][-1]["reward"] += 1
            told, same = replay_episode(line)
            assert not same and told[-2].startswith(f"turn {len(one.turns) - 1}: reward ")


def test_truncated_and_failed_games_are_played_again(tokenizer):
    made = {"name": f"{__file__}:Echo", "options": {}, "max_turns": 2, "version": None, "source": None}
    for choose, failure in (
        (lambda context: "a", None),
        (lambda context: "!" if context.endswith("p1:a") else "a", "exclaimed"),
    ):
        for one in sampler_of(tokenizer, choose, max_turns=2).play([None], 1, Sampling(), ("s",)):
            line = json.loads(json.dumps(sample_line("main", 1, "train", one, made)))
            assert (failure or "") in str(one.failure or "")
            told, same = replay_episode(line)
            assert same and one.failure in (None, "environment raised RuntimeError: exclaimed"), told
