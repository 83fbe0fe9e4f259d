"""The trend of the loss: equal to its reference, alike in all lanes, and what the divergence guard makes of it."""

from typing import Any

import numpy as np
import pytest
import torch

from hf_adaclip import AdaptiveClipConfig
from hf_adaclip.controllers import Observation, Reason, build_controller
from hf_adaclip.controllers.numerics.ops import ARRAY, SCALAR, tensor_ops
from hf_adaclip.controllers.numerics.trend import LossTrend, far_from_best, follow_loss
from tests.reference.trend import TrendReference

SEEDS, STEPS = 100, 2000
STEP = np.arange(STEPS)[:, None]


def noise(sd, seed=0):
    return sd * np.random.default_rng(seed).standard_normal((STEPS, SEEDS))


def alarms(losses, **settings):
    """The first step of trouble in every column, inf where there is none."""
    config = AdaptiveClipConfig(controller="static", divergence_spreads=6.0, **settings)
    controller, n = build_controller(config), losses.shape[1]
    # One column a tensor: the guard is elementwise, but for the loss, which is one for all; here every tensor is given its own.
    state, found = controller.init(ARRAY, (n,)), np.full(n, np.inf)
    norm, static = np.ones(n, np.float32), np.float32(10.0)
    with np.errstate(all="ignore"):
        for i, loss in enumerate(losses.astype(np.float32)):
            decision, state = controller.update(state, Observation(norm, loss, static))
            trouble: Any = decision.reason == float(Reason.TROUBLE_DIVERGENCE)
            found = np.where(trouble & np.isinf(found), i, found)
    return found


def healthy():
    rng = np.random.default_rng(1)
    uniform = rng.random((STEPS, SEEDS))
    bursts = 2 + noise(0.05, 2)
    for start in range(300, 1900, 100):
        bursts[start : start + 15] *= 3
    long_burst = 2 + noise(0.05, 3)
    long_burst[700:740] *= 1e6
    restarts = (1 + 0.15 * np.exp(-(STEP % 500) / 150)) * (1.5 + np.exp(-STEP / 400)) + noise(0.05, 4)
    unknown = 2 + noise(0.05, 5)
    unknown[uniform < 0.3] = np.nan
    unknown[uniform > 0.99] = np.inf
    return {
        "falls": (0.5 + 2 * np.exp(-STEP / 300)) * np.exp(noise(0.3, 6)),
        "plateau": 2 + noise(0.6, 7),
        "heavy tails": 2 + 0.1 * rng.standard_t(3, (STEPS, SEEDS)),
        "very heavy tails": 2 + np.abs(0.05 * rng.standard_t(1, (STEPS, SEEDS))),
        "bursts": bursts,
        "a long burst": long_burst,
        "restarts": restarts,
        "two tasks": np.where(uniform < 0.5, 1, 10) * np.exp(noise(0.1, 8)),
        "a rare task": np.where(uniform < 0.05, 10, 1) * np.exp(noise(0.1, 9)),
        "blocks of tasks": np.where(STEP // 30 % 2, 5, 1) * np.exp(noise(0.1, 10)),
        "around zero": noise(1.0, 11),
        "constant": np.full((STEPS, SEEDS), 0.7),
        "zero": np.zeros((STEPS, SEEDS)),
        "unknown in between": unknown,
    }


@pytest.mark.parametrize("story", healthy())
def test_no_false_alarm_in_100_runs(story):
    assert np.isinf(alarms(healthy()[story])).all()


@pytest.mark.parametrize("sd", [0.02, 0.2])
@pytest.mark.parametrize("rate", [0.002, 0.01, 0.02, 0.05, 0.1])
@pytest.mark.parametrize("wider", [False, True], ids=["", "noise grows too"])
def test_a_loss_that_grows_exponentially_is_trouble(sd, rate, wider):
    growth = np.minimum((1 + rate) ** np.maximum(STEP - 400.0, 0), 1e30)
    losses = 2 * growth * np.exp(noise(sd / 2)) if wider else 2 * growth + noise(sd)
    found = alarms(losses[:, :20])
    assert (found >= 400).all()
    assert (found < 400 + 50 + 0.5 / rate + 60).all()


@pytest.mark.parametrize("shape", ["jump x2", "jump x10", "linear"])
def test_so_is_a_lasting_jump_and_a_slow_rise(shape):
    rise = {"jump x2": 2.0, "jump x10": 18.0}.get(shape, 0.003 * (STEP - 400))
    found = alarms((2 + noise(0.1) + np.where(STEP > 400, rise, 0))[:, :20])
    assert ((found > 400) & (found < 800)).all()


def test_losses_that_are_not_finite_teach_nothing_and_forget_nothing():
    losses = np.where(STEP > 400, 20.0, 2.0) + noise(0.05)
    strewn = losses.copy()
    strewn[401::2] = np.nan  # every second one: noticed after as many known ones
    a, b = alarms(losses[:, :5]), alarms(strewn[:, :5])
    assert (a < 460).all()
    assert (b < 520).all()
    assert np.isfinite(b).all()


def test_the_trend_is_that_of_the_reference_in_every_lane():
    losses = np.concatenate([2 + noise(0.2)[:300, 0], 2 * 1.01 ** np.arange(200), [np.nan, np.inf, 1e30], np.ones(50)])
    ops, reference = tensor_ops(torch.device("cpu")), TrendReference(6.0, 0.2)
    scalar, tensor = LossTrend(*(np.float32(0),) * 4), LossTrend(*(torch.tensor(0.0),) * 4)
    with np.errstate(all="ignore"):
        for loss in losses.astype(np.float32):
            scalar = follow_loss(scalar, loss, 6.0, 0.2, SCALAR)
            tensor = follow_loss(tensor, torch.tensor(loss), 6.0, 0.2, ops)
            reference.learn(float(loss))
            assert [np.float32(a).tobytes() for a in scalar] == [np.asarray(b).tobytes() for b in tensor]
            assert scalar.mean == pytest.approx(reference.mean, rel=1e-4)
            assert scalar.spread == pytest.approx(reference.spread, rel=1e-3)
            assert bool(far_from_best(scalar, 6.0, 0.2, SCALAR)) == reference.far()
