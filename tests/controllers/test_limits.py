"""Bounds that bound: for any stream and any combination of limits, in every phase and under every wrapper."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaclip import AdaptiveClipConfig
from hf_adaclip.controllers import CONTROLLERS, Observation, Reason, build_controller
from hf_adaclip.controllers.numerics.ops import ARRAY, SCALAR

RULES = [name for name, kind in CONTROLLERS.items() if not kind.fine]
NORM = (
    st.floats(0, 2.0**100, width=32) | st.floats(2.0**-7, 30, width=32) | st.just(float("nan")) | st.just(float("inf"))
)


@st.composite
def streams(draw):
    """Pieces of calm norms at any level, with anything in between; at most 300 steps."""
    pieces, rng = [], np.random.default_rng(draw(st.integers(0, 1000)))
    for _ in range(draw(st.integers(1, 6))):
        level, steps = 10.0 ** draw(st.integers(-3, 4)), draw(st.integers(1, 40))
        pieces.append(level * np.exp(0.2 * rng.standard_normal(steps)))
        pieces.append(np.array(draw(st.lists(NORM, max_size=3)), float))
    return np.concatenate(pieces).astype(np.float32)


def combinations():
    return st.fixed_dictionaries(
        {
            "controller": st.sampled_from(RULES),
            "on_spike": st.sampled_from(["clip", "skip"]),
            "freeze_after": st.none() | st.integers(0, 100),
            "max_widening_step": st.none() | st.sampled_from([1.0, 1.1]),
            "max_widening_100": st.none() | st.sampled_from([1.0, 2.0]),
            "max_skipped": st.none() | st.just(2),
            "divergence_spreads": st.sampled_from([0.0, 3.0]),
            "max_pace": st.sampled_from([1.0, 4.0]),
        }
    )


def build(chosen, **more):
    if chosen["controller"] != "adaptive":
        chosen = {**chosen, "max_pace": 1.0}
    trouble = chosen["max_skipped"] is not None or chosen["divergence_spreads"] > 0
    policy = "fallback" if trouble else "continue"
    return AdaptiveClipConfig(
        **{**chosen, "granularity": "global", "warmup_observations": 20, "on_trouble": policy, **more}
    )


def drive(config, norms, static, shape=(), parts=()):
    controller = build_controller(config, parts)
    ops = ARRAY if shape else SCALAR
    state, rows = controller.init(ops, shape), []
    with np.errstate(all="ignore"):
        for i, norm in enumerate(norms):
            value = np.full(shape, norm, np.float32) if shape else np.float32(norm)
            loss, reach = np.float32(2.0 if i < 60 else 50.0), np.float32(5.0)
            seen = Observation(value, loss, np.float32(static), reach=reach if not shape else np.full(shape, reach))
            decision, state = controller.update(state, seen)
            rows.append(decision)
    return rows


@given(norms=streams(), chosen=combinations(), static=st.sampled_from([0.1, 1.0, 50.0]), late=st.booleans())
@settings(max_examples=120, deadline=None)
def test_floor_and_ceiling_hold_in_every_step(norms, chosen, static, late):
    """The warm-up, a fallback, a freeze, a threshold that is one step late: none is an exception."""
    more = {"one_step_late": True, "on_spike": "clip", "max_pace": 1.0} if late else {}
    config = build(chosen, min_threshold=0.5, max_threshold=5.0, **more)
    for norm, decision in zip(norms, drive(config, norms, static), strict=True):
        assert 0.5 <= decision.threshold <= 5.0
        if np.isfinite(norm):
            assert norm * decision.coefficient <= 5.0 * (1 + 1e-6)
            assert not (norm <= 0.4999 and decision.coefficient < 1) or decision.coefficient == 0


@given(norms=streams(), chosen=combinations(), factor=st.sampled_from([1.0, 1.05, 2.0]))
@settings(max_examples=80, deadline=None)
def test_within_any_100_steps_the_threshold_grows_by_no_more_than_allowed(norms, chosen, factor):
    config = build({**chosen, "max_widening_100": factor})
    rows = drive(config, norms, 1.0)
    counts = [
        (i, float(d.threshold))
        for i, (norm, d) in enumerate(zip(norms, rows, strict=True))
        if np.isfinite(norm) and Reason(int(d.reason)) not in (Reason.SPIKE, Reason.WARMUP, Reason.SKIPPED)
        and d.threshold > 0
    ]  # fmt: skip
    quiet = [(i, t) for i, t in counts if rows[i].coefficient == 1]
    for i, a in quiet:
        for j, b in quiet:
            if i < j <= i + 100 and rows[i].reason != Reason.FALLBACK:
                assert b <= a * factor * (1 + 1e-5), (i, j)


@pytest.mark.parametrize("start", [150, 190, 199, 233, 300])
def test_widening_does_not_depend_on_where_a_hundred_begins(start):
    norms = np.exp(0.15 * np.random.default_rng(0).standard_normal(start + 150))
    norms[start:] *= 20
    rows = drive(AdaptiveClipConfig(max_widening_100=2.0), norms, 1e9)
    edges = [(i, float(d.threshold)) for i, d in enumerate(rows) if i >= 60 and d.reason != Reason.SPIKE]
    assert max(b / a for i, a in edges for j, b in edges if i < j <= i + 100) <= 2.0 * (1 + 1e-5)


@pytest.mark.parametrize("bad", [np.nan, 1e4])
def test_a_step_that_was_left_out_does_not_lift_the_limit_of_the_next(bad):
    norms = np.exp(0.05 * np.random.default_rng(0).standard_normal(300))
    norms[100:110], norms[110:] = bad, norms[110:] * 4
    rows = drive(AdaptiveClipConfig(max_widening_step=1.02, on_spike="skip"), norms, 1e9)
    cut_back = (Reason.SPIKE, Reason.SKIPPED)
    edges = [
        float(d.threshold) for n, d in zip(norms, rows, strict=True) if np.isfinite(n) and d.reason not in cut_back
    ]
    assert max(b / a for a, b in itertools.pairwise(edges[50:])) <= 1.02 * (1 + 1e-5)
    assert edges[-1] > 2 * edges[60], "and it does go on"


def test_limits_of_some_parameters_hold_for_them():
    config = AdaptiveClipConfig(
        granularity="tensor", parameter_rules={"b.*": {"max_threshold": 2.0, "static_threshold": 9.0}}
    )
    norms = 8 * np.exp(0.1 * np.random.default_rng(0).standard_normal(200))
    for norm, decision in zip(norms, drive(config, norms, 50.0, (3,), ((None, 1), ("b.*", 2))), strict=True):
        assert (decision.threshold[1:] <= 2.0).all()
        assert (norm * decision.coefficient[1:] <= 2.0 * (1 + 1e-6)).all()
        assert decision.coefficient[0] == 1


def test_after_a_fallback_the_static_threshold_is_kept_within_the_limits():
    norms = 3 * np.exp(0.15 * np.random.default_rng(0).standard_normal(300))
    norms[100:105] = np.nan
    norms[200] = 40.0
    settings_ = {"max_skipped": 3, "on_trouble": "fallback", "max_threshold": 5.0, "max_widening_step": 1.5}
    rows = drive(AdaptiveClipConfig(**settings_), norms, 50.0)
    assert Reason(int(rows[250].reason)) is Reason.FALLBACK
    assert 40 * rows[200].coefficient <= 5.0 * (1 + 1e-6)
