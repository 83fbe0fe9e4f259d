"""The pace: a start, the given rate where the estimate is near it, the estimate where it is far above."""

import itertools

import numpy as np
import pytest

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import Observation
from hf_adaclip.controllers.numerics.ops import SCALAR


def paces(reaches, norms=None, losses=None, **settings):
    config = AdaptiveClipConfig(**{"max_pace": 16.0, "warmup_observations": 10, "pace_start": 20, **settings})
    controller = config.settings
    state, seen = controller.init(SCALAR, ()), []
    norms = np.full(len(reaches), 0.5) if norms is None else norms
    losses = np.full(len(reaches), 2.0) if losses is None else losses
    with np.errstate(all="ignore"):
        for norm, loss, reach in zip(norms, losses, reaches, strict=True):
            observation = Observation(np.float32(norm), np.float32(loss), np.float32(1.0), reach=np.float32(reach))
            decision, state = controller.update(state, observation)
            seen.append(float(decision.pace))
    return seen


@pytest.mark.parametrize("reach", [np.nan, np.inf, -5.0, 0.0, 0.3, 2.9], ids=str)
def test_below_the_zone_of_trust_there_is_a_linear_start_and_then_exactly_one(reach):
    seen = paces(np.full(100, reach))
    assert seen[:20] == pytest.approx(np.arange(1, 21) / 20)
    assert set(seen[20:]) == {1.0}


def test_above_it_the_pace_climbs_by_its_factor_to_the_estimate_and_no_further_than_allowed():
    seen = paces(np.full(200, 6.0))
    assert seen[24] == pytest.approx(min(6.0, seen[23] * 1.25), rel=1e-5)
    assert seen[-1] == pytest.approx(6.0)
    assert all(
        b <= a * 1.25 * (1 + 1e-6) or b <= (i + 2) / 20 + 1e-6 for i, (a, b) in enumerate(itertools.pairwise(seen))
    )
    assert max(paces(np.full(200, 1000.0))) == 16.0


def test_what_is_learned_by_heart_takes_the_pace_back_at_once_and_forgets_the_best():
    seen = paces([*np.full(100, 9.0), -np.inf, *np.full(50, 1.0), *np.full(50, 9.0)])
    assert seen[99] == pytest.approx(9.0)
    assert set(seen[100:151]) == {1.0}
    assert seen[151] == pytest.approx(1.25)
    early = paces([*np.full(5, 9.0), -np.inf, *np.full(20, 1.0)])
    assert early[5] == pytest.approx(6 / 20)  # the start goes on


def test_an_estimate_that_falls_takes_the_pace_back_to_a_third_of_the_best():
    seen = paces([*np.full(100, 9.0), *np.full(100, -1.0)])
    assert seen[99] == pytest.approx(9.0)
    assert seen[100] == pytest.approx(9.0 * 0.95, rel=1e-5)
    assert seen[-1] == pytest.approx(3.0)
    assert paces([*np.full(100, 9.0), *np.full(100, -1.0)], pace_hold=0.0)[-1] == 1.0


@pytest.mark.parametrize(
    ("best", "then", "ends"), [(4.0, 2.2, 2.2), (4.0, 0.2, 4 / 3), (3.1, -5.0, 3.1 / 3), (2.9, 2.2, 1.0)]
)
def test_once_the_estimate_was_trusted_the_pace_follows_it_below_the_zone_too(best, then, ends):
    """Else a third of all bests below 9 would be 1."""
    seen = paces([*np.full(100, best), *np.full(150, then)])
    assert seen[-1] == pytest.approx(ends)


def falling(to, steps=200):
    """Losses around 2 that fall to `to` within 20 steps, and stay there."""
    return np.concatenate([np.full(100, 2.0), np.linspace(2.0, to, 20), np.full(steps - 120, to)])


@pytest.mark.parametrize(("to", "ends"), [(0.11, 16.0), (0.09, 1.0), (0.0, 1.0), (-3.0, 1.0)])
def test_where_little_is_left_to_learn_the_given_rate_counts_for_good(to, ends):
    assert paces(np.full(500, 16.0), losses=falling(to, 500))[-1] == pytest.approx(ends)
    back = np.concatenate([falling(to, 500), np.full(100, 2.0)])  # it has gone up again
    assert paces(np.full(600, 16.0), losses=back)[-1] == pytest.approx(ends)


@pytest.mark.parametrize("level", [0.0, -2.0])
def test_of_losses_that_begin_at_0_or_below_their_level_says_nothing(level):
    assert paces(np.full(300, 16.0), losses=np.full(300, level))[-1] == pytest.approx(16.0)


def test_backs_off_on_a_spike_and_on_a_step_that_is_not_finite_and_never_below_its_floor():
    norms = np.full(300, 0.5)
    norms[100], norms[150], norms[151:250] = 50.0, np.nan, np.nan
    seen = paces(np.full(300, 6.0), norms)

    assert seen[100] == pytest.approx(seen[99] * 0.95, rel=1e-5)
    assert seen[150] == pytest.approx(seen[149] * 0.95, rel=1e-5)
    assert seen[249] == 1.0


def test_steps_that_are_left_out_do_not_count_for_the_start():
    norms = np.full(40, 0.5)
    norms[5:15] = np.nan
    seen = paces(np.full(40, np.nan), norms)
    assert seen[4] == seen[14] == pytest.approx(0.25)
    assert seen[15] == pytest.approx(0.3)


def test_off_means_exactly_one():
    assert set(paces(np.full(200, 50.0), max_pace=1.0)) == {1.0}
