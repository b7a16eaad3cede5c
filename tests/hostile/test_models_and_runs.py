"""Broken models, checkpoints and runs: the message names the file and the fix, and nothing is lost."""

import shlex
import shutil

import pytest
from harness import check_line, checksums, copied, cut, edited, folder, removed, written

FINAL, KEPT = "run/stages/main/final", "run/stages/main/checkpoints"
RECIPE = """
model: {path: model}
task: {environment: random_walks, graph: 3, nodes: 8}
rollouts: {max_new_tokens: 6, prompts: 2}
objective: {name: ppo}
training: {steps: 1}
evaluation: {suite: null}
"""
TRAIN = "train mine.yaml -o out"
NO_TOKENIZER = removed("model/tokenizer*")


def starts(place):
    copied("model")(place)
    written("mine.yaml", RECIPE)(place)


def copy_of(name, to):
    return lambda place: shutil.copytree(place / name, place / to)


MODELS = [
    (
        [cut("model/model.safetensors")],
        TRAIN,
        r"model.path: '.*model' cannot be loaded: 'model.safetensors' is damaged or cut off",
    ),
    (
        [cut("model/model.safetensors", 0)],
        TRAIN,
        r"'model.safetensors' is damaged or cut off: copy or download it again",
    ),
    ([removed("model/model.safetensors")], TRAIN, r"model.path: .*'model.safetensors' is missing"),
    (
        [removed("model/model.safetensors"), written("model/pytorch_model.bin", "x")],
        TRAIN,
        r"weights are pickled \(\*.bin\), which may run code and are not read; save them as safetensors",
    ),
    (
        [
            removed("model/model.safetensors"),
            written("model/model.safetensors.index.json", {"weight_map": {"a": "b.safetensors"}}),
        ],
        TRAIN,
        r"model.path: .*'b.safetensors' is missing",
    ),
    ([written("model/config.json", "{")], TRAIN, r"model.path: .*'config.json' is not valid JSON"),
    ([removed("model/config.json")], TRAIN, r"model.path: .*'config.json' is missing"),
    ([edited("model/config.json", model_type="llamma")], TRAIN, r"model.path: '.*model' cannot be loaded: .*llamma"),
    (
        [edited("model/config.json", num_hidden_layers=3)],
        TRAIN,
        r"model.path: .*has no weights for 'model.layers.2.*incomplete",
    ),
    ([edited("model/config.json", vocab_size=9)], TRAIN, r"model.path: '.*model' cannot be loaded"),
    (
        [NO_TOKENIZER],
        TRAIN,
        r"model.path: .*holds no tokenizer \(tokenizer.json\): save the one that the model was trained",
    ),
    ([written("model/tokenizer.json", "{")], TRAIN, r"model.path: .*'tokenizer.json' is not valid JSON"),
    (
        [
            edited(
                "model/config.json",
                model_type="own",
                auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
            ),
            written("model/own.py", "raise SystemExit('ran')\n"),
        ],
        TRAIN,
        r"model.path: .*comes with its own code, which is not run by default: read it, then .* model.trust_remote_code=true",
    ),
    (
        [
            edited(
                "model/config.json",
                model_type="own",
                auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
            ),
            written("model/own.py", "raise SystemExit('ran')\n"),
        ],
        "eval model --suite random_walks",
        r"policy: 'model' comes with its own code, .* --trust-remote-code",
    ),
    ([], TRAIN + " model.path=modle", r"model.path: there is no 'modle' here: did you mean 'model'\?"),
    ([], TRAIN + " model.path=model/final", r"model.path: there is no 'model/final' here"),
    ([folder("models/small")], TRAIN + " model.path=models/smal", r"model.path: there is no 'models/smal' here"),
    (
        [],
        TRAIN + " model.path=someone/no-such-model",
        r"model.path: .*is not a folder here, and the hub cannot be reached",
    ),
    (
        [copied("judge")],
        TRAIN + " model.path=judge",
        r"'.*judge' is a sequence classifier.*name it as `model` under task.rewards",
    ),
    ([], TRAIN + " model.lora.target_modules=[nowhere]", r"model.lora: .*nowhere"),
    (
        [copied("lora")],
        TRAIN + " model.path=lora 'model.lora={r: 8, alpha: 16}'",
        r"model.lora: .*r=2 and alpha=4.*: make them equal",
    ),
    (
        [folder("empty")],
        "eval empty",
        r"policy: 'empty' is neither a run folder nor a checkpoint or model \(a model's folder holds",
    ),
    (
        [],
        "eval mine.yaml",
        r"policy: 'mine.yaml' is a file: name a run folder, a checkpoint, a model folder or a GGUF file",
    ),
    ([], "eval model", r"'model' does not say what it was trained for: name a suite, --suite NAME"),
    ([], "eval model --suite random_walk", r"no suite called 'random_walk'; did you mean 'random_walks'\?"),
    (
        [],
        "eval model --suite random_walks --checkpoint best",
        r"--checkpoint best: 'model' is not a run folder.*leave it out",
    ),
    ([NO_TOKENIZER], "eval model --suite random_walks", r"policy: 'model' cannot be loaded: it holds no tokenizer"),
    ([NO_TOKENIZER], "export model out --no-check", r"policy: 'model' cannot be loaded: it holds no tokenizer"),
    ([], "export model out --adapter-only", r"--adapter-only needs a run with model.lora.*: leave it out"),
    ([], "export model out --beta 1", r"--beta folds Q heads into the model, but this policy has none: leave it out"),
    ([written("out/mine", "x")], "export model out", r"out is not an empty folder: choose another destination"),
    (
        [],
        "eval model --suite random_walks --beta 1",
        r"--beta weighs Q values, but 'model' has no Q heads: leave it out",
    ),
    ([], "collect model", r"does not say what it was trained for: name what to play, --environment NAME"),
    (
        [written("log.jsonl", "x")],
        "collect model -e random_walks -o log.jsonl",
        r"log.jsonl.*--force|--force.*log.jsonl",
    ),
    ([], "collect model -e random_walks task.graf=3", r"unknown key 'task.graf' .*did you mean 'task.graph'\?"),
    ([], "collect modle -e random_walks", r"policy: there is no 'modle' here: did you mean 'model'\?"),
]


@pytest.mark.parametrize(("prepares", "command", "message"), MODELS, ids=range(len(MODELS)))
def test_broken_models(lmrl, place, prepares, command, message):
    starts(place)
    check_refused(lmrl, place, prepares, command, message)


def check_refused(lmrl, place, prepares, command, message):
    for prepare in prepares:
        prepare(place)
    before = checksums(place)
    check_line(lmrl(*shlex.split(command)), message)
    assert checksums(place) == before


BROKEN = cut(f"{FINAL}/model.safetensors")
WHOLE = r"step-000004 is complete: use that"
RUNS = [
    (
        [BROKEN],
        "eval run",
        rf"policy: '{FINAL}' cannot be loaded: 'model.safetensors' is damaged or cut off: .*{WHOLE}",
    ),
    ([BROKEN], "export run out", rf"'model.safetensors' is damaged or cut off: .*{WHOLE}"),
    ([BROKEN], "collect run -n 2 -o log.jsonl", rf"'model.safetensors' is damaged or cut off: .*{WHOLE}"),
    (
        [cut(f"{FINAL}/model.safetensors"), cut(f"{KEPT}/step-000004/model.safetensors")],
        "eval run",
        r"step-000002 is complete: use that",
    ),
    (
        [BROKEN, removed(KEPT)],
        "eval run",
        r"no checkpoint of this run is complete; train it again: lmrl train .*run/recipe.yaml",
    ),
    (
        [removed(FINAL), cut(f"{KEPT}/step-000004/model.safetensors")],
        "train run --resume",
        r"step-000004: 'model.safetensors' is damaged .*step-000002 is complete: delete",
    ),
    (
        [removed(FINAL), removed(f"{KEPT}/step-000004/state")],
        "train run --resume",
        r"'state/trainer.json' is missing; step-000002 is complete",
    ),
    (
        [removed(FINAL), cut(f"{KEPT}/step-000004/state/optimizer.safetensors")],
        "train run --resume",
        r"optimizer.safetensors.*step-000002 is complete",
    ),
    (
        [removed(FINAL), written(f"{KEPT}/step-000004/state/trainer.json", "{")],
        "train run --resume",
        r"trainer.json.*step-000002 is complete",
    ),
    (
        [removed(FINAL), folder(f"{KEPT}/step-000009")],
        "eval run",
        r"step-000009 is incomplete, it holds no model: choose another one, --checkpoint step-N",
    ),
    (
        [removed(FINAL), folder(f"{KEPT}/step-000009")],
        "train run --resume",
        r"step-000009.*'state/trainer.json' is missing; step-000004 is complete: delete",
    ),
    (
        [removed(FINAL, KEPT)],
        "eval run",
        r"run: its last stage has no checkpoint yet: continue it with: lmrl train run --resume",
    ),
    (
        [removed(FINAL, KEPT)],
        "export run out",
        r"run: its last stage has no checkpoint yet: continue it with: lmrl train run --resume",
    ),
    (
        [removed(FINAL, KEPT)],
        "eval run --checkpoint step-2",
        r"run: its last stage has no checkpoint yet: continue it with",
    ),
    (
        [removed("run/stages")],
        "eval run",
        r"run: its last stage has no checkpoint yet: continue it with: lmrl train run --resume",
    ),
    ([removed("run/stages")], "export run out", r"run: its last stage has no checkpoint yet: continue it with"),
    ([removed("run/stages")], "collect run", r"run: its last stage has no checkpoint yet: continue it with"),
    (
        [],
        "eval run --checkpoint step-9",
        r"run has no checkpoint 'step-9'; there are: step-000002, step-000004, final, best",
    ),
    (
        [],
        "eval run --checkpoint lats",
        r"run has no checkpoint 'lats'; there are: step-000002, step-000004, final, best",
    ),
    ([], "eval run task.grph=3", r"unknown key 'task.grph' .*did you mean 'task.graph'\?"),
    ([], "eval rum", r"policy: there is no 'rum' here: did you mean 'run'\?"),
    ([], "export rum out", r"policy: there is no 'rum' here: did you mean 'run'\?"),
    ([], "eval runs/walks", r"policy: there is no 'runs/walks' here"),
    (
        [],
        "eval run/stages/main/finl",
        r"policy: there is no 'run/stages/main/finl' here: did you mean 'run/stages/main/final'\?",
    ),
    ([], "eval run --json .", r"--json: \. is a folder, name a file"),
    ([], "replay run", r"run is not a bundle"),
    ([], "replay run --episode main/train/1/99", r"--episode: run/samples.jsonl does not exist: name a run folder"),
    ([], "reward score lmrl.reward_models.answers.exact --run run/stages", r"run/stages holds no samples.jsonl"),
    (
        [removed("run/recipe.yaml")],
        "train run --resume",
        r"run holds no recipe.yaml, by which a run is resumed: put it back, or",
    ),
    (
        [removed("run/recipe.yaml")],
        "train --output run --resume",
        r"run holds no recipe.yaml, by which a run is resumed",
    ),
    (
        [removed("run/recipe.yaml")],
        "train random_walks/bc -o run --resume",
        r"run holds no recipe.yaml, by which a run is resumed",
    ),
    (
        [removed("run/recipe.yaml")],
        "train random_walks/bc -o run",
        r"run holds a run without its recipe.yaml: put that back and resume",
    ),
    ([cut("run/recipe.yaml")], "train run --resume", r"run/recipe.yaml"),
    ([], "train run", r"'run' is a run folder: continue it with --resume"),
    ([], "train run --resume -o other", r"'run' is a run folder, and continues there: leave --output out"),
    ([], "train runn --resume", r"there is no run folder 'runn' to resume"),
    ([], "train runs/walks --resume", r"there is no run folder 'runs/walks' to resume"),
    ([], "train random_walks/bc -o run", r"run holds a run: continue it with --resume, or choose another --output"),
    ([], "train random_walks/ppo -o run --resume", r"run was made with another recipe: '.*' differs"),
    (
        [],
        "train run --resume optimizer.lr=1",
        r"made with another recipe: 'optimizer.lr' differs.*start a new run with another --output",
    ),
    (
        [],
        "train run --resume training.steps=3",
        r"training.steps=3 is less than the run's 4: a resumed run may only have more",
    ),
    (
        [removed(FINAL, KEPT), copy_of("run/stages/main/start", FINAL)],
        "train run --resume training.steps=8",
        r"final: .state/trainer.json. is missing or damaged: delete .*final and resume again",
    ),
    ([written("out", "x")], "train random_walks/bc -o out", r"--output: cannot make the folder .*out: File exists"),
    (
        [copied("lora"), cut("lora/stages/main/final/adapter_model.safetensors")],
        "eval lora",
        r"'adapter_model.safetensors' is damaged or cut off: .*is complete: use that",
    ),
    (
        [copied("lora"), removed("lora/stages/main/final/adapter_model.safetensors")],
        "eval lora",
        r"'adapter_model.safetensors' is missing",
    ),
    (
        [copied("lora"), written("lora/stages/main/final/adapter_config.json", "{")],
        "eval lora",
        r"'adapter_config.json' is not valid JSON",
    ),
    (
        [copied("lora"), edited("lora/stages/main/final/adapter_config.json", base_model_name_or_path="/models/moved")],
        "eval lora",
        r"the adapter 'lora/stages/main/final' belongs to the model '/models/moved', which is not there: put it back, or set "
        r"base_model_name_or_path in .*adapter_config.json",
    ),
    (
        [copied("lora", "model"), edited("lora/stages/main/final/adapter_config.json", base_model_name_or_path="model")]
        + [edited("model/config.json", hidden_size=32), removed("model/model.safetensors")],
        "eval lora",
        r"policy: 'model' cannot be loaded: 'model.safetensors' is missing",
    ),
    (
        [copied("lora"), edited("lora/stages/main/final/adapter_config.json", base_model_name_or_path=None)],
        "export lora out",
        r"does not say which model it belongs to: set base_model_name_or_path",
    ),
]


@pytest.mark.parametrize(("prepares", "command", "message"), RUNS, ids=range(len(RUNS)))
def test_broken_runs(lmrl, place, prepares, command, message):
    copied("run")(place)
    check_refused(lmrl, place, prepares, command, message)


def test_other_folders_are_not_checkpoints(lmrl, place):
    copied("run")(place)
    removed(FINAL)(place)
    copy_of(f"{KEPT}/step-000002", f"{KEPT}/step-old")(place)
    code, out, err = lmrl("train", "run", "--resume")
    assert code == 0 and "resumed stage main at step 4" in out and not err
    assert (place / KEPT / "step-old" / "model.safetensors").exists()


def test_an_adapter_does_not_fit_another_base(lmrl, place, tiny_config):
    import transformers

    copied("lora", "model")(place)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    config = transformers.LlamaConfig(**tiny_config | {"hidden_size": 32, "vocab_size": len(tokenizer)})
    transformers.LlamaForCausalLM(config).save_pretrained(place / "model")
    edited("lora/stages/main/final/adapter_config.json", base_model_name_or_path="model")(place)
    check_line(
        lmrl("eval", "lora"), r"the adapter 'lora/.*final' does not fit its base 'model', which may have been replaced"
    )
