"""Files that commands write at their end: what cannot be written is refused at the start."""

import os

import pytest

from lmrl.cli.common import check_outputs
from lmrl.errors import RunError


def test_a_file_in_a_file_is_refused(tmp_path):
    (tmp_path / "notes").write_text("")
    check_outputs(tmp_path / "new" / "scores.json", tmp_path / "new" / "scores.svg")
    with pytest.raises(RunError, match=r"--json: .*/notes/scores.json cannot be written: .*/notes is a file"):
        check_outputs(tmp_path / "notes" / "scores.json")


def test_a_read_only_folder_is_refused(tmp_path, monkeypatch):
    """Not by chmod, which does not bind root."""
    monkeypatch.setattr("os.access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    for option, files in (("--json", (tmp_path / "new" / "a.json", None)), ("--plot", (None, tmp_path / "a.svg"))):
        with pytest.raises(RunError, match=f"{option}: .* cannot be written: {tmp_path} is read-only for this user"):
            check_outputs(*files)
