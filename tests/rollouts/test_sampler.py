"""The sampler: multi-turn episodes token by token, nothing re-tokenised, failures counted."""

import re

import numpy as np
import pytest
import torch

from lmrl.engines.base import Completion, Engine, Sampling
from lmrl.environments import TextEnvironment
from lmrl.errors import EpisodeError, ModelError
from lmrl.recipe import Prompts
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import Task, split_rows, starts_for
from lmrl.trajectories.render import Renderer
from lmrl.trajectories.trajectory import CONTEXT


class Countdown(TextEnvironment):
    """Ends after `start + 1` turns; pays 1 a turn; breaks on demand."""

    num_starts = 4

    def __init__(self, breaks_at: int | None = None, never_ends: bool = False):
        self.breaks_at, self.never_ends = breaks_at, never_ends

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start = self.left = options["start"]
        return f"s{self.left}", {}

    def step(self, action):
        if self.start == self.breaks_at:
            raise RuntimeError("out of order")
        self.left -= 1
        done = self.left < 0 and not self.never_ends
        return f"o{max(self.left, 0)}", 1.0, done, False, {"metrics": {"turns": 1}} if done else {}


class ScriptedEngine(Engine):
    """Always says `ab` and eos; remembers the contexts it was given."""

    def __init__(self, tokenizer):
        super().__init__(None)
        self.tokens = tokenizer("ab", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        self.contexts = []

    def sample(self, prompts, sampling, keys):
        self.contexts.append([list(prompt) for prompt in prompts])
        return [Completion(list(self.tokens), [-0.1, -0.2, -0.3], "eos") for _ in prompts]


@pytest.fixture
def tokenizer(tiny_policy):
    from lmrl.policy.tokenizers import build_tokenizer

    return build_tokenizer("char", ["abos0123456789"])


def play(tokenizer, starts, history="all", max_turns=10, samples=1, max_failed=0.5, **options):
    task = Task(lambda: Countdown(**options), Renderer(tokenizer), [0, 1, 2, 3], [0], max_turns, history, max_failed)
    engine = ScriptedEngine(tokenizer)
    decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)  # noqa: E731
    return Sampler(task, engine, decode).play(starts, samples, Sampling(), ("test",)), engine, task


def test_turns_share_one_context(tokenizer):
    (short, long), engine, _ = play(tokenizer, [0, 1])
    assert short.version == long.version == engine.syncs
    assert short.completion == "ab" and long.completion == "ab\no0\nab"
    (segment,) = long.segments
    assert tokenizer.decode(segment.tokens) == "s1ab<eos>o0ab<eos>"
    assert segment.turns == [CONTEXT, CONTEXT, 0, 0, 0, CONTEXT, CONTEXT, 1, 1, 1]
    assert segment.rewards == [0, 0, 0, 0, 1.0, 0, 0, 0, 0, 1.0]
    assert [lp for lp in segment.logprobs if lp is not None] == [-0.1, -0.2, -0.3] * 2
    assert (long.reward, long.terminated, long.metrics) == (2.0, True, {"turns": 1.0})
    assert engine.contexts[1] == [segment.tokens[:7]]  # sampled tokens went back in as they were


def test_history_of_one_turn_opens_a_segment_each_turn(tokenizer):
    (episode,), engine, _ = play(tokenizer, [2], history=1)
    assert [tokenizer.decode(segment.tokens) for segment in episode.segments] == ["s2ab<eos>", "o1ab<eos>", "o0ab<eos>"]
    assert [segment.turns[-1] for segment in episode.segments] == [0, 1, 2]


def test_history_of_two_turns_keeps_the_last_exchange(tokenizer):
    (episode,), _, _ = play(tokenizer, [2], history=2)
    texts = [tokenizer.decode(segment.tokens) for segment in episode.segments]
    assert texts == ["s2ab<eos>", "s2ab<eos>o1ab<eos>", "o1ab<eos>o0ab<eos>"]
    assert [len(segment.actions) for segment in episode.segments] == [3, 3, 3]  # earlier actions are context now


def test_a_bos_token_only_opens_a_segment(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<unk> $A", special_tokens=[("<unk>", 2)])
    for history in ("all", 2, 100):
        (episode,), _, _ = play(tokenizer, [2], history=history)
        assert all(segment.tokens[0] == 2 and segment.tokens.count(2) == 1 for segment in episode.segments), history


def test_a_reward_that_is_not_finite_is_a_failure(tokenizer, monkeypatch):
    original = Countdown.step
    monkeypatch.setattr(Countdown, "step", lambda self, a: (*original(self, a)[:1], float("nan"), True, False, {}))
    (episode,), _, _ = play(tokenizer, [0])
    assert episode.reward is None and "the reward nan" in episode.failure


def test_truncated_episode_ends_with_the_next_observation(tokenizer):
    (episode,), _, _ = play(tokenizer, [0], never_ends=True, max_turns=2)
    assert not episode.terminated and episode.reward == 2.0
    assert tokenizer.decode(episode.segments[-1].tokens).endswith("ab<eos>o0")
    (separate,), _, _ = play(tokenizer, [0], never_ends=True, max_turns=2, history=1)
    assert not separate.segments[-1].actions and tokenizer.decode(separate.segments[-1].tokens) == "o0"


def test_groups_and_start_states(tokenizer):
    episodes, _, _ = play(tokenizer, [3, 1], samples=2)
    assert [episode.group for episode in episodes] == [0, 0, 1, 1]
    assert [episode.prompt for episode in episodes] == ["s3", "s3", "s1", "s1"]


def test_a_broken_environment_is_counted_up_to_a_limit(tokenizer):
    episodes, _, task = play(tokenizer, [0, 1, 2, 3], breaks_at=2)
    assert [episode.reward for episode in episodes] == [1.0, 2.0, None, 4.0]
    assert "RuntimeError: out of order" in episodes[2].failure
    assert len(task.keep_judged(episodes)) == 3
    task.max_failed = 0.2
    with pytest.raises(EpisodeError, match="1 of 4 samples.*first, 's2' -> .*out of order"):
        task.keep_judged(episodes)


def test_chat_template_across_turns(tiny_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    renderer = Renderer(tokenizer, chat=True, system="be brief")
    first = tokenizer.decode(renderer.first("hi"))
    assert first == "[system]be brief<eos>\n[user]hi<eos>\n[assistant]"
    assert tokenizer.decode(renderer.next("more", tokenizer.eos_token_id)) == "\n[user]more<eos>\n[assistant]"
    assert tokenizer.decode(renderer.next("more", 5)) == "<eos>\n[user]more<eos>\n[assistant]"
    assert tokenizer.decode(renderer.action("yes")) == "yes<eos>"
    messages = [{"role": "user", "content": "a"}]
    assert tokenizer.decode(Renderer(tokenizer).first(messages)) == "[user]a<eos>\n[assistant]"


def test_chat_needs_a_template(tokenizer):
    with pytest.raises(ModelError, match="chat template"):
        Renderer(tokenizer, chat=True)


def test_starts_go_through_all_in_shuffled_passes():
    starts = [10, 11, 12, 13, 14]
    long = starts_for(starts, 0, 15, "seed")
    assert all(sorted(long[at : at + 5]) == starts for at in (0, 5, 10)) and long[:5] != long[5:10]
    assert long[3:11] == starts_for(starts, 3, 8, "seed")  # any stretch can be drawn on its own
    assert starts_for(None, 3, 2, "seed") == [None, None]


def test_heldout_rows_are_never_trained_on():
    training, heldout = split_rows(range(100), Prompts(path="x", holdout=0.2))
    assert len(heldout) == 20 and sorted(training + heldout) == list(range(100))
    assert split_rows(range(100), Prompts(path="x", holdout=0.2)) == (training, heldout)
    assert len(split_rows(range(3), Prompts(path="x", holdout=0.01))[1]) == 1


def test_rows_with_the_same_prompt_are_held_out_together():
    single, heldout = split_rows(range(10), Prompts(path="x", holdout=0.3))
    training, together = split_rows([row % 10 for row in range(20)], Prompts(path="x", holdout=0.3))
    assert together == sorted(heldout + [10 + row for row in heldout])
    assert training == sorted(single + [10 + row for row in single])
    assert split_rows(["a", "a"], Prompts(path="x", holdout=0.5)) == ([0, 1], [0, 1])  # nothing else to train on


class Returning(TextEnvironment):
    """Returns from step() what it is told to."""

    num_starts, players, result = 1, ("one",), None

    def reset(self, *, seed=None, options=None):
        return "a", {}

    def act(self, player, rng):
        return "b"

    def step(self, action):
        return self.result


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (("o", "1", True, False, {}), r"step\(\) returned the reward '1' \(str\); expected a number"),
        (("o", None, True, False, {}), r"step\(\) returned the reward None \(NoneType\); expected a number"),
        (("o", float("nan"), True, False, {}), r"step\(\) returned the reward nan"),
        (("o", 1e301, True, False, {}), r"step\(\) returned the reward 1e\+301; expected a finite number up to 1e\+30"),
        (("o", 1.0, None, False, {}), r"step\(\) returned terminated=None; expected true or false"),
        (("o", 1.0, True, "no", {}), r"step\(\) returned truncated='no'; expected true or false"),
        (
            ("o", 1.0, True, {}),
            r"step\(\) returned 4 values; expected observation, reward, terminated, truncated, info",
        ),
        (None, r"step\(\) returned a NoneType; expected observation"),
        (("o", 1.0, True, False, None), r"step\(\) returned the info None; expected an object"),
        ((7, 1.0, True, False, {}), "the observation is 7 \\(int\\), expected text: .* name it gymnasium:MODULE:ID"),
        (("a\udcff", 1.0, False, False, {}), "UnicodeEncodeError: .*surrogates not allowed"),
        (([1], 1.0, False, False, {}), "field 'observation' holds 1; expected messages with text in 'role' and"),
        (([], 1.0, False, False, {}), "field 'observation' is empty; expected messages"),
        (("o", 1.0, True, False, {"metrics": 3}), r"step\(\) returned info\['metrics'\]=3; expected an object"),
        (
            ("o", 1.0, True, False, {"metrics": {"x": "high"}}),
            r"the metric 'x'='high' \(str\); expected a finite number",
        ),
        (("o", 1.0, True, False, {"metrics": {"x": float("nan")}}), r"the metric 'x'=nan \(float\); expected a finite"),
    ],
)
def test_what_step_returns_is_checked(tokenizer, result, message):
    task = Task(type("Environment", (Returning,), {"result": result}), Renderer(tokenizer), [0], [0])
    (episode,) = Sampler(task).play_scripted("one", [0], ("x",))
    assert episode.reward is None
    with pytest.raises(EpisodeError, match=message) as caught:
        task.keep_judged([episode])
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda self, player, rng: 3,
            r"environment raised TypeError: act\('one', ...\) returned 3 \(int\); expected text",
        ),
        (lambda self, player, rng: next(iter(())), "environment raised StopIteration"),
    ],
)
def test_a_failing_player_fails_its_episode(tokenizer, act, message):
    task = Task(type("Environment", (Returning,), {"act": act}), Renderer(tokenizer), [0], [0])
    (episode,) = Sampler(task).play_scripted("one", [0], ("x",))
    assert episode.reward is None and re.match(message, episode.failure)


def test_numbers_of_numpy_and_torch_are_numbers(tokenizer):
    metrics = {"x": np.float32(0.5), "y": torch.tensor(2), "z": None}
    result = ("o", np.float32(1.5), np.bool_(True), torch.tensor(False), {"metrics": metrics})
    task = Task(type("Environment", (Returning,), {"result": result}), Renderer(tokenizer), [0], [0])
    (episode,) = Sampler(task).play_scripted("one", [0], ("x",))
    assert episode.reward == 1.5 and episode.terminated and episode.failure is None
    assert episode.metrics == {"x": 0.5, "y": 2.0, "z": None}
