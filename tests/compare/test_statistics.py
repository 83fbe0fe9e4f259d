import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaclip.compare.statistics import median, paired_ratio

INF = math.inf
costs = st.floats(1, 1e6) | st.just(INF)


def test_median_of_paired_ratios():
    ratio = paired_ratio([50, 80, 90], [100, 100, 100])

    assert ratio.ratios == (0.5, 0.8, 0.9)
    assert ratio.median == 0.8
    assert ratio.low == 0.5
    assert ratio.high == 0.9


def test_a_target_never_reached_is_infinite_and_kept():
    assert paired_ratio([INF, 50, 60], [100, 100, 100]).ratios == (INF, 0.5, 0.6)
    assert paired_ratio([50], [INF]).median == 0.0
    assert paired_ratio([INF], [100]).median == INF
    both = paired_ratio([INF, 50], [INF, 100])
    assert both.ratios == (1.0, 0.5)
    assert both.neither == 1


@pytest.mark.parametrize(
    ("values", "want"), [([1, 2, 3], 2), ([1, 2], 1.5), ([1, INF], INF), ([1, 2, INF], 2), ([INF, INF], INF)]
)
def test_median(values, want):
    assert median(values) == want


def test_interval_covers_as_often_as_it_says():
    """Over many samples of 10 seeds, the 95 % interval holds the true median in roughly 95 % (bootstrap: a little less)."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        arm = 0.8 * np.exp(0.1 * rng.standard_normal(10))
        ratio = paired_ratio(arm.tolist(), [1.0] * 10)
        covered += ratio.low <= 0.8 <= ratio.high
    assert covered >= 85


@given(st.lists(st.tuples(costs, costs), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_interval_holds_the_median_and_equal_arms_are_equal(pairs):
    arm, base = zip(*pairs, strict=True)
    ratio = paired_ratio(arm, base)

    assert ratio.low <= ratio.median <= ratio.high
    assert paired_ratio(base, base).median == 1.0


def test_what_does_not_pair_up_is_refused():
    with pytest.raises(ValueError, match="must pair up, but have 1 and 2"):
        paired_ratio([1], [1, 2])
