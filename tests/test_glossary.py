"""docs/glossary.md names files and settings that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = re.findall(r"\| ([^|]+) \|$", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)
NAMES = sorted({name for cell in CODE for name in re.findall(r"`([\w./]+)`", cell)})
SOURCE = {file.relative_to(ROOT / "lmrl").as_posix(): file.read_text() for file in (ROOT / "lmrl").rglob("*.py")}


@pytest.mark.parametrize("name", NAMES)
def test_code_column_names_what_exists(name):
    if name.endswith(".py"):
        assert any(path == name or path.endswith(f"/{name}") for path in SOURCE)
    elif name.endswith("/"):
        assert (ROOT / "lmrl" / name).is_dir() or (ROOT / "lmrl/training" / name).is_dir()
    else:
        last = name.rpartition(".")[2]
        assert any(re.search(rf"\b(class|def|self\.)?\s?{last}\b(\(|:| =)", text) for text in SOURCE.values())
