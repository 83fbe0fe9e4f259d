"""Ranks that do not decide alike are stopped, wherever it is known that they have to; those that do are left alone."""

import pytest

from tests.integrations import launching

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "lane", "stops"),
    [
        ("alike", "host", None),
        ("larger", "host", 100),
        ("larger", "device", 119),
        ("one-nan", "host", 100),
        ("plain", "host", 100),
    ],
)
def test_ranks_that_decide_otherwise_are_stopped_within_fifty_steps(kind, lane, stops, tmp_path):
    """In host memory at the comparison itself, on a device when the rows are read."""
    ranks = launching.launch("tests.integrations.ranks_worker", [kind, lane], tmp_path / "two")
    assert [rank["stopped"] for rank in ranks] == [stops, stops]


@pytest.mark.parametrize("kind", ["plain", "accelerate", "sometimes", "guard"])
def test_a_loss_that_only_some_ranks_know_counts_for_all_of_them(kind, tmp_path):
    """And none of them waits for a rank that has no loss to give."""
    first, second = launching.launch("tests.integrations.loss_worker", [kind], tmp_path / "two")
    assert first == second
    assert first["seen"][-1] == 20  # as many as are counted: in "sometimes" one rank of two knows it in most steps
