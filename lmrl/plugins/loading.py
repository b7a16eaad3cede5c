"""User code: `file.py:Name` or a dotted path, imported only when a run needs it."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from lmrl.errors import PluginError, did_you_mean
from lmrl.extras import EXTRAS, fix_of
from lmrl.named_files import changed, file_hash
from lmrl.plugins.foreign import foreign

_imported: dict[str, dict[str, str]] = {}
"""By module, the file that it was imported from, with a hash of its content."""


def load_plugin(name: str, key: str) -> Any:
    """The object that `name` names. `key` is the recipe key, for the error message.

    A file is imported under a name derived from its path, so that two files called `reward.py` do not collide and
    their objects can be pickled.
    """
    target, colon, attribute = name.rpartition(":")
    if not colon:
        target, _, attribute = name.rpartition(".")
    if not target or not attribute:
        raise PluginError(f"{key}: '{name}' should be file.py:name or a dotted path")
    try:
        with foreign(target):
            module = _import_file(Path(target)) if target.endswith(".py") else importlib.import_module(target)
    except FileNotFoundError as error:
        raise PluginError(f"{key}: file '{target}' does not exist") from error
    except ModuleNotFoundError as error:
        missing = error.name or ""
        fix = f": {fix_of(missing)}" if missing.partition(".")[0] in EXTRAS else ""
        raise PluginError(f"{key}: '{name}' cannot be imported: no module named '{error.name}'{fix}") from error
    except (Exception, SystemExit) as error:
        raise PluginError(f"{key}: importing '{target}' failed: {type(error).__name__}: {error}") from error
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [known for known in vars(found) if not known.startswith("_")]
            raise PluginError(f"{key}: '{target}' defines no '{part}'{did_you_mean(part, names)}")
        found = getattr(found, part)
    return found


def _import_file(path: Path) -> Any:
    path = path.resolve()
    if not path.is_file():
        raise FileNotFoundError(path)
    module_name = f"lmrl_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    _imported[module_name] = {str(path): file_hash(path)}
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def forget_edited() -> None:
    """Import files of code whose content has changed since again, when they are next named."""
    for module_name, file in _imported.items():
        if changed(file):
            sys.modules.pop(module_name, None)
