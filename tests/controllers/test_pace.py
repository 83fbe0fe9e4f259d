"""The pace grows only when the norm is calm and the loss is falling, and never otherwise."""

import numpy as np
import pytest

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import CONTROLLERS, Observation
from hf_adaclip.controllers.ops import SCALAR


def paces(norms, losses, **settings):
    config = AdaptiveClipConfig(**{"max_pace": 4.0, "warmup_observations": 10, **settings})
    controller = CONTROLLERS["adaptive"].from_config(config)
    state, seen = controller.init(SCALAR, ()), []
    with np.errstate(all="ignore"):
        for norm, loss in zip(norms, losses, strict=True):
            observation = Observation(np.float32(norm), np.float32(loss), np.float32(1.0))
            decision, state = controller.update(state, observation)
            seen.append(float(decision.pace))
    return seen


CALM = np.full(200, 0.5)
FALLING = np.linspace(3, 1, 200)


def test_grows_by_its_factor_when_calm_and_progressing():
    seen = paces(CALM, FALLING)

    assert seen[9] == 1.0  # warm-up
    assert seen[20] == pytest.approx(seen[19] * 1.02, rel=1e-5)
    assert max(seen) == 4.0


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        (np.full(200, 2.0), "constant"),
        (np.linspace(1, 3, 200), "rising"),
        (np.full(200, np.nan), "unknown"),
        (np.full(200, np.inf), "infinite"),
    ],
)
def test_calm_norms_alone_are_not_progress(losses, why):
    assert set(paces(CALM, losses)) == {1.0}


def test_backs_off_on_a_spike_and_on_a_step_that_is_not_finite_and_never_below_one():
    norms = CALM.copy()
    norms[100], norms[150], norms[151:160] = 50.0, np.nan, np.nan
    seen = paces(norms, FALLING)

    assert seen[100] == pytest.approx(seen[99] * 0.7, rel=1e-5)
    assert seen[150] == pytest.approx(seen[149] * 0.7, rel=1e-5)
    assert seen[159] == 1.0


def test_off_means_exactly_one():
    assert set(paces(CALM, FALLING, max_pace=1.0)) == {1.0}
