"""ARCHITECTURE.md describes a prompt's way correctly: at most eight files, which define the names it mentions."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "ARCHITECTURE.md").read_text()
WAY = re.findall(r"^\d+\. \[([^]]+)\]\(([^)]+)\) `([\w.]+)`", TEXT, re.MULTILINE)


def test_way_has_at_most_eight_files():
    assert 1 <= len({path for _, path, _ in WAY}) == len(WAY) <= 8


@pytest.mark.parametrize("shown, path, name", WAY)
def test_file_defines_what_is_named(shown, path, name):
    source = (ROOT / path).read_text()
    assert shown == path and all(re.search(rf"^\s*(class|def) {part}\b", source, re.M) for part in name.split("."))


def test_package_table_names_what_exists():
    names = [
        name for row in re.findall(r"^\| (`[^|]+`) \|", TEXT, re.MULTILINE) for name in re.findall(r"`([\w./]+)`", row)
    ]
    assert "policy/" in names and all((ROOT / "lmrl" / name).exists() for name in names)
