"""Formats of rows: lmrl's own token by token, those of other tools, and malformed rows."""

import json
import math

import pytest
from transformers import AutoTokenizer

from lmrl.engines.base import Completion, Engine, Sampling
from lmrl.environments import TextEnvironment
from lmrl.policy.tokenizers import build_tokenizer
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import Task
from lmrl.trajectories.formats import common_prompt
from lmrl.trajectories.readers import Malformed
from lmrl.trajectories.render import Renderer
from lmrl.trajectories.rows import fingerprint, parse, to_row
from lmrl.trajectories.trajectory import CONTEXT
from tests.trajectories.episodes import from_row


class Count(TextEnvironment):
    """Three turns; `start` 1 never terminates."""

    num_starts, players = 2, ("constant",)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.endless, self.turn = options["start"] == 1, 0
        return "go ", {}

    def step(self, action):
        self.turn += 1
        done = self.turn == 3 and not self.endless
        return f"o{self.turn} ", 0.1 * self.turn, done, False, {"metrics": {"turns": self.turn}}

    def act(self, player, rng):
        return "abc"[self.turn % 3]


class Odd(Engine):
    """An engine whose tokens no tokenizer would make of their text; the second turn runs into the token limit."""

    def __init__(self, tokenizer):
        super().__init__(None)
        self.tokenizer, self.calls = tokenizer, 0

    def sample(self, prompts, sampling, keys):
        self.calls += 1
        eos = [] if self.calls == 2 else [self.tokenizer.eos_token_id]
        unknown = self.tokenizer.unk_token_id
        tokens = [unknown, *self.tokenizer("ab", add_special_tokens=False).input_ids, *eos]
        end = "length" if self.calls == 2 else "eos"
        return [Completion(list(tokens), [-0.1 / 3] * len(tokens), end) for _ in prompts]


@pytest.fixture
def tokenizer():
    return build_tokenizer("char", ["abcdefghijklmnopqrstuvwxyz 0123456789"])


@pytest.fixture
def chat(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


def task_of(tokenizer, history="all", chat=False):
    return Task(Count, Renderer(tokenizer, chat), [0, 1], [0], 5, history)


def sampled(tokenizer, history="all", chat=False):
    decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)  # noqa: E731
    task = task_of(tokenizer, history, chat)
    return Sampler(task, Odd(tokenizer), decode).play([0, 1], 1, Sampling(), ("test",))


# ------------------------------------------------------------------------------------------------------------ own format
@pytest.mark.parametrize("history", ["all", 1, 2])
def test_sampled_tokens_come_back_exactly(tokenizer, history):
    for trajectory in sampled(tokenizer, history):
        row = json.loads(json.dumps(to_row(trajectory, fingerprint(tokenizer))))
        assert from_row(row, Renderer(tokenizer), history) == [trajectory]
    assert row["turns"][1] == {"observation": "o1 ", "action": "ab", "reward": 0.2, "cut": True}
    assert not row["terminated"] and row["final_observation"] == "o5 " and row["metrics"] == {"turns": 5.0}


@pytest.mark.parametrize("history", ["all", 1, 2, 3])
@pytest.mark.parametrize("with_template", [False, True])
def test_text_alone_is_rendered_as_the_sampler_does_it(tokenizer, chat, history, with_template):
    task = task_of(chat if with_template else tokenizer, history, with_template)
    for trajectory in Sampler(task).play_scripted("constant", [0, 1], ("test",)):
        assert trajectory.player == "constant"
        row = json.loads(json.dumps(to_row(trajectory)))
        assert row["segments"] is None
        assert from_row(row, task.renderer, history) == [trajectory]


def test_another_tokenizer_reads_the_text(tokenizer):
    other = build_tokenizer("char", ["zyxabcgo 123456789"])
    assert fingerprint(tokenizer) != fingerprint(other)
    (trajectory, _) = sampled(tokenizer)
    (read,) = from_row(to_row(trajectory, fingerprint(tokenizer)), Renderer(other))
    (segment,) = read.segments
    assert other.decode(segment.tokens) == "go ab<eos>o1 abo2 ab<eos>"  # a cut turn has no end of its own
    assert set(segment.logprobs) == {None} and read.cut_turns == [1]
    assert [reward for reward in segment.rewards if reward] == pytest.approx([0.1, 0.2, 0.3])
    assert read.reward == trajectory.reward and read.completion == trajectory.completion


def test_a_dialogue_as_prompt_comes_back(chat):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    row = {"turns": [{"observation": "", "action": "yes", "reward": 2}], "prompt_messages": messages}
    (read,) = from_row(row, Renderer(chat))
    assert chat.decode(read.segments[0].tokens) == "[system]be brief<eos>\n[user]hi<eos>\n[assistant]yes<eos>"
    assert read.messages == messages and read.prompt == "be brief\nhi" and read.reward == 2.0
    again = to_row(read, fingerprint(chat))
    assert from_row(json.loads(json.dumps(again)), Renderer(chat)) == [read]


def test_a_row_by_hand_needs_little(tokenizer):
    (read,) = from_row({"turns": [{"observation": "a", "action": "b"}]}, Renderer(tokenizer), number=7)
    assert (read.reward, read.terminated, read.group, read.episode) == (None, True, 7, 7)
    (read,) = parse({"turns": [{"observation": "a", "action": "b"}], "reward": 3, "metrics": '{"m": 1}'})
    assert read.turns[0].reward == 3.0 and read.metrics == {"m": 1}
    turns = [{"observation": "a", "action": "b", "reward": 1.5}, {"observation": "c", "action": "d", "reward": 1}]
    assert parse({"turns": turns})[0].reward == 2.5
    assert parse({"turns": turns, "reward": None})[0].reward is None


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (5.0, "has rewards of 5 for turn 0, but field 'turns' has 0.1; expected the same, or no 'segments'"),
        (float("nan"), "holds nan; expected a finite number"),
        ("1", "holds '1'; expected a finite number"),
    ],
)
def test_tokens_and_turns_have_the_same_rewards(tokenizer, reward, message):
    row = to_row(sampled(tokenizer)[0], fingerprint(tokenizer))
    rewards = row["segments"][0]["rewards"]
    rewards[rewards.index(0.1)] = reward
    with pytest.raises(Malformed, match=f"field 'segments' {message}"):
        from_row(row, Renderer(tokenizer))


# --------------------------------------------------------------------------------------------------------- other formats
def test_prompt_and_completion(tokenizer, chat):
    (read,) = from_row({"prompt": "ab", "completion": "cd"}, Renderer(tokenizer))
    assert tokenizer.decode(read.segments[0].tokens) == "abcd<eos>" and read.reward is None
    assert read.segments[0].turns == [CONTEXT, CONTEXT, 0, 0, 0]
    (read,) = from_row({"prompt": "ab", "completion": "cd", "reward": -1}, Renderer(tokenizer))
    assert read.segments[0].rewards == [0, 0, 0, 0, -1.0] and read.reward == -1.0
    row = {
        "prompt": [{"role": "user", "content": "hi"}],
        "completion": [
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c"},
        ],
        "reward": 1,
    }
    (read,) = from_row(row, Renderer(chat))
    assert chat.decode(read.segments[0].tokens) == "[user]hi<eos>\n[assistant]a<eos>\n[user]b<eos>\n[assistant]c<eos>"
    assert read.segments[0].rewards[-1] == 1.0 and sum(read.segments[0].rewards) == 1.0
    row = {"prompt": "hi", "completion": [{"role": "assistant", "content": "a"}]}
    assert chat.decode(from_row(row, Renderer(chat))[0].segments[0].tokens) == "hia<eos>"


@pytest.mark.parametrize(
    "completion", ["cd", [{"role": "assistant", "content": "cd"}, {"role": "user", "content": "e"}]]
)
def test_a_truncated_completion_is_truncated(completion):
    for field in ({"terminated": False}, {"truncated": True}):
        (read,) = parse({"prompt": "ab", "completion": completion, "reward": 1, **field})
        assert not read.terminated and read.final_observation == (None if completion == "cd" else "e")
    (read,) = parse({"prompt": "ab", "completion": completion, "terminated": True, "truncated": True})
    assert read.terminated and read.final_observation is None


def test_a_truncated_text_has_no_end(tokenizer):
    row = {"prompt": "ab", "completion": "cd"}
    for truncated, end in ((True, []), (False, [tokenizer.eos_token_id])):
        (read,) = from_row(row | {"truncated": truncated}, Renderer(tokenizer))
        assert read.segments[0].tokens == tokenizer("abcd", add_special_tokens=False).input_ids + end


def test_messages(chat):
    roles = ["system", "user", "assistant", "tool", "user", "assistant", "user"]
    messages = [{"role": role, "content": letter, "name": None} for role, letter in zip(roles, "suatvbw", strict=True)]
    (read,) = from_row({"messages": messages, "rewards": [1, 0.5], "reward": None}, Renderer(chat))
    (segment,) = read.segments
    text = "[system]s<eos>\n[user]u<eos>\n[assistant]a<eos>\n[tool]t<eos>\n[user]v<eos>\n[assistant]b<eos>"
    assert chat.decode(segment.tokens) == text
    acted = [token for token, turn in zip(segment.tokens, segment.turns, strict=True) if turn != CONTEXT]
    assert chat.decode(acted) == "a<eos>b<eos>"
    assert [segment.rewards[at] for at in segment.actions] == [0, 1.0, 0, 0.5] and read.reward == 1.5
    (read,) = from_row({"messages": messages, "reward": 2, "terminated": False}, Renderer(chat))
    assert chat.decode(read.segments[0].tokens) == text + "\n[user]w<eos>\n[assistant]"
    assert not read.terminated and [turn.reward for turn in read.turns] == [0.0, 2.0]
    (first, second) = from_row({"messages": messages}, Renderer(chat), history=1)[0].segments
    assert chat.decode(second.tokens) == "[tool]t<eos>\n[user]v<eos>\n[assistant]b<eos>" and first.actions


def test_chosen_and_rejected_text(tokenizer):
    chosen = "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: so\n\nAssistant: so good"
    rejected = "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: so\n\nAssistant: so bad"
    good, bad = parse({"chosen": chosen, "rejected": rejected}, 3)
    assert good.prompt == bad.prompt == "\n\nHuman: hi\n\nAssistant: yes\n\nHuman: so\n\nAssistant:"
    assert (good.completion, good.reward, bad.completion, bad.reward) == (" so good", 1.0, " so bad", -1.0)
    assert (good.group, good.episode, bad.group, bad.episode) == (3, 6, 3, 7)
    assert common_prompt("the sky is blue", "the sky is bright") == "the sky is"
    assert common_prompt("the sky", "the sky is") == "the" and common_prompt("blue", "black") == ""
    good, bad = from_row({"prompt": "a", "chosen": "b", "rejected": "c"}, Renderer(tokenizer))
    assert tokenizer.decode(bad.segments[0].tokens) == "ac<eos>" and bad.segments[0].rewards == [0, 0, -1.0]


def test_chosen_and_rejected_messages():
    def chat_of(*contents):
        roles = ["user", "assistant"] * len(contents)
        return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]

    chosen, rejected = chat_of("a", "b", "c", "good"), chat_of("a", "b", "c", "bad")
    for prompt in ({}, {"prompt": "a"}, {"prompt": chat_of("a", "b", "c")}):
        good, bad = parse({"chosen": chosen, "rejected": rejected, **prompt})
        assert good.messages == bad.messages == chat_of("a", "b", "c")
        assert [turn.action for turn in good.turns + bad.turns] == ["good", "bad"]
    prompt = {"prompt": chat_of("a")}
    good, bad = parse({"chosen": chosen[1:2], "rejected": rejected[3:], **prompt})
    assert good.messages == chat_of("a") and (good.completion, bad.completion) == ("b", "bad")


# ------------------------------------------------------------------------------------------------------------- malformed
ANSWER = {"role": "assistant", "content": "b"}
CHAT = [{"role": "user", "content": "a"}, ANSWER]
TURN = {"observation": "a", "action": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a"},
            r"has no field 'completion' \(fields: prompt\); expected text or a list of messages; if columns .* set `columns`",
        ),
        ({"prompt": "a", "completion": 3}, "field 'completion' is 3; expected text or a list of messages"),
        ({"prompt": "a", "completion": ""}, "field 'completion' is empty"),
        ({"prompt": "a", "completion": "b", "reward": "x"}, "field 'reward' holds 'x'; expected a finite number"),
        ({"prompt": "a", "completion": "b", "reward": float("nan")}, "field 'reward' holds nan; expected a finite"),
        ({"prompt": "a", "completion": "b", "reward": 10**400}, "field 'reward' holds 1000.*expected a finite"),
        (
            {"prompt": "a", "completion": "b", "reward": -1e301},
            r"holds -1e\+301; expected a finite number up to 1e\+30",
        ),
        ({"messages": CHAT, "rewards": [2e30]}, r"field 'rewards' holds 2e\+30; expected a finite number up to 1e\+30"),
        ({"prompt": "a", "completion": "b", "reward": True}, "field 'reward' holds True"),
        ({"prompt": "a", "completion": [{"role": "assistant"}]}, "field 'completion' holds .*'role' and 'content'"),
        ({"prompt": [], "completion": "b"}, "field 'prompt' is empty; expected messages"),
        (
            {"words": "a"},
            r"has no known format \(fields: words\); expected turns, prompt and completion, .* set `columns`",
        ),
        ({"text": ""}, "field 'text' is empty"),
        ({"messages": CHAT, "rewards": [1, 2]}, "field 'rewards' has 2 numbers for 1 assistant message"),
        ({"messages": CHAT, "rewards": [float("inf")]}, "field 'rewards' holds inf; expected a finite number"),
        ({"messages": CHAT, "rewards": [1], "reward": 3}, "field 'reward' is 3.0, but its turns earned 1.0"),
        ({"messages": CHAT, "terminated": "yes"}, "field 'terminated' is 'yes'; expected true or false"),
        ({"messages": CHAT, "rewards": 1.0}, "field 'rewards' is 1.0; expected a list of numbers"),
        ({"prompt": "a", "completion": "b", "terminated": 0}, "field 'terminated' is 0; expected true or false"),
        ({"messages": CHAT[:1]}, "field 'messages' has no assistant message"),
        ({"messages": CHAT[1:]}, "field 'messages' has an assistant message first"),
        ({"messages": [*CHAT, ANSWER]}, "field 'messages' has two assistant messages in a row"),
        ({"messages": "a"}, "field 'messages' is 'a'; expected a list of messages"),
        ({"messages": ["a"]}, "field 'messages' holds 'a'; expected messages"),
        ({"chosen": "a b"}, r"has no field 'rejected' \(fields: chosen\)"),
        ({"chosen": "a b", "rejected": CHAT}, "fields 'chosen' and 'rejected' differ in type"),
        ({"chosen": "x\n\nAssistant:", "rejected": "x\n\nAssistant: a"}, "field 'chosen' is empty after the prompt"),
        ({"turns": []}, "field 'turns' is empty; expected at least one turn"),
        ({"turns": "a"}, "field 'turns' is 'a'; expected a list of turns"),
        ({"turns": ["a"]}, "field 'turns', turn 0 is 'a'; expected an object"),
        ({"turns": [TURN, {"observation": "a"}]}, "field 'turns', turn 1: has no field 'action'"),
        ({"turns": [TURN | {"reward": "x"}]}, "field 'turns', turn 0: field 'reward' holds 'x'"),
        ({"turns": [TURN | {"reward": 1}], "reward": 2}, "field 'reward' is 2.0, but its turns earned 1.0"),
        ({"turns": [TURN], "metrics": "x"}, "field 'metrics' is 'x'; expected an object of numbers"),
        ({"turns": [TURN], "metrics": {"m": math.nan}}, "field 'metrics' is {'m': nan}; expected an object of finite"),
        ({"turns": [TURN], "components": {"m": 10**400}}, "field 'components' is .* expected an object of finite"),
        ({"turns": [TURN], "game": "1"}, "field 'game' is 1; expected an object"),
        ({"turns": [TURN], "group": "x"}, "field 'group' is 'x'; expected a whole number"),
        ({"turns": [TURN], "segments": [{"tokens": [1]}]}, "field 'segments', segment 0 is .*expected an object with"),
        (
            {"turns": [TURN], "segments": [{"tokens": [1], "turns": [5], "logprobs": [None], "rewards": [0.0]}]},
            "field 'segments', segment 0: expected whole numbers as tokens, and turns from -1 to 0",
        ),
        (
            {"turns": [TURN], "segments": [{"tokens": [1], "turns": [], "logprobs": [], "rewards": []}]},
            "field 'segments', segment 0 has lists of 1, 0, 0, 0 entries",
        ),
        (
            {"turns": [TURN], "segments": [{"tokens": [1], "turns": [0], "logprobs": [None], "rewards": [0.0]}]},
            "field 'segments', segment 0 has no context before its first action; expected a token with turn -1 first",
        ),
    ],
)
def test_what_is_malformed_names_the_field(row, message):
    with pytest.raises(Malformed, match=message):
        parse(row)
