"""What setup.cfg installs is what the repository holds."""

import configparser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_package_is_installed():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    installed = set(settings["options"]["packages"].split())
    held = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "lmrl").rglob("__init__.py")}
    held |= {f"lmrl.{name}" for name in ("recipes", "reward_models", "eval")}
    assert installed == held
