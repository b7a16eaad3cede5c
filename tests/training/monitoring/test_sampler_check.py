"""Before a step trains, the engine's log-probabilities are compared with the learner's."""

import json
import math
from dataclasses import replace

import pytest
import torch

import lmrl
from lmrl.engines.base import Sampling
from lmrl.engines.hf import HFEngine
from lmrl.errors import SamplerError
from lmrl.recipe import Rollouts
from lmrl.training.monitoring.sampler_check import EPISODES, TOKENS, SamplerCheck, logprob_differences, pick_segments
from lmrl.trajectories.trajectory import Segment, Trajectory
from tests.conftest import TINY_WALKS


def played(engine, count=4, temperature=1.0, context=(5, 6)):
    keys = [("trust", row) for row in range(count)]
    found = engine.complete([list(context)] * count, Sampling(8, temperature), keys)
    trajectories = []
    for completion in found:
        segment = Segment()
        segment.observe(list(context))
        segment.act(completion.tokens, completion.logprobs, 0)
        trajectories.append(Trajectory([segment], "", ""))
    return trajectories


class Off(HFEngine):
    """An engine whose log-probabilities are wrong by a constant."""

    by = 0.5

    async def generate(self, tokens, sampling, key, heard=None, allowed=None):
        completion = await super().generate(tokens, sampling, key, heard, allowed)
        return replace(completion, logprobs=[logprob - self.by for logprob in completion.logprobs])


def test_the_learners_own_temperature_does_not_matter(tiny_policy):
    """Objectives that imitate or learn values compute at temperature 1; the comparison is at the sampler's."""
    segments = pick_segments(played(HFEngine(tiny_policy), temperature=0.5))
    assert logprob_differences(tiny_policy, segments, 0.5).abs().max() < 1e-4 and tiny_policy.temperature == 1.0
    assert logprob_differences(tiny_policy, segments, 1.0).abs().mean() > 0.1 * math.log(2)


def test_due_after_the_first_sync_and_then_every_so_many(tiny_policy):
    engine = HFEngine(tiny_policy)
    sampler_check, first_only = (SamplerCheck(tiny_policy, engine, Rollouts(check_every=every)) for every in (2, 0))
    found = []
    for _ in range(5):
        engine.stale = True
        episodes = played(engine)
        found.append(sampler_check(episodes))
        assert sampler_check(episodes) is None  # no second time without new weights
        assert (first_only(episodes) is not None) == (engine.syncs == 1)
    assert [compared and compared["sync"] for compared in found] == [1, None, 3, None, 5]
    assert found[0]["tokens"] == sum(one.num_actions for one in played(engine)) and found[0]["gap_max"] < 1e-4


def test_a_difference_stops_with_what_was_measured(tiny_policy):
    sampler_check = SamplerCheck(tiny_policy, Off(tiny_policy), Rollouts(tolerance=0.4))
    compared = sampler_check(played(sampler_check.engine))
    assert compared["gap_mean"] == pytest.approx(0.5, abs=1e-4) and compared["sampler_kl"] == pytest.approx(
        -0.5, abs=1e-4
    )
    with pytest.raises(SamplerError, match=r"^here: .*0\.500 nats.*rollouts\.tolerance=0\.4") as caught:
        sampler_check.raise_on_mismatch(compared, "here")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1
    SamplerCheck(tiny_policy, sampler_check.engine, Rollouts(tolerance=0.6)).raise_on_mismatch(compared, "here")


@pytest.mark.parametrize("changes", [{"top_p": 0.9}, {"top_k": 5}, {"temperature": 0}])
def test_what_cannot_be_compared_is_reported(tiny_policy, changes):
    sampler_check = SamplerCheck(tiny_policy, Off(tiny_policy), Rollouts(**changes))
    assert sampler_check(played(sampler_check.engine)) is None
    (note,) = sampler_check.notes
    assert next(iter(changes)) in note
    assert SamplerCheck(tiny_policy, sampler_check.engine, Rollouts()).notes == []


def test_few_tokens_of_many_episodes():
    def episode(number, tokens, segments=2):
        parts = []
        for turn in range(segments):
            parts.append(Segment())
            parts[-1].observe([number] * (tokens - 1))
            parts[-1].act([turn], [-1.0], turn)
        return Trajectory(parts, "", "")

    chosen = pick_segments([episode(number, 10) for number in range(100)])
    assert len(chosen) == 2 * 15 and {one.tokens[0] for one in chosen} == set(range(0, 100, 7))  # spread over all
    chosen = pick_segments([episode(number, 200) for number in range(100)])
    assert len(chosen) == TOKENS // 200 and all(one.tokens[-1] == 0 for one in chosen)  # first turns first
    assert len(pick_segments([episode(0, 5 * TOKENS)])) == 1
    unknown = episode(0, 10, segments=1)
    unknown.segments[0].logprobs = [None] * 10
    assert pick_segments([unknown]) == pick_segments([]) == []
    assert len(pick_segments([episode(number, 10, 1) for number in range(EPISODES)])) == EPISODES


def lines(folder, kind):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


PPO = [
    *[one for one in TINY_WALKS if not one.startswith("source.")],
    "stages.warmup.source.episodes=20",
    "stages.warmup.source.batch_size=8",
    "stages.warmup.training.steps=1",
    "evaluation.suite=null",
    "rollouts.prompts=4",
    "training.steps=3",
]


def test_a_run_records_the_comparison(tmp_path):
    lmrl.train("random_walks/ppo", [*PPO, "rollouts.check_every=1"], output=tmp_path / "run")
    checks = [line for line in lines(tmp_path / "run", "check") if line["stage"] == "main"]
    assert [line["step"] for line in checks] == [1, 2, 3] and all(line["gap_max"] < 1e-4 for line in checks)


def test_a_run_stops_before_it_learns(tmp_path, monkeypatch):
    monkeypatch.setattr("lmrl.engines.hf.HFEngine", Off)
    learned = []
    monkeypatch.setattr("lmrl.training.stage.Stage._learn", lambda self, step, episodes: learned.append(step) or {})
    changes = [*TINY_WALKS, "source={name: rollouts, best: 0.5}", "rollouts.prompts=4", "evaluation.suite=null"]
    with pytest.raises(SamplerError, match="stage main, step 1"):
        lmrl.train(
            "random_walks/bc", [one for one in changes if not one.startswith("source.")], output=tmp_path / "run"
        )
    (check,) = lines(tmp_path / "run", "check")
    assert check["gap_mean"] == pytest.approx(0.5, abs=1e-3) and not learned


def test_what_is_learned_from_logs_alone_says_nothing_of_sampling(tmp_path):
    from lmrl.training.display import Display

    said = []
    display = Display()
    display.say = lambda text, whole=False, style="": said.append(text)
    lmrl.train(
        "random_walks/bc",
        [*TINY_WALKS, "training.steps=1", "rollouts.top_k=3"],
        output=tmp_path / "run",
        display=display,
    )
    assert not any("compared" in text for text in said) and not lines(tmp_path / "run", "check")


def test_tensors_stay_as_they_are(tiny_policy):
    """The comparison draws no random number."""
    sampler_check = SamplerCheck(tiny_policy, HFEngine(tiny_policy), Rollouts())
    episodes = played(sampler_check.engine)
    before = torch.get_rng_state()
    assert sampler_check(episodes) is not None and torch.equal(before, torch.get_rng_state())
