"""Files that appear by one rename."""

import pytest

from lmrl.atomic_files import replacing


def test_an_unfinished_file_is_deleted(tmp_path):
    (tmp_path / "scores.json").write_text("old")
    with pytest.raises(OSError, match="No space"), replacing(tmp_path / "scores.json") as scratch:
        scratch.write_text("ha")
        raise OSError(28, "No space left on device")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("scores.json", "old")]
