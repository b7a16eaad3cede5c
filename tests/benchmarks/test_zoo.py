"""The zoo: exact references against numbers computed by hand, simulators against their specification, the runner."""

import itertools
import json
import random
import statistics
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import zoo
import zoo_games
import zoo_tables
from zoo_game import evaluate, greedy, optimum, reachable, uniform
from zoo_games import GAMES, Bandit, Blackjack, Guess, Lock, TwoArms
from zoo_references import attainable, decoded, deviation, improved, random_play, within

from lmrl.policy.tokenizers import build_tokenizer
from lmrl.recipe import Recipe
from lmrl.rollouts.task import build_task
from lmrl.sources.dataset import play_dataset

every_game = pytest.mark.parametrize("game", GAMES.values(), ids=GAMES)


# ---------------------------------------------------------------------------------------------------------- references
def test_guess_random_play():
    # A guess is right with 1/15 whatever was heard: -(q + q^2 + ... + q^8) with q = 14/15.
    assert random_play(Guess).value == pytest.approx(-14 * (1 - (14 / 15) ** 8))


def test_guess_optimum():
    # Halving: 1, 2, 4 and 8 numbers cost 0, 1, 2 and 3 wrong guesses.
    assert optimum(Guess).value == pytest.approx(-(2 * 1 + 4 * 2 + 8 * 3) / 15)


class TwoPulls(Bandit):
    turns = 2


def test_bandit_of_two_pulls():
    # After a win the arm is the good one with 0.8 and wins with 0.8 * 0.8 + 0.2 * 0.2; after a loss another has 0.5.
    assert random_play(TwoPulls).value == pytest.approx(1.0)
    assert optimum(TwoPulls).value == pytest.approx(0.5 + 0.5 * 0.68 + 0.5 * 0.5)


def test_one_improvement_on_bandit_follows_means():
    # On random play the rest of the episode is worth the same after either arm, so its Q is the arm's mean.
    solution = improved(TwoPulls)
    assert solution.value == pytest.approx(optimum(TwoPulls).value)


def test_two_arms_random_play():
    assert random_play(TwoArms).value == pytest.approx(16 * 0.5 * 0.01)


def test_lock_random_play_is_rare_success():
    # In five turns all five letters have to be right at once.
    class Five(Lock):
        turns = 5

    assert evaluate(Five(), uniform).value == pytest.approx(100 * 0.25**5)
    assert 0 < random_play(Lock).value / 100 < 0.01
    assert optimum(Lock).value == 100


def test_blackjack_agrees_with_gymnasium():
    from gymnasium.envs.toy_text.blackjack import BlackjackEnv

    exact = evaluate(Blackjack(), lambda turn, state, worth: {"stick" if state[0] >= 17 else "hit": 1.0}).value
    environment, returns = BlackjackEnv(), []
    for seed in range(4000):
        (total, _, _), _ = environment.reset(seed=seed)
        over = False
        while not over:
            (total, _, _), reward, over, _, _ = environment.step(0 if total >= 17 else 1)
        returns.append(reward)
    assert statistics.fmean(returns) == pytest.approx(exact, abs=4 * statistics.stdev(returns) / len(returns) ** 0.5)


@every_game
def test_references_are_ordered(game):
    low, middle, high = random_play(game).value, improved(game).value, optimum(game).value
    assert low < middle <= high + 1e-9
    assert middle - low > 0.3 * (high - low)  # else a score of mc would be mostly noise


@every_game
def test_attainable_is_the_optimum_unless_turns_matter(game):
    gain = (attainable(game).value - random_play(game).value) / (optimum(game).value - random_play(game).value)
    turns_matter = {"stock": 0.970, "harvest": 0.754, "frozen_lake": 0.981, "swim": 0.998, "ferry": 0.876}
    assert gain == pytest.approx(turns_matter.get(game.name, 1), abs=1e-3)
    assert within(game, set()).value == pytest.approx(random_play(game).value)


def test_attainable_is_the_best_of_all_policies_that_act_alike_on_all_turns():
    game = GAMES["harvest"]
    legal = {state: game().actions(state) for state in optimum(game).actions[-1]}
    every = (dict(zip(legal, chosen, strict=True)) for chosen in itertools.product(*legal.values()))
    best = max(evaluate(game(), lambda turn, state, worth: {one[state]: 1.0}).value for one in every)  # noqa: B023
    assert attainable(game).value == pytest.approx(best)


@every_game
def test_last_observation_shows_the_state(game):
    """What is attainable counts on it."""
    states = optimum(game).actions[-1]
    assert game.history == "all" or len({game().observe(state) for state in states}) == len(states)


def test_within_leaves_out_what_data_do_not_hold():
    # Only ever pulling red: of two pulls each wins with 0.5.
    pairs = {(state, "red") for layer in optimum(TwoPulls).actions for state in layer}
    assert within(TwoPulls, pairs).value == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------------------- simulators
@every_game
def test_probabilities_sum_to_one(game):
    specification = game()
    assert sum(probability for probability, _ in specification.starts()) == pytest.approx(1)
    for legal in reachable(specification)[-1].values():
        for outcomes in legal.values():
            assert sum(probability for probability, _, _ in outcomes) == pytest.approx(1)


@every_game
def test_simulator_draws_from_outcomes(game):
    environment, draws = game(), 2000
    environment.reset(seed=0)
    choices = [(s, a, o) for s, legal in reachable(environment)[1].items() for a, o in legal.items()]
    state, action, outcomes = max(choices, key=lambda choice: len(choice[2]))
    expected, counted = Counter(), Counter()
    for probability, reward, after in outcomes:
        expected[reward * game.scale, after] += probability
    for _ in range(draws):
        environment.state, environment.turn = state, min(1, game.turns - 1)
        _, reward, terminated, _, _ = environment.step(action)
        assert terminated == (environment.state is None)
        counted[reward, environment.state] += 1
    assert counted.keys() <= expected.keys()
    for outcome, probability in expected.items():
        deviation = (probability * (1 - probability) / draws) ** 0.5
        assert counted[outcome] / draws == pytest.approx(probability, abs=4.5 * deviation + 1e-12)


@every_game
def test_simulated_random_play_has_the_exact_value(game):
    rng, environment = np.random.default_rng(0), game()
    returns, optimal_less_regret = [], []
    for seed in range(400):
        total, info = play(environment, seed, lambda: environment.act("random", rng))
        returns.append(total)
        optimal_less_regret.append(optimum(game).value - info["regret"])
    for estimates in (returns, optimal_less_regret):
        error = statistics.stdev(estimates) / len(estimates) ** 0.5
        assert statistics.fmean(estimates) == pytest.approx(random_play(game).value, abs=4 * error + 0.02 * game.scale)


@every_game
def test_optimal_player_has_no_regret(game):
    environment = game()
    for seed in range(10):
        _, info = play(environment, seed, lambda: environment.act("optimal", None))
        assert info == pytest.approx({"regret": 0, "illegal": 0}, abs=1e-9)


@every_game
def test_illegal_text_costs_a_turn_and_leaves_the_state(game):
    environment = game()
    seen, _ = environment.reset(seed=3)
    for turn in range(game.turns):
        observation, reward, terminated, truncated, info = environment.step("no such thing")
        last = turn + 1 == game.turns
        assert (observation, reward) == ("" if last else seen, game.illegal * game.scale)
        assert (terminated, truncated) == (last, False)
    assert info["metrics"]["illegal"] == game.turns
    assert info["metrics"]["regret"] > 0


def play(environment, seed, act):
    environment.reset(seed=seed)
    total, over = 0.0, False
    while not over:
        _, reward, terminated, truncated, info = environment.step(act())
        total, over = total + reward, terminated or truncated
    return total, info["metrics"]


@every_game
def test_game_plays_through_the_sampler(game):
    recipe = Recipe.model_validate(zoo.recipe(game.name, "ilql", 0))
    tokenizer = build_tokenizer("word", game().texts())
    episodes = play_dataset(build_task(recipe.task, tokenizer), "random", 8, 0)
    assert len(episodes) == 8
    for episode in episodes:
        tokens = [token for segment in episode.segments for token in segment.tokens]
        assert tokenizer.unk_token_id not in tokens
        assert max(len(segment.tokens) for segment in episode.segments) <= 256 - zoo.NEW_TOKENS
        assert len(episode.turns) <= game.turns
        assert all(len(tokenizer(turn.action).input_ids) < zoo.NEW_TOKENS for turn in episode.turns)


def test_set_is_as_varied_as_it_says():
    games = list(GAMES.values())
    assert len(games) >= 14
    assert min(game.scale for game in games) == 0.01 and max(game.scale for game in games) == 100
    assert sum(game.turns >= 8 for game in games) >= 4
    assert sum(game.history == "all" for game in games) >= 2
    assert any(optimum(game).value > 0 for game in games) and any(optimum(game).value < 0 for game in games)


# -------------------------------------------------------------------------------------------------------------- runner
def test_halves_depend_on_names_alone():
    names = [name for name in GAMES if name not in zoo_games.LATER | zoo_games.TUNING]
    random.Random(0).shuffle(names)
    assert zoo_games.split(names) == zoo_games.half("first") + zoo_games.half("second")
    assert sorted(zoo_games.half("all")) == sorted(GAMES)
    assert zoo_games.half("first") == "bandit stock two_arms lock taxi recall cliff_walking code".split()


def test_decoding_goes_from_random_play_to_its_improvement():
    game, base = GAMES["bandit"], random_play(GAMES["bandit"])
    assert decoded(game, base, 0) == pytest.approx(base.value) and decoded(game, base, 1e6) == pytest.approx(
        improved(game).value
    )
    assert base.value < decoded(game, base, 4) < decoded(game, base, 16) < improved(game).value
    # returns-to-go of n pulls, n from 1 to 6 as likely, of arms that win with 0.2 or 0.8: mean n / 2, pulls as if independent
    chance = sum(n / 4 + n**2 / 4 for n in range(1, 7)) / 6 - 3.5**2 / 4
    assert deviation(game) == pytest.approx(chance**0.5, rel=0.2)


@pytest.mark.parametrize("method", zoo.METHODS)
def test_recipes_state_nothing_but_the_method(method):
    cell = zoo.recipe("guess", method, 3)
    Recipe.model_validate(cell)
    assert cell["objective"] == {"name": method} and "optimizer" not in cell


def test_scores_of_random_play_and_optimum():
    low, high = random_play(Guess).value, optimum(Guess).value
    assert zoo.score(Guess, 0.0, high) == 1
    assert zoo.score(Guess, high - low, high) == 0
    assert zoo.score(Guess, 0.0, (low + high) / 2) == 2


def test_logged_pairs_are_those_that_were_learned_from(tmp_path, monkeypatch):
    recipe = zoo.recipe("sort", "ilql", 1)
    logged = zoo.logged("ilql") | {"episodes": 20, "batch_size": 4}
    monkeypatch.setattr(zoo, "logged", lambda method: logged)
    recipe |= {"source": logged}
    recipe["stages"]["bc"] |= {"source": logged, "training": {"steps": 1}}
    recipe["training"]["steps"] = 1
    import lmrl

    run = lmrl.train(Recipe.model_validate(recipe), output=tmp_path / "run").folder
    task = build_task(Recipe.model_validate(recipe).task, build_tokenizer("word", GAMES["sort"]().texts()))
    expected = {
        (tuple(turn.observation.split()), turn.action)
        for episode in play_dataset(task, "random", 20, 1)
        for turn in episode.turns
    }
    assert zoo.logged_pairs(run) == expected


def test_run_skips_finished_cells_and_keeps_failures(tmp_path, monkeypatch):
    called = []

    def cell(task, method, seed, base):
        called.append((task, seed))
        if len(called) == 2:
            return {"error": "Traceback\nValueError: no", "seconds": 1.0}
        return {"error": None, "score": 0.75, "seconds": 1.0}

    monkeypatch.setattr(zoo, "in_process", cell)
    monkeypatch.setattr(zoo, "version", lambda task, method: "abc-1")
    out = tmp_path / "zoo.jsonl"
    arguments = Namespace(
        half="all", tasks=["guess"], methods=["ppo"], seeds=[0, 1], jobs=1, out=out, keep=tmp_path, screen=False
    )
    zoo.run(arguments)
    assert called == [("guess", 0), ("guess", 1)]
    assert [json.loads(line)["error"] for line in out.read_text().splitlines()] == [None, "Traceback\nValueError: no"]
    assert "0.75 (0.75) 1 failed" in zoo_tables.table(zoo.read(out), zoo.METHODS)
    zoo.run(arguments)  # the finished one is left as it is, the failed one is tried again
    assert called[2:] == [("guess", 1)]
    assert "0.75 (0.75) |" in zoo_tables.table(zoo.read(out), zoo.METHODS)


def test_failed_process_leaves_its_error(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "HERE", tmp_path)
    (tmp_path / "zoo.py").write_text("raise ValueError('broken')")
    found = zoo.in_process("guess", "ppo", 0, tmp_path)
    assert found["error"].endswith("ValueError: broken")


def test_table_counts_low_cells():
    def cell(task, method, seed, score):
        return {"task": task, "method": method, "seed": seed, "version": "v-1", "score": score, "error": None}

    old = {**cell("stock", "ppo", 7, 0.9), "version": "u-1"}
    text = zoo_tables.table(
        [old, cell("stock", "ppo", 0, 0.25), cell("stock", "ppo", 1, -0.75), cell("guess", "mc", 0, 0.5)], zoo.METHODS
    )
    assert "| stock | -0.25 (-0.75) |  |" in text
    assert "| **first: cells below 0.5** | 2 of 2 |  |" in text
    assert "| **first: cells below 0** | 1 of 2 |  |" in text
    assert "| **second: median cell** |  | 0.50 |" in text


def test_greedy_shares_between_equals():
    assert greedy(0, None, {"a": 1.0, "b": 1.0, "c": 0.0}) == {"a": 0.5, "b": 0.5}
