"""Logged data as a source: files and scripted players."""

import json
import re

import pytest

from lmrl.engines.base import Sampling
from lmrl.engines.hf import HFEngine
from lmrl.environments import TextEnvironment
from lmrl.errors import DataError, ModelError, RecipeError
from lmrl.evaluation.statistics import summarize
from lmrl.recipe.files import load_recipe
from lmrl.rollouts.collect import play_players
from lmrl.rollouts.sampler import Sampler
from lmrl.rollouts.task import Task
from lmrl.sources import dataset as dataset_module
from lmrl.sources.base import SourceRequest
from lmrl.sources.dataset import Dataset, build_dataset, open_dataset_file, play_dataset
from lmrl.trajectories.chain import rewards_and_turns
from lmrl.trajectories.preference_pairs import read_pairs
from lmrl.trajectories.recorder import Recorder
from lmrl.trajectories.render import Renderer
from lmrl.trajectories.store import write_episodes
from lmrl.trajectories.trajectory import Trajectory
from tests.sources.conftest import dataset, lines, rewarded, said


# -------------------------------------------------------------------------------------------------------------- players
def test_scripted_players_make_data(walks):
    played = play_dataset(walks, "random", 50, seed=0)
    assert len(played) == 50 and 0 < sum(walk.reward for walk in played) < 50
    assert all(set(walk.segments[0].logprobs) == {None} for walk in played)
    assert played == play_dataset(walks, "random", 50, seed=0)
    assert {walk.reward for walk in play_dataset(walks, "optimal", 20, seed=0)} == {1.0}
    for players in ("best", {"random": 1.0, "best": 1.0}):
        with pytest.raises(RecipeError, match=r"source.player: the environment has no player 'best' \(it has random, "):
            play_dataset(walks, players, 1, seed=0)


def test_a_players_episodes_beyond_the_model_are_left_out(walks):
    """As those of a file are: a pass over more tokens than there are positions for fails."""
    lengths = [len(walk.segments[0].tokens) for walk in play_dataset(walks, "random", 50, seed=0)]
    walks.positions, options = max(lengths) - 1, dataset(player="random", episodes=50)
    found = build_dataset(options, walks, 0, "main")
    longest = lengths.count(max(lengths))
    assert len(found.returns) == 50 - longest > 0
    assert found.notes == [
        f"source.player: left out {longest} episodes of more than the {max(lengths) - 1} tokens that the model has positions for"
    ]
    walks.positions = 1
    with pytest.raises(DataError, match="source.player: no episode is left to train on; left out 50 episodes of more"):
        build_dataset(options, walks, 0, "main")


def test_players_share_the_episodes(walks):
    played = play_dataset(walks, {"random": 3, "optimal": 1}, 400, seed=0)
    assert [walk.episode for walk in played] == [walk.group for walk in played] == list(range(400))
    optimal = [walk for walk in played if walk.player == "optimal"]
    assert 70 < len(optimal) < 130 and {walk.reward for walk in optimal} == {1.0}
    assert {walk.player for walk in played} == {"random", "optimal"}
    assert played == play_dataset(walks, {"random": 0.75, "optimal": 0.25}, 400, seed=0)
    starts = [int(walks.training[0])] * 3
    (only,) = {walk.player for walk in play_players(Sampler(walks), {"random": 1.0}, starts, ("x",))}
    assert only == "random"


def test_scores_of_players(walks):
    source = build_dataset(dataset(player={"random": 0.5, "optimal": 0.5}, episodes=60, best=0.2), walks, 0, "main")
    assert source.scores()["return"]["mean"] == pytest.approx(sum(source.returns) / 60)
    assert source.scores()["optimality"]["n"] == 60 and "length" in source.scores()
    assert {episode.reward for step in range(1, 4) for episode in source.next(step).learn} == {1.0}


# ---------------------------------------------------------------------------------------------------------------- files
def test_a_file_as_source(tmp_path, walks):
    rows = [
        {"turns": [{"observation": "a", "action": letter}], "reward": reward, "metrics": {"optimality": reward}}
        for letter, reward in zip("bcdef", [1, 5, 3, 5, 2], strict=True)
    ]
    path = lines(tmp_path / "data.jsonl", rows)
    source = build_dataset(dataset(path=path, batch_size=2), walks, 0, "main")
    assert source.returns == [1, 5, 3, 5, 2] and source.notes == []
    assert source.scores()["return"]["mean"] == 3.2 and source.scores()["optimality"]["n"] == 5
    seen = [episode.completion for step in (1, 2, 3, 4, 5) for episode in source.next(step).learn]
    assert sorted(seen) == sorted("bcdef" * 2)
    best = build_dataset(dataset(path=path, batch_size=2, best=0.4), walks, 0, "main")
    assert {episode.completion for episode in best.next(1).learn} == {"c", "e"}
    assert best.returns == source.returns and best.scores() == source.scores()


def test_a_file_without_rewards(tmp_path, walks):
    path = lines(
        tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b", "reward": 1}, {"prompt": "a", "completion": "c"}]
    )
    assert build_dataset(dataset(path=path), walks, 0, "main").scores()["return"]["n"] == 1
    with pytest.raises(DataError, match="data.jsonl, line 2: has no reward, but source.best=0.5 ranks episodes"):
        build_dataset(dataset(path=path, best=0.5), walks, 0, "main")
    path = lines(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}])
    assert build_dataset(dataset(path=path), walks, 0, "main").scores() is None


def test_the_window_of_the_task_holds_for_files(tmp_path, tokenizer):
    turns = [{"observation": letter, "action": letter.upper().lower()} for letter in "abc"]
    path = lines(tmp_path / "data.jsonl", [{"turns": turns}])
    for history, count in (("all", 1), (1, 3)):
        task = Task(lambda: None, Renderer(tokenizer), None, None, history=history)
        assert len(open_dataset_file(dataset(path=path), task)[0].segments) == count


class Letters(TextEnvironment):
    """Shows the letters in turn, and ends for no action."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turn = 0
        return "a", {}

    def step(self, action):
        self.turn += 1
        return "abcdef"[self.turn], float(self.turn), False, False, {}


def test_tokens_get_the_contexts_of_the_task(tmp_path, tiny_policy):
    """A log of a policy that saw all of the episode, for one that sees a part of it, and the other way around."""
    tokenizer = tiny_policy.tokenizer

    def task(history):
        return Task(Letters, Renderer(tokenizer), None, None, max_turns=3, history=history)

    sampler = {history: Sampler(task(history), HFEngine(tiny_policy), tiny_policy.decode) for history in ("all", 1, 2)}
    for logged, own in sampler.items():
        played = own.play([None, None], 1, Sampling(max_new_tokens=3), ("log",))
        write_episodes(tmp_path / f"{logged}.jsonl", played, tokenizer)
        for history in sampler:
            file = open_dataset_file(dataset(path=str(tmp_path / f"{logged}.jsonl")), task(history))
            assert len(file.notes) == (history != logged)
            for number, one in enumerate(played):
                if history == logged:
                    assert file[number] == one
                    continue
                actions = [
                    [token for segment in one.segments for token, of in pairs(segment) if of == turn]
                    for turn in range(3)
                ]
                recorder = Recorder(Trajectory([], "", ""), Renderer(tokenizer), history)
                for turn in range(3):
                    recorder.observe("abc"[turn])
                    recorder.act(one.turns[turn].action, actions[turn])
                recorder.truncate("d")
                for found, expected in zip(file[number].segments, recorder.trajectory.segments, strict=True):
                    assert (found.tokens, found.turns) == (expected.tokens, expected.turns)
                assert rewards_and_turns(file[number])[0].tolist() == rewards_and_turns(one)[0].tolist()


def pairs(segment):
    return zip(segment.tokens, segment.turns, strict=True)


def test_dialogues_need_a_template(tmp_path, walks):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = lines(tmp_path / "data.jsonl", [{"messages": chat}])
    with pytest.raises(ModelError, match="data.jsonl: holds dialogues, but the tokenizer has no chat template"):
        open_dataset_file(dataset(path=path), walks)


def test_malformed_rows_can_be_skipped(tmp_path, walks):
    path = lines(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    with pytest.raises(DataError, match="data.jsonl, line 2: has no field 'completion'"):
        build_dataset(dataset(path=path), walks, 0, "main")
    report = tmp_path / "bad_rows.jsonl"
    source = build_dataset(dataset(path=path, skip_bad_rows=True), walks, 0, "main", report)
    assert source.notes == [f"{path}: left out 1 malformed line (see {report})"]
    assert json.loads(report.read_text())["line"] == 2


def test_imitated_rejections_are_warned_of(tmp_path, walks):
    path = lines(tmp_path / "data.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    best = ["source.best=0.5", "source.best_among=prompt"]
    for method, changes, notes in (("sft", [], 1), ("sft", best, 0), ("ilql", [], 0)):
        recipe = load_recipe(method, ["model.path=x", f"data.path={path}", *changes])
        found = Dataset.build(SourceRequest(recipe, walks, Sampler(walks), "main"))
        assert sum("the rejected answers are imitated as well" in note for note in found.notes) == notes
        assert [found.returns[row] for row in found.kept] == [1.0] if changes else [1.0, -1.0]


def source_for(tmp_path, walks, method, rewards, *changes):
    rows = [{"prompt": "a", "completion": str(number), "reward": one} for number, one in enumerate(rewards)]
    recipe = load_recipe(method, ["model.path=x", f"data.path={lines(tmp_path / 'data.jsonl', rows)}", *changes])
    return Dataset.build(SourceRequest(recipe, walks, Sampler(walks), "main"))


@pytest.mark.parametrize("objective", ["ilql", "mc", "q_sft"])
def test_one_missing_reward_stops_value_learning(tmp_path, walks, objective):
    changes = [f"objective={{name: {objective}}}", "model.lora=null"]
    with pytest.raises(DataError, match=f"data.jsonl, line 2: has no reward, but '{objective}' learns from"):
        source_for(tmp_path, walks, "ilql", [1, None, 0], *changes)
    assert source_for(tmp_path, walks, "sft", [1, None, 0]).returns == [1.0, None, 0.0]


def test_returns_that_teach_nothing_are_warned_of(tmp_path, walks):
    note = "warning: .*data.jsonl: all 3 episodes return 2.0, so "
    (found,) = source_for(tmp_path, walks, "ilql", [2, 2, 2]).notes
    assert re.fullmatch(note + "at most the timing of rewards teaches", found)
    (found,) = source_for(tmp_path, walks, "sft", [2, 2, 2], "source.best=0.5").notes
    assert re.fullmatch(note + "source.best chooses at random", found)
    assert not source_for(tmp_path, walks, "ilql", [2, 2, 1]).notes + source_for(tmp_path, walks, "sft", [2, 2]).notes


def test_long_episodes_are_left_out(tmp_path, walks):
    path = lines(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "abcdef", "completion": "b"}])
    source = build_dataset(dataset(path=path, max_tokens=5), walks, 0, "main")
    assert [episode.prompt for episode in source.take(0, 2)] == ["a", "a"]
    assert source.notes == [f"{path}: left out 1 episode of more than 5 tokens"]


# --------------------------------------------------------------------------------------------------------------- groups
def test_groups_are_drawn_whole(tmp_path, walks):
    rows = rewarded(("a", "x", 1), ("b", "x", 0), ("a", "y", 0), ("c", "x", 1), ("c", "y", 1), ("b", "z", 2))
    source = build_dataset(dataset(path=lines(tmp_path / "data.jsonl", rows)), walks, 0, "main", compares=True)
    source_batch = source.take(0, 3)
    assert len(source_batch) == 6  # two pairs and one of them again; the prompt c has nothing to compare
    assert [episode.group for episode in source_batch] == [0, 0, 1, 1, 2, 2]
    assert {episode.prompt for episode in source_batch} == {"a", "b"}
    assert source.notes == ["left out 1 of 3 prompts without two episodes of different rewards"]


def test_pairs_of_the_same_prompt_stay_apart(tmp_path, walks):
    rows = [{"prompt": "a", "chosen": "x", "rejected": "y"}, {"prompt": "a", "chosen": "z", "rejected": "x"}]
    source = build_dataset(dataset(path=lines(tmp_path / "data.jsonl", rows)), walks, 0, "main", compares=True)
    assert sorted(len(unit) for unit in source.units) == [2, 2]


def test_pairs_of_equal_answers_are_reported(tmp_path, walks):
    same = [{"prompt": "a", "chosen": "x", "rejected": "x"}, {"chosen": said("a", "x"), "rejected": said("a", "x")}]
    path = lines(tmp_path / "data.jsonl", [{"prompt": "a", "chosen": "x", "rejected": "y"}, *same])
    told = [
        f"warning: {path}, line 2: in 2 pairs chosen and rejected are the same, so that neither is preferred: take them out"
    ]
    assert read_pairs(path)[1] == told
    path = lines(tmp_path / "data.jsonl", [{"prompt": "a", "chosen": "x", "rejected": "y"}, same[0], same[0]])
    assert build_dataset(dataset(path=path), walks, 0, "main", compares=True).notes == told
    assert build_dataset(dataset(path=path), walks, 0, "main").notes == []  # to be imitated


def test_nothing_to_compare_is_reported(tmp_path, walks):
    path = lines(tmp_path / "data.jsonl", rewarded(("a", "x", 1), ("b", "x", 0)))
    with pytest.raises(DataError, match="no two episodes of a prompt have different rewards"):
        build_dataset(dataset(path=path), walks, 0, "main", compares=True)
    path = lines(tmp_path / "data.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c" * 9}])
    with pytest.raises(DataError, match="no pair to train on: .*left out 1 episode of more than 5 tokens: add"):
        build_dataset(dataset(path=path, max_tokens=5), walks, 0, "main", compares=True)


# -------------------------------------------------------------------------------------------------------------- batches
def logged(count, batch_size=4, **options):
    return Dataset(list(range(count)), [0.0] * count, batch_size, 0, "main", **options)


def test_every_logged_episode_is_used_before_any_twice():
    source = logged(10)
    seen = [one for step in range(1, 6) for one in source.next(step).learn]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert source.next(2).learn == seen[4:8]


def test_probe_is_always_the_same_episodes():
    source = logged(10)
    assert source.probe(3) == logged(10).probe(5)[:3] and sorted(source.probe(99)) == list(range(10))


def test_only_the_last_used_episodes_are_held(monkeypatch):
    monkeypatch.setattr(dataset_module, "CACHED", 3)
    read = []

    class Counted:
        def __getitem__(self, index):
            read.append(index)
            return index

    source = Dataset(Counted(), [0.0] * 8, 4, 0, "main")
    source.next(1), source.next(1)
    assert len(read) > 4 and source._episode.cache_info().currsize == 3


def test_pairs_have_no_scores(tmp_path, walks):
    """Their returns, 1 and -1, are labels: a row of the data's mean 0 would stand next to real rewards."""
    path = lines(tmp_path / "pairs.jsonl", [{"prompt": text, "chosen": "b", "rejected": "c"} for text in "de"])
    assert build_dataset(dataset(path=path), walks, 0, "main", compares=True).scores() is None


def test_logged_scores_are_clustered_by_prompt(tmp_path, walks):
    """Two prompts of three episodes each; one episode has no reward, another no component."""
    rows = [
        {"turns": [{"observation": prompt, "action": "a", "reward": reward}], "components": {"short": short}}
        for prompt, reward, short in (
            ("b", 1.0, 2.0),
            ("b", 3.0, 4.0),
            ("b", 2.0, None),
            ("c", 7.0, 1.0),
            ("c", None, 5.0),
            ("c", 9.0, 3.0),
        )
    ]
    scores = build_dataset(dataset(path=lines(tmp_path / "log.jsonl", rows)), walks, 0, "main").scores()
    assert scores["return"]["mean"] == 22 / 5 and (scores["return"]["n"], scores["return"]["clusters"]) == (5, 2)
    assert (scores["short"]["mean"], scores["short"]["n"], scores["short"]["clusters"]) == (3.0, 5, 2)
    assert scores["short"]["ci95"] == summarize([2.0, 4.0, 1.0, 5.0, 3.0], list("bbccc"))["ci95"]
    assert scores["return"]["holds_for"] == "new start states"
