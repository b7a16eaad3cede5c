"""What stages are called, where they start from, and imitation of the best episodes."""

import pytest
from safetensors.torch import load_file

from lmrl.errors import RecipeError
from lmrl.recipe.files import load_recipe
from lmrl.training import train
from lmrl.training.stage import Stage
from tests.conftest import TINY_WALKS
from tests.runs import metrics

QUICK = ["training.steps=3", "training.checkpoint_every=0", "evaluation.episodes=2", "optimizer.lr=1e-2"]


def test_expert_iteration(tmp_path):
    """Walks of a policy that has imitated a little: the best third has higher rewards than all of them."""
    tiny = [change for change in TINY_WALKS if not change.startswith("source.")]
    source = ["source={name: rollouts, best: 0.3}", "rollouts.prompts=10", "rollouts.samples=2"]
    warm = "stages.warm={source: {name: dataset, player: random, best: 0.2, episodes: 60, batch_size: 16}}"
    recipe = load_recipe("random_walks/bc", [*tiny, *source, warm, "stages.warm.training.steps=30", *QUICK])
    result = train(recipe, output=tmp_path / "run")
    assert set(result.scores) == {"data", "filtered BC", "expert iteration", "optimum"}
    lines = [line for line in metrics(tmp_path / "run") if line["stage"] == "main" and line["kind"] == "train"]
    assert len(lines) == 3 and all(line["updates"] == 1 and line["failed"] == 0 for line in lines)
    for line in lines:  # six of twenty were learned from, and their mean over twenty is no more than the whole
        assert line["reward"] > line["online/reward"] >= 0.3 * line["reward"] - 1e-9
    finals = [load_file(tmp_path / f"run/stages/{stage}/final/model.safetensors") for stage in ("warm", "main")]
    assert any(not finals[0][name].equal(finals[1][name]) for name in finals[0])


def test_labels(tmp_path):
    changes = [*TINY_WALKS, *QUICK, "stages.filtered={source: {best: 0.2}}", "stages.again={start: model}"]
    result = train(load_recipe("random_walks/bc", changes), output=tmp_path / "run")
    assert list(result.scores) == ["data", "filtered BC", "BC", "BC (main)", "optimum"]


@pytest.mark.parametrize("origin", ["config", "path"])
def test_where_stages_start_from(tmp_path, monkeypatch, tiny_folder, origin):
    begun, original = {}, Stage.train

    def train_and_note(self):
        begun[self.name] = {name: tensor.clone() for name, tensor in self.policy.model.state_dict().items()}
        original(self)

    monkeypatch.setattr(Stage, "train", train_and_note)
    changes = [*TINY_WALKS, *QUICK, "stages={one: {}, two: {start: model}, three: {start: one}}"]
    changes += ["start=two", "evaluation.suite=null"]
    changes += [f"model.path={tiny_folder}"] if origin == "path" else []
    train(load_recipe("random_walks/bc", changes), output=tmp_path / "run")
    finals = {
        name: load_file(tmp_path / f"run/stages/{name}/final/model.safetensors") for name in ("one", "two", "three")
    }

    def same(state, saved):
        return all(state[name].equal(tensor) for name, tensor in saved.items())

    assert same(begun["three"], finals["one"]) and same(begun["main"], finals["two"])
    assert not same(begun["three"], finals["two"]) and not same(begun["main"], finals["three"])
    model = tmp_path / "run/stages/two/start" if origin == "config" else tiny_folder
    assert same(begun["two"], load_file(model / "model.safetensors")) and not same(begun["two"], finals["one"])


def test_new_values_need_a_log(tmp_path):
    tiny = [change for change in TINY_WALKS if not change.startswith("source.")]
    changes = [*tiny, *QUICK, "source={name: rollouts}", "objective={name: ilql}", "rollouts.prompts=4"]
    with pytest.raises(RecipeError, match="'ilql' takes the unit of its new Q values from logged returns: set"):
        train(load_recipe("random_walks/bc", changes), output=tmp_path / "run")
    logged = "stages.logged={source: {name: dataset, player: random, episodes: 40, batch_size: 8}}"
    train(
        load_recipe("random_walks/bc", [*changes, logged]), output=tmp_path / "later"
    )  # values are there to start from
    lines = [line for line in metrics(tmp_path / "later") if line["stage"] == "main" and line["kind"] == "train"]
    assert [line["updates"] for line in lines] == [1, 1, 1] and all("q_loss" in line for line in lines)


@pytest.mark.parametrize(("objective", "warned"), [("q_sft", True), ("likelihood", False)])
def test_an_untrained_policy_that_stays_so_is_noted(tmp_path, capsys, objective, warned):
    steps = ["training.steps=1", "training.checkpoint_every=0", "evaluation.suite=null"]
    train(
        load_recipe("random_walks/bc", [*TINY_WALKS, f"objective={{name: {objective}}}", *steps]),
        output=tmp_path / "run",
    )
    assert ("has learned nothing: begin with a stage" in " ".join(capsys.readouterr().out.split())) == warned
