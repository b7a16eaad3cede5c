"""The guard's mathematics by hand, on healthy series that it must leave alone, and on each kind of failure."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from lmrl.training.listeners.guard import Guard
from lmrl.training.monitoring.collapse import (
    MOST_CORRELATED,
    START,
    WINDOW,
    Noise,
    RollbackPoint,
    Step,
    Tracker,
    Window,
    certainly_above,
    has_collapsed,
    is_ruined,
    scatter,
    window_of,
)
from lmrl.training.monitoring.detectors import DETECTORS, WIDE, Settings, between_groups


# --------------------------------------------------------------------------------------------------------------- by hand
def test_scatter_is_what_a_line_leaves():
    assert scatter([1.0, 2.0, 3.0]) == pytest.approx([0, 0, 0])
    assert scatter([0.0, 3.0, 0.0]) == pytest.approx([-1, 2, -1])  # the line is flat, at 1
    assert scatter([1.0, 3.0]) == pytest.approx([-1, 1])  # two values: their mean


def test_error_takes_the_largest_of_its_three():
    steps = [Step(0.0), Step(3.0), Step(0.0)]  # squares 1 + 4 + 1, one degree of freedom
    assert window_of(steps, Noise()) == Window(1.0, pytest.approx(math.sqrt(6 / 3)), 0.0)
    wide = [Step(1.0, spread=8.0, count=4)] * 4  # 64 / 4 a step, by four steps
    assert window_of(wide, Noise()) == Window(1.0, pytest.approx(math.sqrt(16 / 4)), 8.0)
    noise = Noise(squares=80.0, steps=10)  # 8 a step, and two of ten degrees of freedom went into the line
    assert window_of([Step(1.0)] * 5, noise).error == pytest.approx(math.sqrt(10 / 5))


def test_error_grows_with_correlation():
    noise = Noise(squares=80.0, steps=20)
    noise.products = -14.5  # -0.2 with ten by nine products: as lines leave it
    assert noise.correlation == 0
    alone = window_of([Step(1.0)] * 5, noise).error
    noise.products = 14.4  # 0.2, and (2 + 4 * 0.2) / 10 that the lines took away
    assert noise.correlation == pytest.approx(0.48)
    assert window_of([Step(1.0)] * 5, noise).error == pytest.approx(alone * math.sqrt(1.48 / 0.52))
    noise.products = 72.0
    assert noise.correlation == MOST_CORRELATED


def test_wander_leaves_a_steady_rise_and_two_bends_out():
    noise = Noise()
    for level in (0, 0, 1, 2, 3, 3, 3):  # second differences 1, 0, 0, -1, 0
        noise.add([float(level)] * WINDOW)
    assert noise.bends == [1, 0, 0, 1, 0] and noise.wander == 0
    for level in (5, 3):  # 2 and -4
        noise.add([float(level)] * WINDOW)
    assert noise.wander == pytest.approx(math.sqrt((1 + 1) / 5 / 6))
    assert Noise().wander is None


def test_certain_is_five_standard_errors():
    low = Window(0.0, 3.0, 1.0)
    assert not certainly_above(Window(25.0, 4.0, 1.0), low) and certainly_above(Window(25.1, 4.0, 1.0), low)


@pytest.mark.parametrize(
    ("start", "best", "last", "expected"),
    [
        (0.2, 0.9, 0.5, True),  # below the middle, 0.55
        (0.2, 0.9, 0.6, False),
        (0.2, 0.9, 0.54, False),  # below it, but not certainly so
        (0.2, 0.4, 0.19, False),  # all of the gain, but less than 0.6 deviations, 0.24
        (0.5, None, 0.33, True),  # nothing was gained, and more than 0.4 deviations, 0.16, are lost
        (0.5, None, 0.35, False),
    ],
)
def test_collapse_by_hand(start, best, last, expected):
    windows = [None if one is None else Window(one, 0.005, 0.4) for one in (start, best, last)]
    assert has_collapsed(*windows, wander=None) is expected


def test_a_loss_within_the_usual_wandering_is_none():
    windows = [Window(one, 0.005, 0.4) for one in (0.2, 0.9, 0.3)]
    assert has_collapsed(*windows, wander=0.07) and not has_collapsed(*windows, wander=0.08)  # 8 times that is 0.64


# ------------------------------------------------------------------------------------------------------------ checkpoints
def play(tracker, values, first=1, spread=0.0, count=0):
    """Add steps; returns those after which a checkpoint was asked for."""
    asked = []
    for step, value in enumerate(values, start=first):
        tracker.add(step, Step(value, spread, count))
        if tracker.candidate is not None and tracker.candidate.step == step:
            asked.append(step)
    return asked


def noisy(*levels):
    """Levels with a little noise that has no slope."""
    return [level + 0.01 * (-1) ** place for place, level in enumerate(levels)]


def test_a_checkpoint_is_kept_once_its_weights_have_held_up():
    tracker = Tracker()
    assert play(tracker, noisy(*[0] * 5, *[1] * 5)) == [7]  # the mean of the last five is certainly higher
    assert tracker.kept.step == 7  # three steps later
    broken = Tracker()
    play(broken, noisy(*[0] * 5, 1, 1, -9, -9, -9))
    assert broken.kept == RollbackPoint(0) and broken.candidate is None


def test_checkpoints_keep_their_distance():
    asked = play(Tracker(every=20), noisy(*[step / 10 for step in range(100)]))
    assert len(asked) == 5 and all(later - earlier >= 20 for earlier, later in zip(asked, asked[1:], strict=False))


def test_back_at_the_kept_one_it_is_what_later_steps_are_measured_by():
    tracker = Tracker()
    play(tracker, noisy(*[0.0] * 10, *[1.0] * 20, *[3.0] * 10))
    kept = tracker.kept
    tracker.taken_back(kept.step)
    assert (tracker.best, tracker.last, tracker.kept) == (kept.window, [], kept)
    tracker.taken_back(2)
    assert tracker.kept == RollbackPoint(2) and tracker.best is None


def test_a_tracker_goes_on_from_its_state():
    rng = np.random.default_rng(0)
    rewards = [*rng.normal(0, 0.1, 30), *rng.normal(1, 0.1, 40), *rng.normal(0, 0.1, 15)]
    whole, torn = Tracker(), Tracker()
    found = []
    for step, reward in enumerate(rewards):
        for one in (whole, torn):
            one.add(step, Step(reward, 0.5, 64))
        torn = Tracker.of(json.loads(json.dumps(torn.state())))
        assert torn == whole and torn.collapsed() == whole.collapsed()
        found.append(whole.collapsed())
    assert found.index(True) in range(75, 85) and not any(found[:75])


# -------------------------------------------------------------------------------------------------------- healthy series
def healthy(kind, rng, steps):
    """A series of steps that nothing is wrong with."""
    count, wander = int(rng.choice([16, 64, 256])), 0.0
    for step in range(steps):
        wander = 0.9 * wander + math.sqrt(1 - 0.81) * 0.1 * rng.normal()
        match kind:
            case "improves slowly":
                yield of(rng.normal(0.3 + 0.3 * step / steps, 0.5, count))
            case "stays":
                yield of(rng.normal(0.0, 1.0, count))
            case "wanders on a plateau":
                yield of(rng.normal(0.2 * (1 - math.exp(-step / 30)) + wander, 1.0, count))
            case "swings":
                yield of(rng.normal(0.3 * (1 - math.exp(-step / 20)) + 0.08 * math.sin(step / 12), 0.5, count))
            case "bandit":
                yield of(rng.normal(0.1 * step / steps, 3.0, count))
            case "sparse":
                yield of(rng.random(count) < 0.02 + 0.3 * max(step - 50, 0) / steps)
            case "solved":
                yield of(rng.random(count) < 1 - 0.8 * math.exp(-step / 8))
            case "prompts differ":
                chances = np.clip(0.4 + 0.2 * step / steps + 0.35 * rng.normal(size=max(count // 8, 1)), 0, 1)
                yield of(rng.random((8, len(chances))) < chances)
            case "rare disasters":
                yield of(np.where(rng.random(count) < 0.02, -100, -15 + 5 * step / steps))
            case "heavy tails":
                yield of(rng.standard_t(2.5, count) + 0.5 * step / steps)


def of(rewards):
    return Step(float(np.mean(rewards)), float(np.std(rewards)), int(np.size(rewards)))


KINDS = ["improves slowly", "stays", "wanders on a plateau", "swings", "bandit", "sparse", "solved", "prompts differ"]
KINDS += ["rare disasters", "heavy tails"]
SEEDS = 30


def test_healthy_runs_are_left_alone():
    """300 runs of 100 steps; at most one in a hundred may be stopped."""
    false = []
    for kind in KINDS:
        for seed in range(SEEDS):
            tracker = Tracker(every=6)
            for step, measured in enumerate(healthy(kind, np.random.default_rng(seed), 100), start=1):
                tracker.add(step, measured)
                if tracker.collapsed(closing=step == 100):
                    false.append((kind, seed, step))
                    break
    assert len(false) <= len(KINDS) * SEEDS / 100, false


@pytest.mark.parametrize("count", [32, 128])
def test_a_collapse_is_found_within_two_windows(count):
    """From 0.9 back to the start, in 20 runs each, and below the start where nothing was gained."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        for levels in ((0.2, 0.9, 0.1), (0.5, 0.5, 0.1)):
            chances = [*[levels[0]] * 8, *np.linspace(levels[0], levels[1], 12), *[levels[1]] * 20, *[levels[2]] * 20]
            tracker = Tracker()
            steps = [of(rng.random(count) < chance) for chance in chances]
            found = None
            for step, measured in enumerate(steps, start=1):
                tracker.add(step, measured)
                if found is None and tracker.collapsed():
                    found = step
            assert found is not None and 40 < found <= 60, (seed, levels, found)


def test_a_policy_ruined_by_its_first_update_is_found():
    rng = np.random.default_rng(0)
    tracker = Tracker()
    for step, chance in enumerate([0.8, *[0.1] * 12], start=1):
        tracker.add(step, of(rng.random(64) < chance))
    assert tracker.collapsed() and tracker.kept == RollbackPoint(0)


def test_a_gain_that_is_lost_within_a_window_is_found():
    """The rewards of a run whose policy rose at step 7 and fell at step 11."""
    rewards = [0.22, 0.21, 0.22, 0.23, 0.2, 0.23, 0.96, 0.98, 0.99, 1.0, 0.01, *[0.0] * 20]
    tracker, found = Tracker(), []
    for step, reward in enumerate(rewards, start=1):
        tracker.add(step, Step(reward, math.sqrt(reward * (1 - reward)), 128))
        found.append(tracker.collapsed())
    assert found.index(True) + 1 == 20 and tracker.kept.step == 8


def test_steps_that_are_partly_above_the_start_are_no_ruin():
    first = [Step(one, 0.4, 64) for one in (0.5, 0.52, 0.48, 0.5, 0.5)]
    assert is_ruined(first, [Step(0.3, 0.4, 64)] * WINDOW)
    assert not is_ruined(first, [*[Step(0.3, 0.4, 64)] * (WINDOW - 1), Step(0.49, 0.4, 64)])
    assert not is_ruined(first, [Step(0.35, 0.4, 64)] * WINDOW)  # less than 0.4 deviations


def test_a_collapse_at_the_end_needs_fewer_steps():
    rng = np.random.default_rng(0)
    tracker = Tracker()
    for step, chance in enumerate([*np.linspace(0.1, 0.9, 30), *[0.9] * 20, *[0.0] * 4], start=1):
        tracker.add(step, of(rng.random(256) < chance))
    assert not tracker.collapsed() and tracker.collapsed(closing=True)


# -------------------------------------------------------------------------------------------------------------- warnings
SETTINGS = Settings(
    steps=100, lr=1e-5, head_lr=1e-3, samples=4, max_new_tokens=64, entropy_coef=0.02, has_eos_penalty=True
)


def rows(count=WIDE, **measures):
    """Steps with these measures; a little noise makes differences uncertain, as they are."""
    return [{name: value * (1 + 0.01 * (-1) ** step) for name, value in measures.items()} for step in range(count)]


def first(**measures):
    return rows(START, **measures)


@pytest.mark.parametrize(
    ("name", "began", "now", "said"),
    [
        ("no_movement", {}, {"moved": 1e-9}, "raise optimizer.lr from 1e-05 to 0.001"),  # at most a hundredfold
        ("no_movement", {}, {"moved": 4e-6}, "no movement in 20 steps (4e-06 nats per token each): raise optimizer.lr from 1e-05 to 0.00016"),
        ("no_signal", {}, {"alike": 0.9}, "rewards are all equal in 90% of groups: set rollouts.samples=8"),
        ("endless_turns", {"cut": 0.1}, {"cut": 0.8}, "80% of episodes are cut at rollouts.max_new_tokens=64, 10% at the start: set objective.missing_eos_penalty=1"),
        ("all_cut", {"cut": 0.99}, {"cut": 0.99}, "rollouts.max_new_tokens=64: set it to 128"),
        ("many_failed", {}, {"failed": 1 / 3}, "33% of episodes could not be judged"),
        ("runaway_entropy", {"entropy": 0.5}, {"entropy": 2.0}, "set objective.entropy_coef=0.002 (it is 0.02)"),
        ("runaway_entropy", {"entropy": 0.5}, {"entropy": 0.001}, "set objective.entropy_coef=0.04"),
        ("runaway_length", {"length": 10}, {"length": 40}, "from 10 to 40 tokens, while the reward has not risen: set rollouts.max_new_tokens=2"),
        ("blind_critic", {"reward_std": 1}, {"explained": -1e4, "reward_std": 0.5}, "far off (explained variance -1e+04), so that advantages are noise: set optimizer.head_lr=0.0001"),
        ("blind_critic", {"reward_std": 1}, {"explained": 0.01, "reward_std": 1, "between": 0.5}, "though prompts explain 50% of the reward: set optimizer.head_lr=0.01"),
        ("rate_held", {}, {"held": 0.1}, "held to 10% of the recipe's: lower optimizer.lr from 1e-05 to 1e-06"),
        ("exploding_gradients", {"grad_norm": 1}, {"grad_norm": 500}, "from 1 to 5e+02: lower optimizer.lr from 1e-05 to 3.3e-06"),
    ],
)  # fmt: skip
def test_each_failure_names_an_option_and_a_value(name, began, now, said):
    text = DETECTORS[name](first(**began), rows(**now), SETTINGS, False)
    assert said in text and "\n" not in text


@pytest.mark.parametrize(
    ("name", "began", "now", "gained"),
    [
        ("no_movement", {}, {"moved": 1e-9}, True),  # at the optimum
        ("no_movement", {}, {"moved": 1e-9, "alike": 1.0}, False),  # nothing to move by
        ("no_movement", {}, {"moved": 2e-5}, False),
        ("no_signal", {}, {"alike": 0.7}, False),
        ("endless_turns", {"cut": 0.6}, {"cut": 0.9}, False),  # they were from the start
        ("all_cut", {"cut": 0.5}, {"cut": 0.99}, False),
        ("many_failed", {}, {"failed": 0.1}, False),
        ("runaway_entropy", {"entropy": 0.5}, {"entropy": 2.0}, True),
        ("runaway_entropy", {"entropy": 0.5}, {"entropy": 0.9}, False),
        ("runaway_length", {"length": 10}, {"length": 40}, True),
        ("runaway_length", {"length": 10}, {"length": 28}, False),
        ("blind_critic", {"reward_std": 1}, {"explained": -1e4, "reward_std": 0.1}, False),  # nothing varies any more
        ("blind_critic", {"reward_std": 1}, {"explained": 0.01, "reward_std": 1, "between": 0.0}, False),
        ("blind_critic", {"reward_std": 1}, {"explained": 0.01, "reward_std": 1}, False),  # unknown
        ("rate_held", {}, {"held": 0.5}, False),
        ("exploding_gradients", {"grad_norm": 1}, {"grad_norm": 500}, True),
    ],
)
def test_nothing_is_said_without_need(name, began, now, gained):
    assert DETECTORS[name](first(**began), rows(**now), SETTINGS, gained) is None


def test_turns_that_lose_their_end_within_the_first_steps_are_found():
    began = [{"cut": share} for share in (0.25, 0.4, 0.56, 0.67, 0.77)]
    found = DETECTORS["endless_turns"](began, rows(cut=0.95), SETTINGS, False)
    assert found is not None and "95% of episodes are cut at rollouts.max_new_tokens=64, 25% at the start" in found


def test_advice_names_only_options_that_the_recipe_has():
    """A mixture cannot resample, Q values have no entropy bonus, and turns, not tokens, make an episode long."""
    bare = replace(SETTINGS, entropy_coef=None)
    assert "resample" not in DETECTORS["no_signal"](first(), rows(alike=0.9), bare, False)
    assert "resample=3" in DETECTORS["no_signal"](first(), rows(alike=0.9), replace(bare, can_resample=True), False)
    assert "else set rollouts.samples higher" in DETECTORS["no_signal"](first(), rows(alike=0.9), bare, True)
    turns = DETECTORS["runaway_length"](first(length=10), rows(length=40), replace(bare, max_turns=20), False)
    assert "lower task.max_turns from 20 or rollouts.max_new_tokens from 64, or" in turns
    assert "max_grad_norm" not in DETECTORS["exploding_gradients"](first(grad_norm=9), rows(grad_norm=1e4), bare, False)


def test_rewards_of_self_play_are_not_taken_for_a_failure():
    """Both sides' rewards sum to zero, however well they play."""
    own = replace(SETTINGS, self_play=True)
    assert DETECTORS["no_movement"](first(), rows(moved=1e-9), own, False) is None
    assert "if the scores are good, stop here" in DETECTORS["no_signal"](first(), rows(alike=0.9), own, False)


def test_detectors_wait_for_a_window():
    for name, detector in DETECTORS.items():
        bad = {"moved": 0.0, "alike": 1.0, "cut": 1.0, "failed": 1.0, "entropy": 9.0, "length": 99.0, "held": 0.01}
        bad |= {"explained": -1e9, "reward_std": 1.0, "grad_norm": 1e9}
        assert detector(first(entropy=0.1, length=1.0, cut=1.0, reward_std=1.0, grad_norm=1.0), rows(WINDOW - 1, **bad), SETTINGS, False) is None, name  # fmt: skip


def test_share_between_groups_by_hand():
    assert between_groups([(0, 0.0), (0, 0.0), (1, 1.0), (1, 1.0)]) == 1
    # two groups of (0, 1): between 0, within 0.5 a degree of freedom; (0 - 0.5) / (0 + 0.5)
    assert between_groups([(0, 0.0), (0, 1.0), (1, 0.0), (1, 1.0)]) == -1
    assert between_groups([(0, 0.0), (1, 1.0)]) is None and between_groups([(0, 1.0)] * 4) is None
    assert between_groups([(0, 1.0), (0, 1.0), (1, 1.0), (1, 1.0)]) is None


def test_what_a_seed_hides_from_the_policy_is_not_asked_of_the_critic():
    """Two start states with one observation: the reward differs between them, and no critic can tell."""
    recipe = SimpleNamespace(rollouts=SimpleNamespace(samples=2))

    def share(*prompts: str) -> dict[str, float]:
        rewards = [0.0, 0.1, 1.0, 0.9]
        played = [
            SimpleNamespace(prompt=prompt, reward=reward) for prompt, reward in zip(prompts, rewards, strict=True)
        ]
        found = Guard.measure(
            SimpleNamespace(recipe=recipe), None, 1, SimpleNamespace(played=played), {"explained_variance": 0.0}
        )
        return {name: round(value, 2) for name, value in found.items()}

    assert share("bid", "bid", "bid", "bid") == {}
    assert share("bid 1", "bid 1", "bid 2", "bid 2") == {"reward_between": 0.99}
