"""Packages that only an extra installs: the message if they are missing."""

import configparser
import sys
from pathlib import Path

import pytest

from lmrl.errors import ModelError, PluginError
from lmrl.extras import EXTRAS
from lmrl.plugins.loading import load_plugin
from lmrl.policy.load import open_policy

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "setup.cfg")
DECLARED = SETTINGS["options.extras_require"]


def test_the_sentiment_reward_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.delitem(sys.modules, "vaderSentiment.vaderSentiment", raising=False)
    monkeypatch.delitem(sys.modules, "lmrl.reward_models.sentiment", raising=False)
    with pytest.raises(PluginError) as error:
        load_plugin("lmrl.reward_models.sentiment.sentiment", "task.rewards.0.function")
    text = str(error.value)
    assert text.startswith("task.rewards.0.function: 'lmrl.reward_models.sentiment.sentiment' cannot be imported")
    assert text.endswith("': install the extra 'vader', pip install -e '.[vader]' in the clone of lmrl")


def test_a_gguf_file_names_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"a.gguf' needs gguf, which is not installed: install the extra 'gguf'"):
        open_policy(str(tmp_path / "a.gguf"))


@pytest.mark.parametrize(("module", "extra"), EXTRAS.items())
def test_extras_are_declared(module, extra):
    declared = DECLARED[extra].lower().replace("-", "").replace("_", "")
    assert module.lower().replace("_", "") in declared


def test_old_extras_still_install_the_same():
    assert DECLARED["8bit"] == DECLARED["quantization"]
    for extra in ("vader", "gguf"):
        assert DECLARED[extra] in DECLARED["test"]
