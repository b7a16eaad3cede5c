"""Trackers: what they receive, that a resumed run continues theirs, and that none of them can end a run."""

import importlib.util
import json
import textwrap
import time
from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

import lmrl
from lmrl.errors import PluginError, RecipeError, RunError
from lmrl.recipe import Recipe
from lmrl.recipe.files import load_recipe
from lmrl.run import Run
from lmrl.training import tracking
from lmrl.training.display import Display
from lmrl.training.interrupt import Interrupted
from lmrl.training.tracking import StageTracking, Trackers, config_of, log_table, markdown, open_trackers, score_rows
from tests.conftest import TINY_WALKS

NOTES = """
    import json
    from accelerate.tracking import GeneralTracker

    class Notes(GeneralTracker):
        name, requires_logging_directory = "notes", True
        fails_at = None

        def __init__(self, project, folder, fails_at=None):
            super().__init__()
            self.path, self.fails_at = f"{folder}/notes.jsonl", fails_at
            self.project = project

        @property
        def tracker(self): return self.path

        def note(self, **line):
            with open(self.path, "a") as file: file.write(json.dumps(line) + "\\n")

        def start(self): self.note(kind="start", project=self.project)
        def store_init_configuration(self, values): self.note(kind="config", values=values)
        def log(self, values, step=None, **more):
            if step == self.fails_at: raise ConnectionError("the service is\\naway")
            self.note(kind="log", values=values, step=step)
        def log_table(self, name, columns=None, data=None, step=None):
            self.note(kind="table", name=name, columns=columns, data=data, step=step)
        def finish(self): self.note(kind="finish")
"""


@pytest.fixture
def notes(tmp_path):
    """A tracker of one's own that writes what it is told, and what reads it."""
    (tmp_path / "mine.py").write_text(textwrap.dedent(NOTES))
    name = f"{tmp_path / 'mine.py'}:Notes"

    def read(run, kind):
        lines = map(json.loads, (run / "trackers" / "notes.jsonl").read_text().splitlines())
        return [line for line in lines if line["kind"] == kind]

    return SimpleNamespace(name=name, read=read)


def said(console: Console) -> str:
    return console.file.getvalue()


def quiet() -> Display:
    return Display(Console(file=StringIO(), width=200))


WALKS = [*TINY_WALKS, "evaluation.every=0", "evaluation.episodes=4", "rollouts.prompts=4", "evaluation.show_every=1"]


def test_a_run_tells_its_trackers_everything(tmp_path, notes):
    """Two stages of 2 and 3 steps, to a tracker of one's own and to tensorboard."""
    names = f"tracking.trackers=[tensorboard, {{name: '{notes.name}'}}]"
    (first,) = load_recipe("random_walks/ppo").stages
    smaller = [change.replace("source.", f"stages.{first}.source.") for change in WALKS]
    steps = [f"stages.{first}.training.steps=2", "training.steps=3"]
    recipe = load_recipe("random_walks/ppo", [*smaller, *steps, names])
    run = tmp_path / "run"
    lmrl.train(recipe, output=run, display=quiet())
    (config,) = notes.read(run, "config")
    assert config["values"]["training.steps"] == 3 and config["values"]["objective.name"] == "ppo"
    logged = notes.read(run, "log")
    assert [one["step"] for one in logged if f"{first}/update_s" in one["values"]] == [1, 2]
    assert [one["step"] for one in logged if "main/update_s" in one["values"]] == [3, 4, 5]
    *samples, result = notes.read(run, "table")
    assert [one["step"] for one in samples] == [3, 4, 5] and {one["name"] for one in samples} == {"main/samples"}
    assert samples[0]["columns"] == ["step", "prompt", "completion", "reward"] and len(samples[0]["data"]) == 2
    assert result["name"] == "result" and result["step"] == 5
    table = json.loads((run / "results.json").read_text())
    assert ["PPO", "optimality", table["PPO"]["optimality"]["mean"]] in [row[:3] for row in result["data"]]
    assert len(notes.read(run, "finish")) == 1

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "trackers" / "lmrl")).Reload()
    assert [one.step for one in board.Scalars("main/reward")] == [3, 4, 5]
    text = board.Tensors("result/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.startswith("| row | metric | mean | low | high | n |") and "| PPO | optimality |" in text
    assert "main/samples/text_summary" in board.Tags()["tensors"]


@pytest.mark.parametrize("error", [Interrupted(15), RuntimeError("the disk is full")], ids=["interrupted", "failed"])
def test_trackers_are_finished_however_a_run_ends(tmp_path, notes, monkeypatch, error):
    def broken(self, step):
        raise error

    monkeypatch.setattr("lmrl.training.stage.Stage._step", broken)
    recipe = load_recipe("random_walks/bc", [*WALKS, f"tracking.trackers=['{notes.name}']"])
    with pytest.raises(type(error)):
        lmrl.train(recipe, output=tmp_path / "run", display=quiet())
    assert len(notes.read(tmp_path / "run", "finish")) == 1


def test_a_resumed_run_is_continued_and_a_broken_tracker_left_out(tmp_path, notes):
    changes = [*WALKS, "training.steps=4", f"tracking.trackers=[{{name: '{notes.name}', fails_at: 3}}]"]
    display = quiet()
    run = tmp_path / "run"
    lmrl.train("random_walks/bc", changes, output=run, display=display)
    assert said(display.console).count("failed and is left out from here on: ConnectionError: the service is away") == 1
    steps = {one["step"] for one in notes.read(run, "log")}
    assert steps >= {1, 2} and max(steps) == 2
    lines = list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
    (failure,) = (line for line in lines if line["kind"] == "tracker")
    assert (failure["stage"], failure["step"]) == ("main", 3) and "away" in failure["error"]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4]
    lmrl.train("random_walks/bc", changes, output=run, resume=True, display=quiet())
    assert len(notes.read(run, "start")) == 2 and len(notes.read(run, "config")) == 1


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_goes_on_in_its_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    changes = [*WALKS, "training.steps=2", "tracking.trackers=[wandb]"]
    for resume in (False, True):
        lmrl.train("random_walks/bc", changes, output=tmp_path / "run", resume=resume, display=quiet())
    folders = list((tmp_path / "run" / "trackers" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len({folder.name.rpartition("-")[2] for folder in folders}) == 1
    assert all(list(folder.rglob("result_*.table.json")) for folder in folders)


# ----------------------------------------------------------------------------------------------------------- one by one
class Stub:
    """A started tracker of a service that chooses the id."""

    def __init__(self, project, **arguments):
        self.arguments, self.configs, self.finished = arguments, 0, []
        info = SimpleNamespace(run_id="chosen")
        self.tracker = SimpleNamespace(
            info=info, id="chosen", hash="chosen", finish=lambda **how: self.finished.append(how)
        )

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.configs += 1

    def log(self, values, step=None):
        pass

    def finish(self):
        self.finished.append({})


def start_twice(tmp_path, monkeypatch, name):
    """Arguments of a tracker's first and second start for the same run folder."""
    monkeypatch.setattr(tracking, "_class_of", lambda spec, index: Stub)
    run = Run.create(tmp_path / "run", load_recipe("random_walks/bc", [f"tracking.trackers=[{name}]"]))
    first, second = (open_trackers(run, quiet()).opened[name] for _ in range(2))
    assert (first.configs, second.configs) == (1, 0)
    return first.arguments, second.arguments


@pytest.mark.parametrize(
    ("name", "key", "length"), [("wandb", "id", 32), ("swanlab", "id", 21), ("comet_ml", "experiment_key", 32)]
)
def test_an_id_is_given_again(tmp_path, monkeypatch, name, key, length):
    first, second = start_twice(tmp_path, monkeypatch, name)
    assert first == second and len(first[key]) == length and first[key].isalnum()


@pytest.mark.parametrize(
    ("name", "key"), [("mlflow", "run_id"), ("clearml", "continue_last_task"), ("aim", "run_hash")]
)
def test_an_id_that_the_service_chose_is_kept(tmp_path, monkeypatch, name, key):
    first, second = start_twice(tmp_path, monkeypatch, name)
    assert key not in first and second[key] == "chosen"


def test_trackio_and_dvclive_continue(tmp_path, monkeypatch):
    first, second = start_twice(tmp_path / "a", monkeypatch, "trackio")
    assert first == second and first["name"].startswith("run-") and first["resume"] == "allow"
    first, second = start_twice(tmp_path / "b", monkeypatch, "dvclive")
    assert (first["resume"], second["resume"]) == (False, True)


def test_options_reach_the_tracker(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "_class_of", lambda spec, index: Stub)
    recipe = load_recipe("random_walks/bc", ["tracking.trackers=[{name: wandb, entity: team, name_: 1}]"])
    opened = open_trackers(Run.create(tmp_path / "run", recipe), quiet()).opened
    assert opened["wandb"].arguments["entity"] == "team"


def test_one_that_cannot_be_started_is_one_line(tmp_path, monkeypatch):
    class Refusing(Stub):
        def start(self):
            raise SystemExit("no API key")

    classes = {"mlflow": Stub, "wandb": Refusing}
    made = []
    monkeypatch.setattr(tracking, "_class_of", lambda spec, index: classes[spec.name])
    monkeypatch.setattr(Stub, "finish", lambda self: made.append(self))
    monkeypatch.setattr(tracking, "finish_tracker", lambda tracker, name, failed: made.append((name, failed)))
    run = Run.create(tmp_path / "run", load_recipe("random_walks/bc", ["tracking.trackers=[mlflow, wandb]"]))
    with pytest.raises(RunError, match=r"tracking.trackers.1: 'wandb' cannot be started: SystemExit: no API key"):
        open_trackers(run, quiet())
    assert made == [("mlflow", True)]


def test_wandb_is_told_that_a_run_failed(tmp_path):
    for failed, told in ((True, {"exit_code": 1}), (False, {})):
        stub = Stub("lmrl")
        tracking.finish_tracker(stub, "wandb", failed)
        assert stub.finished == [told]


def test_missed_entries_are_counted(tmp_path):
    class Broken(Stub):
        name = "broken"

        def log(self, values, step=None):
            raise OSError("gone")

    display, fine, broken = quiet(), Stub("lmrl"), Broken("lmrl")
    recorded = []
    run = SimpleNamespace(record=recorded.append)
    with Trackers(run, display, {"broken": broken, "fine": fine}) as trackers:
        track = StageTracking(trackers, "main", 10)
        for step in (1, 2, 3):
            track({"main/x": 1.0}, step)
    assert said(display.console).count("gone") == 1 and "tracker broken has missed 3 entries" in said(display.console)
    assert recorded == [{"stage": "main", "step": 1, "kind": "tracker", "name": "broken", "error": "OSError: gone"}]
    assert fine.finished == broken.finished == [{}]


def test_a_tracker_that_hangs_is_given_up(tmp_path, monkeypatch):
    class Hanging(Stub):
        def finish(self, **told):
            time.sleep(60)

    monkeypatch.setattr(tracking, "LIMIT", 0.05)
    display = quiet()
    Trackers(SimpleNamespace(), display, {"slow": Hanging("lmrl")}).finish(failed=False)
    assert "tracker slow could not be finished: CallTimedOut: timed out after 0.05 s\n" in said(display.console)


def test_a_table_for_a_tracker_that_has_none_is_left_out():
    log_table(SimpleNamespace(name="swanlab"), "result", ["a"], [[1]], 3)
    logged = []
    board = SimpleNamespace(name="tensorboard", log=lambda values, step: logged.append((values, step)))
    log_table(board, "result", ["a"], [[1]], 3)
    assert logged == [({"result": "| a |\n| --- |\n| 1 |"}, 3)]


def test_markdown_shows_text_as_it_is():
    assert markdown(["a"], [["x|y\n<b>"], [0.123456]]) == "| a |\n| --- |\n| x&#124;y<br>&lt;b&gt; |\n| 0.1235 |"
    assert tracking._cell("a\ud800" + "b" * 9000) == "a?" + "b" * 3998
    assert [tracking._cell(value) for value in (None, 1.5, True, [1])] == ["", 1.5, True, "[1]"]


def test_scores_become_rows():
    scores = {"PPO": {"return": {"mean": 1.0, "ci95": [0.5, 1.5], "n": 4}}}
    assert score_rows(scores) == [["PPO", "return", 1.0, 0.5, 1.5, 4]]


def test_the_config_is_flat_and_plain():
    recipe = load_recipe("sentiment/ppo", ["model.path=.", "rollouts.stop=['.', '!']"])
    config = config_of(recipe)
    assert config["model.lora.r"] == recipe.model.lora.r and config["task.rewards.1.weight"] == 0.0
    assert config["rollouts.stop"] == '[".", "!"]' and config["training.threads"] == "null"
    assert all(isinstance(value, str | int | float) for value in config.values())


# --------------------------------------------------------------------------------------------------------------- recipes
def test_trackers_of_a_recipe(tmp_path, notes, monkeypatch):
    recipe = load_recipe("random_walks/bc", ["tracking.trackers=[tensorboard, wandb]"])
    assert [one.name for one in recipe.tracking.trackers] == ["tensorboard", "wandb"]
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    with pytest.raises(RecipeError, match="tracking.trackers.0.name: .*did you mean 'wandb'"):
        load_recipe("random_walks/bc", ["tracking.trackers=[wandbb]"])
    with pytest.raises(RecipeError, match="tracking.trackers: 'wandb' is named twice"):
        load_recipe("random_walks/bc", ["tracking.trackers=[wandb, wandb]"])
    monkeypatch.chdir(tmp_path)
    own = load_recipe("random_walks/bc", ["tracking.trackers=['mine.py:Notes']"])
    assert own.tracking.trackers[0].name == notes.name


def test_what_is_no_tracker_is_said_before_the_run_begins(tmp_path):
    (tmp_path / "mine.py").write_text("class Plain: pass")
    recipe = load_recipe("random_walks/bc", [f"tracking.trackers=['{tmp_path}/mine.py:Plain']"])
    with pytest.raises(PluginError, match="tracking.trackers.0: .*Plain' is no tracker: derive"):
        tracking.check_trackers(recipe)
    recipe = load_recipe("random_walks/bc", ["tracking.trackers=[comet_ml]"])
    with pytest.raises(RecipeError, match="tracking.trackers.0: 'comet_ml' is not installed: pip install comet-ml"):
        tracking.check_trackers(recipe)
