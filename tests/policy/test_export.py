"""Exported checkpoints decode as the guided policy does: weights, adapters, and the check on the suite."""

import json
import os

import pytest
import torch
import transformers

import lmrl
from lmrl.errors import ModelError, RunError
from lmrl.evaluation import export as exporting
from lmrl.evaluation.evaluate import Evaluator
from lmrl.evaluation.export import export
from lmrl.policy.export import fold, save_adapter, save_plain
from lmrl.policy.heads import HeadsSpec
from lmrl.policy.load import load_policy, open_policy
from lmrl.recipe import Model
from tests import forking
from tests.conftest import TINY_LLAMA, TINY_WALKS

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?"
CONFIGS = {
    "llama": TINY_LLAMA,
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
}
BETA = 1.5


def policy_with(spec, config=TINY_LLAMA, **settings):
    """A policy whose heads, and their targets, are all different."""
    torch.manual_seed(0)
    policy = load_policy(Model(config=dict(config) | settings), texts=lambda: [LETTERS], heads=spec)
    for parameter in policy.model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.2)
    for head in (*policy.values.q, *policy.values.target_q):
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter.data, std=0.3)
    policy.values.calibrate(start=-2.0, mean=-1.0, scale=3.0, low=-4.0, high=4.0)
    return policy.eval()


@torch.no_grad()
def guided(policy, tokens, beta, online=False):
    """log_softmax(logits + beta x mean of the target twins' Q) by definition, in float64."""
    values = policy.values
    outputs = policy.causal_lm(input_ids=tokens, output_hidden_states=True)
    hidden = outputs.hidden_states[-1].flatten(0, 1)
    heads = values.q if online else values.target_q
    q = torch.stack([values.all(head, head.features(hidden), policy.vocabulary) for head in heads]).double().mean(0)
    return (outputs.logits.flatten(0, 1).double() + beta * q).log_softmax(-1).view(outputs.logits.shape)


def tokens_of(policy, rows=3, length=9):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, policy.values.tokens, (rows, length), generator=generator)


def reopened(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# --------------------------------------------------------------------------------------------------------------- weights
def test_an_export_ends_where_the_policy_does(tmp_path):
    policy = load_policy(Model(config=dict(TINY_LLAMA)), texts=lambda: [LETTERS])
    policy.causal_lm.generation_config.eos_token_id = 5  # of a base model, whose tokenizer ends turns with 1
    assert policy.eos_ids == {1, 5}
    save_plain(policy, tmp_path)
    assert reopened(tmp_path).generation_config.eos_token_id == [1, 5]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("trunk", ["shared", "detached"])
@pytest.mark.parametrize("q_head", ["linear", "tied"])
def test_one_matrix_does_both(tmp_path, q_head, trunk, kind, tied):
    policy = policy_with(HeadsSpec(q=q_head, trunk=trunk), CONFIGS[kind], tie_word_embeddings=tied)
    tokens = tokens_of(policy)
    expected, other = guided(policy, tokens, BETA), guided(policy, tokens, BETA, online=True)
    plain = policy.causal_lm(input_ids=tokens).logits.double().log_softmax(-1)
    embeddings = policy.causal_lm.get_input_embeddings().weight.detach().clone()
    save_plain(policy, tmp_path, BETA)
    model = reopened(tmp_path)
    with torch.no_grad():
        found = model(input_ids=tokens).logits.double().log_softmax(-1)
    assert torch.allclose(found, expected, atol=2e-5)
    assert not torch.allclose(found, other, atol=0.1) and not torch.allclose(found, plain, atol=0.1)
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    assert not list(tmp_path.glob("heads*")) and (tmp_path / "tokenizer.json").exists()
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("abc")["input_ids"] == policy.tokenizer("abc")["input_ids"]


def test_transformers_generates_as_guided(tmp_path):
    """Greedy `generate` of the export takes the most likely token of the guided policy, step by step."""
    policy = policy_with(HeadsSpec(q="tied"))
    prompts = tokens_of(policy, rows=4, length=5)
    expected, plain = [], []
    for prompt in prompts.tolist():
        for beta, result in ((BETA, expected), (0.0, plain)):
            tokens = list(prompt)
            while len(tokens) < 17 and (len(tokens) == 5 or tokens[-1] not in policy.eos_ids):
                tokens.append(int(guided(policy, torch.tensor([tokens]), beta)[0, -1].argmax()))
            result.append(tokens)
    save_plain(policy, tmp_path, BETA)
    model = reopened(tmp_path)
    found = [
        model.generate(prompt[None], attention_mask=torch.ones(1, 5), do_sample=False, max_new_tokens=12)[0].tolist()
        for prompt in prompts
    ]
    assert found == expected != plain


@pytest.mark.parametrize("beta", [None, 0.0])
def test_heads_of_any_kind_can_be_left_behind(tmp_path, beta):
    policy = policy_with(HeadsSpec(q="mlp", trunk="separate"))
    tokens = tokens_of(policy)
    with torch.no_grad():
        plain = policy.causal_lm(input_ids=tokens).logits
        save_plain(policy, tmp_path, beta)
        assert torch.equal(reopened(tmp_path)(input_ids=tokens).logits, plain)


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        (HeadsSpec(q="mlp"), {}, "Q heads of kind 'mlp' are not linear .*q_head=tied .* --beta 0"),
        (HeadsSpec(q="probability", trunk="separate", value=False), {}, "Q heads of kind 'probability' are not linear"),
        (HeadsSpec(q="linear", trunk="separate"), {}, "on a trunk of their own"),
        (HeadsSpec(), {}, "--beta folds Q heads into the model, but this policy has none: leave it out"),
        (HeadsSpec(q="tied"), {"model_type": "gemma2", "head_dim": 8}, "caps or scales its logits"),
    ],
)
def test_what_cannot_be_folded(spec, settings, message):
    with pytest.raises(ModelError, match=message):
        fold(policy_with(spec, **settings), 1.0)


# -------------------------------------------------------------------------------------------------------------- adapters
@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("lora") / "run"
    model = f"model={{path: {tiny_folder}, lora: {{r: 4, alpha: 8}}}}"
    changes = [change for change in TINY_WALKS if not change.startswith("model.")]
    changes += [model, "objective={name: ilql, q_head: tied, beta: 2, support: 0, polyak: 0.5}", "optimizer.lr=1e-2"]
    lmrl.train("random_walks/bc", [*changes, "training.steps=5", "evaluation.suite=null"], output=folder)
    return folder


def test_a_merged_adapter(tmp_path, lora_run, tiny_folder):
    policy = open_policy(str(lora_run)).eval()
    tokens = tokens_of(policy)
    expected, plain = guided(policy, tokens, BETA), guided(policy, tokens, 0.0)
    export(lora_run, tmp_path / "guided", BETA, check=False)
    export(lora_run, tmp_path / "plain", 0.0)
    with torch.no_grad():
        for name, right, wrong in (("guided", expected, plain), ("plain", plain, expected)):
            found = reopened(tmp_path / name)(input_ids=tokens).logits.double().log_softmax(-1)
            assert torch.allclose(found, right, atol=2e-5) and not torch.allclose(found, wrong, atol=1e-3)
            assert not list((tmp_path / name).glob("adapter*"))
        base = reopened(tiny_folder)(input_ids=tokens).logits.double().log_softmax(-1)
    assert not torch.allclose(plain, base, atol=1e-3)  # the adapter did learn something


def test_the_adapter_alone(tmp_path, lora_run, tiny_folder):
    from peft import PeftModel

    policy = open_policy(str(lora_run)).eval()
    tokens = tokens_of(policy)
    export(lora_run, tmp_path / "adapter", adapter_only=True)
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()
    assert not list((tmp_path / "adapter").glob("model*")) and not list((tmp_path / "adapter").glob("heads*"))
    model = PeftModel.from_pretrained(reopened(tiny_folder), tmp_path / "adapter")
    with torch.no_grad():
        found = model(input_ids=tokens).logits.double().log_softmax(-1)
    assert torch.allclose(found, guided(policy, tokens, 0.0), atol=2e-5)
    with pytest.raises(RunError, match="which no adapter holds: drop --adapter-only"):
        export(lora_run, tmp_path / "other", 1.0, adapter_only=True)
    with pytest.raises(ModelError, match="--adapter-only needs a run with model.lora"):
        save_adapter(policy_with(HeadsSpec()), tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# ------------------------------------------------------------------------------------------------------------- the check
def test_an_export_is_checked_on_the_suite(tmp_path, ilql_run):
    result = export(ilql_run, tmp_path / "out", 8.0, max_loss=1e9)
    assert set(result.rows) == {"guided", "exported"} and result.metric == "optimality"
    guided_score, exported_score = (result.rows[name]["optimality"]["mean"] for name in ("guided", "exported"))
    low, high = lmrl.evaluation.api.evaluator_for(ilql_run).scale
    assert result.loss == pytest.approx(100 * (guided_score - exported_score) / (high - low))
    assert guided_score == lmrl.evaluate(ilql_run, betas=[8.0]).metrics["optimality"]["mean"]
    assert lmrl.evaluate(tmp_path / "out").metrics == result.rows["exported"]  # its task travels along
    assert open_policy(str(tmp_path / "out")).guidance is None


def test_an_export_that_loses_too_much_is_not_kept(tmp_path, ilql_run):
    with pytest.raises(
        RunError, match=r"the export scores [\d.]+ on optimality .* points of .*, more than the -1000 allowed"
    ):
        export(ilql_run, tmp_path / "out", 8.0, max_loss=-1000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("scores", "loss"),
    [((0.5, 0.4, 0.3), 50.0), ((0.5, 0.6, 0.3), -50.0), ((0.3, 0.2, 0.3), 100.0), ((0.3, 0.4, 0.5), 0.0)],
)
def test_without_players_the_loss_is_a_share_of_the_gain(tmp_path, ilql_run, monkeypatch, scores, loss):
    played = iter([({"optimality": {"mean": score}}, []) for score in scores])
    betas = []
    monkeypatch.setattr(Evaluator, "__call__", lambda self, beta=None, **_: betas.append(beta) or next(played))
    monkeypatch.setattr(Evaluator, "scale", None)
    result = export(ilql_run, tmp_path / "out", 8.0, max_loss=1e9)
    assert list(result.rows) == ["guided", "exported", "without Q"] and betas == [8.0, None, 0.0]
    assert result.loss == pytest.approx(loss) and result.unit == "% of the gain over beta 0"


def test_what_is_there_is_not_overwritten(tmp_path, ilql_run):
    for name, fill in (("folder", True), ("file", False)):
        taken = tmp_path / name
        if fill:
            taken.mkdir()
        (taken / "mine" if fill else taken).write_text("mine")
        with pytest.raises(RunError, match=f"{name} is not an empty folder: choose another destination"):
            export(ilql_run, taken, 8.0, check=False)
    (tmp_path / "empty").mkdir()
    export(ilql_run, tmp_path / "empty", 8.0, check=False)
    assert (tmp_path / "empty/model.safetensors").exists() and (tmp_path / "folder/mine").read_text() == "mine"
    with pytest.raises(RunError, match=r"add their weight, --beta B \(0: export without them\)"):
        export(ilql_run, tmp_path / "new")


def test_beta_0_needs_no_check(tmp_path, ilql_run, monkeypatch):
    monkeypatch.setattr(exporting, "compare", None)
    result = export(ilql_run, tmp_path / "out", 0.0, max_loss=-1000)
    assert result.rows == {} and result.loss is None and (tmp_path / "out/model.safetensors").exists()


def test_on_the_command_line(tmp_path, ilql_run):
    def lmrl_export(*arguments):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
        return forking.run(["export", str(ilql_run), "out", *arguments], env=environment, cwd=tmp_path)

    done = lmrl_export("--beta", "8", "--max-loss=-1000")
    assert done.returncode == 2 and done.stderr.startswith("lmrl: the export scores") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    done = lmrl_export("--beta", "8", "--max-loss", "1000")
    assert done.returncode == 0, done.stderr
    assert "guided" in done.stdout and "optimality: the export loses" in done.stdout and "written to out" in done.stdout
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    done = lmrl_export("--beta", "8")
    assert done.returncode == 2 and done.stderr == "lmrl: out is not an empty folder: choose another destination\n"
