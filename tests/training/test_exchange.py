"""Two processes exchange prepared sequences and gradients: the work is even, and the update that of one process."""

import json
from pathlib import Path

import pytest

from tests.training.test_processes import extensions, run_two  # noqa: F401


def test_exchanged_sequences_make_the_same_update(tmp_path, extensions):  # noqa: F811
    run_two([str(Path(__file__).parent / "exchange_worker.py"), str(tmp_path)], None, extensions)
    found = json.loads((tmp_path / "found.json").read_text())
    # One for the flags, and one for each of 6 + 4, 25 and 1 elements.
    assert found.pop("reduced") == {"collectives": 4, "sums": [3.0, 2.0, None, 9.0, 11.0]}
    assert "minutes for the other processes in an update, so one of them hangs: end it, and continue" in found.pop(
        "waited"
    )
    assert set(found) == {"dpo", "grpo", "rloo"}
    for name, one in found.items():
        alone, together = one["losses"]
        assert together == pytest.approx(alone, rel=1e-5, abs=1e-7), name
        assert one["norms"][1] == pytest.approx(one["norms"][0], rel=1e-4), name
        assert one["gap"] < 1e-6 and one["apart"] < 1e-6, name
        before, after = one["imbalance"]
        assert before > 1.2 and after < 1.15, name  # of two dozen sequences, whole pairs of them
        assert one["total"][1] == pytest.approx(one["total"][0]), name
