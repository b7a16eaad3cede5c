"""Opponents of each kind: scripted players, addresses and models, and their failures."""

import json

import pytest

from lmrl.engines.base import Sampling
from lmrl.engines.hf import HFEngine
from lmrl.environments.nim import Nim
from lmrl.errors import EpisodeError, PluginError, RecipeError
from lmrl.policy.load import load_policy
from lmrl.recipe import CustomTask, Model
from lmrl.rollouts.parties import against_other
from lmrl.rollouts.replay import replay_episode
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import build_task
from lmrl.training.monitoring.measures import sample_line
from tests.conftest import TINY_LLAMA
from tests.rollouts import echo
from tests.rollouts.echo import Says, letters, nim
from tests.stub_openai import chat_answer, stub_openai


@pytest.fixture
def tokenizer():
    return letters()


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
        task = build_task(CustomTask(environment=f"{echo.__file__}:Echo", max_turns=2, opponent=options), tokenizer)
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
        task = build_task(CustomTask(environment=f"{echo.__file__}:Echo", max_failed=0.5, opponent=options), tokenizer)
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


def test_an_address_without_text_makes_no_empty_move(tokenizer):
    with stub_openai(lambda path, body, number: chat_answer(None, finish_reason="length")) as stub:
        options = {"player": f"{stub.url}#m"}
        task = build_task(CustomTask(environment=f"{echo.__file__}:Echo", opponent=options), tokenizer)
        sampler = Sampler(task, Says(tokenizer, lambda context: "a"), lambda tokens: tokenizer.decode(tokens[:-1]))
        (played,) = sampler.play([None], 1, Sampling(), ("s",))
    cause = f"opponent raised EndpointError: {stub.url} answered without text (finish_reason=length)"
    assert played.failure == cause and played.reward is None


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


def test_a_game_that_outgrows_the_opponent_is_truncated(nim_model):
    """The policy only says a letter; the opponent's context has one turn more, and its own answers."""
    policy, folder = nim_model
    task = build_task(
        CustomTask(
            environment=f"{echo.__file__}:Echo", max_turns=99, opponent={"player": str(folder), "max_new_tokens": 8}
        ),
        policy.tokenizer,
    )
    sampler = Sampler(task, Says(policy.tokenizer, lambda context: "1"), policy.decode)
    for played in sampler.play([None, None], 1, Sampling(max_new_tokens=2), ("s",)):
        assert played.failure is None and not played.terminated and played.turns
        assert played.final_observation.startswith(f"p{played.game['player']}:")
        assert replay_episode(sample_line("main", 0, "eval", played, task.environment))[1]


def test_allowed_actions_hold_for_each_side(nim_model):
    """An untrained policy then never loses by an illegal move."""
    policy, _ = nim_model
    task = build_task(nim(allowed_actions=True), policy.tokenizer)
    played = Sampler(task, HFEngine(policy), policy.decode).play(task.training, 2, Sampling(max_new_tokens=2), ("s",))
    assert {one.failure for one in played} == {None} and {one.metrics["illegal"] for one in played} == {0.0}
    assert {turn.action for one in played for turn in one.turns} == {"1", "2", "3"}
    with pytest.raises(PluginError, match=r"Echo' has no method allowed_actions\(\)"):
        build_task(CustomTask(environment=f"{echo.__file__}:Echo", allowed_actions=True), policy.tokenizer)


def test_scores_are_against_another_player(nim_model):
    assert against_other(nim()).opponent.player == "random"
    assert against_other(nim(opponent="self", opponent_in_evaluation="optimal")).opponent.player == "optimal"
    assert against_other(nim(opponent="optimal")).opponent.player == "optimal"
    silent = CustomTask(environment=f"{echo.__file__}:Silent")
    with pytest.raises(RecipeError, match="task.opponent_in_evaluation: .*Silent' has no scripted player"):
        against_other(silent)
    assert against_other(CustomTask(environment="lmrl.environments.maze.Maze")).opponent is None


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
