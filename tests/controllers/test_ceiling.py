"""The static threshold as ceiling of the range: kept where it cut most of the warm-up, and nowhere else."""

import numpy as np
import pytest

from hf_adaclip.audit.gauntlet import CALM_LEVEL, NOISES
from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import CONTROLLERS, Observation, Reason
from hf_adaclip.controllers.ops import SCALAR

WARMUP = 20


def decide(norms, static, **settings):
    """All decisions on a series of norms: thresholds, coefficients, reasons."""
    config = AdaptiveClipConfig(warmup_observations=WARMUP, **settings)
    controller = CONTROLLERS[config.controller].from_config(config)
    state, decisions = controller.init(SCALAR, ()), []
    for norm in norms:
        observation = Observation(np.float32(norm), np.float32("nan"), np.float32(static))
        with np.errstate(invalid="ignore"):
            decision, state = controller.update(state, observation)
        decisions.append((decision.threshold, decision.coefficient, Reason(int(decision.reason)).name))
    thresholds, coefficients, reasons = zip(*decisions, strict=True)
    return np.array(thresholds), np.array(coefficients), np.array(reasons)


@pytest.fixture
def norms():
    return CALM_LEVEL * np.exp(NOISES["normal"](np.random.default_rng(0), 200))


def test_a_run_that_the_static_threshold_always_cuts_is_left_as_it_is(norms):
    """Bit for bit what `static` does: at the level, in a spike, in a lasting rise."""
    norms[100] *= 50
    norms[150:] *= 3
    thresholds, coefficients, reasons = decide(norms, CALM_LEVEL / 3)
    assert np.array_equal(coefficients, decide(norms, CALM_LEVEL / 3, controller="static")[1])
    assert (thresholds == np.float32(CALM_LEVEL / 3)).all()
    assert reasons[100] == "SPIKE"
    assert set(reasons[WARMUP:100]) == {"LIMIT_CEILING"}


def test_below_the_ceiling_the_range_goes_on_guarding(norms):
    norms[60:] *= 0.05
    norms[180] = CALM_LEVEL / 4  # five times the level by then, and still below the ceiling
    thresholds, coefficients, reasons = decide(norms, CALM_LEVEL / 3)
    assert thresholds[40] == np.float32(CALM_LEVEL / 3)
    assert reasons[180] == "SPIKE"
    assert norms[180] * coefficients[180] < 1.5 * 0.05 * CALM_LEVEL


def test_a_threshold_that_guards_only_is_given_up_after_the_warm_up(norms):
    norms[150:] *= 3
    found, always_open = (decide(norms, 2 * CALM_LEVEL, ceiling_share=share) for share in (0.5, 1.0))
    for one, other in zip(found, always_open, strict=True):
        assert np.array_equal(one, other)
    assert found[0][170] > 2 * CALM_LEVEL
    assert (found[1][160:] == 1).all()


@pytest.mark.parametrize(
    ("cut", "share", "held"), [(10, 0.5, False), (11, 0.5, True), (1, 0.0, True), (0, 0.0, False), (20, 1.0, False)]
)
def test_how_much_of_the_warm_up_counts_as_most(norms, cut, share, held):
    norms[:WARMUP] = np.where(np.arange(WARMUP) < cut, 1.3, 0.9) * CALM_LEVEL
    norms = np.insert(norms, 5, [np.nan, np.inf, 0.0])  # these are no observations
    thresholds, _, _ = decide(norms, 1.1 * CALM_LEVEL, ceiling_share=share)
    assert (thresholds[WARMUP + 3 :].max() <= np.float32(1.1 * CALM_LEVEL)) == held


def test_under_the_ceiling_spikes_are_skipped_and_the_rest_is_clipped(norms):
    norms[100] *= 50
    _, coefficients, reasons = decide(norms, CALM_LEVEL / 3)
    assert (coefficients[WARMUP:] < 1).all()
    assert (reasons == "SPIKE").sum() == 1, "what `on_spike='skip'` goes by"
