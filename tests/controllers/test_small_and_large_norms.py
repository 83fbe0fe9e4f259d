"""A controller acts only where the norm is above its threshold: at any size of norms, and the reason is true beside the coefficient."""

import numpy as np
import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.controllers import CONTROLLERS, Observation, Reason, build_controller
from hf_adaclip.controllers.numerics.ops import SCALAR

RULES = [name for name, kind in CONTROLLERS.items() if not kind.fine]
OWN = [name for name in RULES if name != "static"]
SIZES = [1e-45, 1e-42, 1e-38, 1e-30, 1e-12, 1e-8, 1e-6, 0.5, 1e4, 2e19, 1e25, 1e36]


def drive(name, norms, static=3e38, **settings):
    """Norms, thresholds and coefficients after the warm-up, and the names of the reasons."""
    config = AdaptiveClipConfig(controller=name, granularity="global", **settings)
    controller, rows = build_controller(config), []
    state = controller.init(SCALAR, ())
    with np.errstate(all="ignore"):
        for norm in norms.astype(np.float32):
            decision, state = controller.update(state, Observation(norm, np.float32("nan"), np.float32(static)))
            rows.append((norm, decision.threshold, decision.coefficient, Reason(int(decision.reason)).name))
    norm, threshold, coefficient, reason = zip(*rows[50:], strict=True)
    return np.array(norm), np.array(threshold), np.array(coefficient), reason


def calm(steps=400):
    return np.exp(0.15 * np.random.default_rng(0).standard_normal(steps))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("on_spike", ["clip", "skip"])
def test_a_constant_norm_is_never_cut_or_left_out(name, size, on_spike):
    _, _, coefficient, _ = drive(name, np.full(400, size), on_spike=on_spike)
    assert set(coefficient) == {1.0}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("size", SIZES)
def test_only_what_is_above_the_threshold_is_cut_and_to_it(name, size):
    norms = calm() * size
    norms[[200, 300]] *= 30
    norm, threshold, coefficient, reason = drive(name, norms, on_spike="clip")
    assert ((coefficient < 1) == (norm > threshold)).all()
    left, wanted = (norm.astype(float) * coefficient)[coefficient < 1], threshold[coefficient < 1].astype(float)
    assert np.allclose(left, wanted, rtol=1e-6, atol=0)
    quiet = {"WITHIN", "WIDENED", "VANISHING", "NEW_LEVEL"}
    assert all((r in quiet) == (c == 1) for r, c in zip(reason, coefficient, strict=True))


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("size", [s for s in SIZES if s >= 1e-38])
def test_the_size_of_norms_makes_no_difference(name, size):
    usual = drive(name, calm(), on_spike="clip")[2]
    here = drive(name, calm() * size, on_spike="clip")[2]
    assert np.mean(here < 1) == pytest.approx(np.mean(usual < 1), abs=0.03)


def test_static_and_the_warm_up_keep_the_bits_of_torch():
    """Those of a norm a hair below the threshold too, which torch scales by as much."""
    for norm in (0.9999995, 0.9999999, 1.0, 1.5, 1e-7, 1e-45, 1e30):
        gradient = torch.nn.Parameter(torch.zeros(1))
        gradient.grad = torch.tensor([norm])
        torch.nn.utils.clip_grad_norm_([gradient], 1.0)
        for name in RULES:
            controller = build_controller(AdaptiveClipConfig(controller=name, granularity="global"))
            seen = Observation(np.float32(norm), np.float32("nan"), np.float32(1.0))
            with np.errstate(all="ignore"):
                decision, _ = controller.update(controller.init(SCALAR, ()), seen)
            assert np.float32(np.float32(norm) * decision.coefficient) == gradient.grad.numpy()[0], (name, norm)


def test_tensors_with_tiny_gradients_are_left_bit_for_bit():
    """A bias whose gradient is rounding noise, as the key biases of attention: per tensor nothing scales it."""
    big, tiny = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4))
    clipper = AdaptiveClipper(AdaptiveClipConfig(granularity="tensor", warmup_observations=20))
    rng = np.random.default_rng(0)
    for step in range(90):
        big.grad = torch.from_numpy(rng.normal(0, 0.1, 4).astype("f4"))
        tiny.grad = torch.from_numpy(rng.normal(0, 1e-9, 4).astype("f4"))
        before = tiny.grad.clone()
        clipper.clip_([big, tiny])
        assert torch.equal(tiny.grad, before) or step < 20 or float(before.norm()) > 2.5e-9, step
