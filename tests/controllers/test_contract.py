"""What holds for every controller of the registry, whatever it does."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import CONTROLLERS, Observation, Reason, build_controller
from hf_adaclip.controllers.numerics.ops import ARRAY, SCALAR
from hf_adaclip.ledger.records import state_bytes, state_from_json, state_to_json
from tests.cases import CASES
from tests.streams import eventful, losses

NAN = np.float32("nan")
STATIC = np.float32(0.25)


def controller_of(case):
    return AdaptiveClipConfig(controller=case.name, **case.settings).settings


def drive(controller, norms, state, loss=None, static=STATIC):
    decisions = []
    with np.errstate(all="ignore"):
        for i, norm in enumerate(norms):
            seen = Observation(np.float32(norm), NAN if loss is None else loss[i], static)
            decision, state = controller.update(state, seen)
            decisions.append(decision)
    return decisions, state


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("cut", [1, 30, 131, 399])
def test_a_prefix_and_the_rest_are_the_whole(case, cut, rng):
    """Stopped anywhere and gone on with from JSON, the decisions are those of the run that was not stopped, bit for bit."""
    norms, loss = eventful(rng), losses(rng)
    controller = controller_of(case)
    whole, end = drive(controller, norms, controller.init(SCALAR, ()), loss)
    first, middle = drive(controller, norms[:cut], controller.init(SCALAR, ()), loss)
    restored = state_from_json(controller, json.loads(json.dumps(state_to_json(middle))), SCALAR, ())
    rest, stopped_end = drive(controller, norms[cut:], restored, loss[cut:])

    assert np.array_equal(np.array(whole, np.float32), np.array([*first, *rest], np.float32), equal_nan=True)
    assert state_bytes(end) == state_bytes(stopped_end)


@pytest.mark.parametrize("case", [c for c in CASES if c.scale_free], ids=lambda c: c.id)
@given(power=st.integers(-12, 12), seed=st.integers(0, 10))
@settings(max_examples=10, deadline=None)
def test_the_unit_of_the_norm_does_not_matter(case, power, seed):
    """All norms and the static threshold times a power of two: the same coefficients, and thresholds times as much."""
    norms = eventful(np.random.default_rng(seed))[:299]
    controller, factor = controller_of(case), np.float32(2.0**power)
    here, _ = drive(controller, norms, controller.init(SCALAR, ()))
    there, _ = drive(controller, norms * factor, controller.init(SCALAR, ()), static=STATIC * factor)
    for i, (a, b) in enumerate(zip(here, there, strict=True)):
        if not math.isfinite(norms[i]) or norms[i] < 0.01 or norms[i] * factor < 0.01:
            continue  # 1e-6 is added to the norm, as torch does
        assert b.threshold == pytest.approx(float(a.threshold * factor), rel=case.rtol), i
        assert b.coefficient == pytest.approx(float(a.coefficient), rel=max(case.rtol, 2e-4)), i
        assert b.reason == a.reason, i


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_one_tensor_per_tensor_is_the_global_rule(case, rng):
    norms = eventful(rng)
    controller = controller_of(case)
    alone, _ = drive(controller, norms, controller.init(SCALAR, ()))
    state = controller.init(ARRAY, (1,))
    with np.errstate(all="ignore"):
        for norm, want in zip(norms, alone, strict=True):
            got, state = controller.update(state, Observation(np.array([norm]), NAN, STATIC))
            assert [float(v[0]) for v in got] == pytest.approx([float(v) for v in want], rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_and_zeros_teach_nothing(case, bad, rng):
    """Two runs, one with bad norms strewn in: the other decisions are the same."""
    if case.settings.get("max_pace"):
        pytest.skip("the pace backs off after a step that was left out, which is meant")
    norms = [float(n) for n in np.abs(rng.normal(0.3, 0.05, 200)) + 0.01]
    controller = controller_of(case)
    clean, end = drive(controller, norms, controller.init(SCALAR, ()))
    strewn = [v for n in norms for v in (n, bad)]
    dirty, dirty_end = drive(controller, strewn, controller.init(SCALAR, ()))

    assert np.array_equal(np.array(clean, np.float32), np.array(dirty[::2], np.float32), equal_nan=True)
    assert state_bytes(end) == state_bytes(dirty_end)
    assert {Reason(int(d.reason)) for d in dirty[1::2]} == {Reason.NONFINITE}
    assert {float(d.coefficient) for d in dirty[1::2]} == {1.0}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_a_clipped_gradient_is_not_clipped_again(case, rng):
    """Asked a second time from the same state about what it left, a controller leaves it, but for rounding."""
    controller = controller_of(case)
    state = controller.init(SCALAR, ())
    for norm in eventful(rng)[:299]:
        with np.errstate(all="ignore"):
            first, after = controller.update(state, Observation(np.float32(norm), NAN, STATIC))
            if np.isfinite(norm):
                left = np.float32(norm * first.coefficient)
                second, _ = controller.update(state, Observation(left, NAN, STATIC))
                assert second.coefficient >= 1 - 1e-4 or case.name == "zscore"  # which judges the smaller z anew
        state = after


def test_every_controller_says_what_it_is():
    for name, kind in CONTROLLERS.items():
        assert kind.idea
        assert kind.source
        assert kind.choose
        module = __import__(kind.__module__, fromlist=["x"])
        assert module.__doc__.startswith(f"`{name}`"), name
        assert "Source:" in module.__doc__, name
        assert "Differs from" in module.__doc__ or "this package" in module.__doc__, name


@pytest.mark.parametrize("name", [n for n, k in CONTROLLERS.items() if not k.fine])
def test_a_skip_is_a_cut_with_another_consequence(name, rng):
    clip = build_controller(AdaptiveClipConfig(controller=name, granularity="global", on_spike="clip"))
    skip = build_controller(AdaptiveClipConfig(controller=name, granularity="global", on_spike="skip"))
    cut, end = drive(clip, eventful(rng), clip.init(SCALAR, ()))
    skipped, skip_end = drive(skip, eventful(np.random.default_rng(0)), skip.init(SCALAR, ()))
    cut, end = drive(clip, eventful(np.random.default_rng(0)), clip.init(SCALAR, ()))

    assert state_bytes(end) == state_bytes(skip_end)
    some = 0
    for a, b in zip(cut, skipped, strict=True):
        assert a.threshold == b.threshold or np.isnan(a.threshold)
        if Reason(int(a.reason)) in (Reason.CLIPPED, Reason.SPIKE) and a.coefficient < 1:
            assert (float(b.coefficient), Reason(int(b.reason))) == (0.0, Reason.SKIPPED)
            some += 1
        else:
            assert (a.coefficient, a.reason) == (b.coefficient, b.reason)
    assert some > 0


def test_rules_from_lingvo_and_olmo_skip_and_the_others_clip():
    skipping = {
        n
        for n in CONTROLLERS
        if type(build_controller(AdaptiveClipConfig(controller=n))).__name__ == "SkippingController"
    }
    assert skipping == {"log_zscore", "mean_sd"}
