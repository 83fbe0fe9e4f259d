"""Limits, freeze and policies: what they hold the controller to, alike in all three kinds of numbers, and in the ledger."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, TrainingTroubleError
from hf_adaclip.audit import verify_ledger
from hf_adaclip.controllers import Observation, Reason, build_controller
from hf_adaclip.controllers.base import Controller
from hf_adaclip.controllers.numerics.ops import ARRAY, SCALAR, tensor_ops
from hf_adaclip.controllers.wrappers.limits import GovernedController
from tests.loops import make, train
from tests.streams import eventful, losses

BASE: dict[str, Any] = {"warmup_observations": 20, "static_threshold": 10.0}
EVERYTHING: dict[str, Any] = {
    **BASE,
    "max_pace": 3.0,
    "freeze_after": 250,
    "min_threshold": 0.2,
    "max_threshold": 1.5,
    "max_widening_step": 1.05,
    "max_widening_100": 1.5,
    "max_skipped": 2,
    "divergence_spreads": 6.0,
    "divergence_steps": 20,
    "on_trouble": "fallback",
}


def drive(config, norms, loss=None, reach=None):
    """Decisions as arrays by name, reasons by name, and the states."""
    controller = build_controller(config)
    state, rows, states = controller.init(SCALAR, ()), [], []
    loss = np.full(len(norms), np.nan) if loss is None else loss
    reach = np.full(len(norms), np.nan) if reach is None else reach
    static = np.float32(config.static_threshold)
    with np.errstate(all="ignore"):
        for norm, value, way in zip(norms, loss, reach, strict=True):
            seen = Observation(np.float32(norm), np.float32(value), static, reach=np.float32(way))
            decision, state = controller.update(state, seen)
            rows.append([float(v) for v in decision])
            states.append(state)
    threshold, coefficient, pace, reason = np.array(rows).T
    return threshold, coefficient, pace, [Reason(int(r)).name for r in reason], states


def calm(steps, seed=0, level=1.0):
    return level * np.exp(0.1 * np.random.default_rng(seed).standard_normal(steps))


def test_without_a_limit_there_is_no_wrapper():
    assert not isinstance(build_controller(AdaptiveClipConfig()), GovernedController)
    assert isinstance(build_controller(AdaptiveClipConfig(max_threshold=1.0)), GovernedController)


def test_limits_that_are_never_reached_change_nothing():
    norms, loss = eventful(np.random.default_rng(0)), losses(np.random.default_rng(1))
    free = AdaptiveClipConfig(max_pace=3.0, **BASE)
    held = free.replace(max_threshold=1e9, min_threshold=1e-9, max_widening_step=1e6, max_skipped=100)
    a, b = drive(free, norms, loss), drive(held, norms, loss)

    for x, y in zip(a[:3], b[:3], strict=True):
        np.testing.assert_array_equal(x, y)
    assert a[3] == b[3]


def test_floor_and_ceiling_hold_always_and_are_named():
    norms = np.concatenate([calm(200), calm(100, 1, 0.01), calm(100, 2, 100.0)])
    config = AdaptiveClipConfig(min_threshold=0.5, max_threshold=3.0, **BASE)
    threshold, coefficient, _, reasons, _ = drive(config, norms)

    assert threshold.min() >= 0.5
    assert threshold.max() <= 3.0
    assert (norms * coefficient).max() <= 3.0 * 1.0001
    assert "LIMIT_FLOOR" in reasons[210:]
    assert "LIMIT_CEILING" in reasons[:10]  # the warm-up's static threshold is above the ceiling
    assert {"LIMIT_CEILING"} == set(reasons[330:])


@pytest.mark.parametrize(("field", "value", "span"), [("max_widening_step", 1.02, 1), ("max_widening_100", 1.3, 100)])
def test_the_threshold_never_widens_faster_than_allowed(field, value, span):
    norms = np.concatenate([calm(300), calm(500, 1, 8.0)])
    free = drive(AdaptiveClipConfig(**BASE), norms)
    threshold, _, _, reasons, _ = drive(AdaptiveClipConfig(**BASE, **{field: value}), norms)
    quiet = np.array([i for i, r in enumerate(reasons) if i >= 20 and r != "SPIKE"])
    before = threshold[20:300].max()

    assert free[0][320:].max() > 3 * before  # without the limit the new level is accepted
    if span == 1:
        assert (threshold[quiet][1:] / threshold[quiet][:-1]).max() <= value * 1.0001
    else:
        blocks = 1 + (quiet - 299).clip(0) // 100  # since the rise began
        assert (threshold[quiet] <= before * value**blocks * 1.0001).all()
    assert "LIMIT_WIDENING" in reasons[300:]


def test_frozen_the_range_stays_and_spikes_are_still_cut():
    norms = np.concatenate([calm(200), calm(200, 1, 1.3)])
    norms[300] = 50.0
    threshold, coefficient, pace, reasons, states = drive(
        AdaptiveClipConfig(freeze_after=150, max_pace=4.0, **BASE), norms, reach=np.linspace(2, 8, 400)
    )

    assert len(set(threshold[150:300])) == 1
    assert len(set(pace[150:])) == 1
    assert pace[150] == pace[149] > 1
    assert states[150][:6] == states[399][:6]
    assert coefficient[300] < 0.05
    assert set(reasons[150:200]) == {"FROZEN"}


def test_the_budget_of_skipped_steps_and_the_fallback():
    norms = calm(200)
    norms[[50, 60, 70, 80]] = np.nan
    threshold, coefficient, pace, reasons, _ = drive(
        AdaptiveClipConfig(max_skipped=3, on_trouble="fallback", max_pace=3.0, **{**BASE, "static_threshold": 0.5}),
        norms,
        np.linspace(3, 1, 200),
    )

    assert reasons[80] == "TROUBLE_BUDGET"
    assert set(reasons[81:]) == {"FALLBACK"}
    assert set(threshold[81:]) == {0.5}
    assert set(pace[80:]) == {1.0}
    assert (norms[81:] * coefficient[81:]).max() <= 0.5


def test_divergence_is_a_loss_that_stays_far_above_its_best():
    config = AdaptiveClipConfig(divergence_spreads=5.0, divergence_steps=20, **BASE)
    loss = np.concatenate([np.linspace(3, 1, 150), np.linspace(1, 30, 100)])
    loss += 0.01 * np.random.default_rng(0).standard_normal(250)
    *_, reasons, _ = drive(config, calm(250), loss)
    *_, healthy, _ = drive(config, calm(250), np.concatenate([loss[:150], loss[149:150].repeat(100)]))
    spike = loss[:150].copy()
    spike[100] = 50.0
    *_, one_bad_batch, _ = drive(config, calm(150), spike)

    assert next(i for i, r in enumerate(reasons) if r == "TROUBLE_DIVERGENCE") in range(170, 230)
    assert 1 <= reasons.count("TROUBLE_DIVERGENCE") <= 4  # said again after every further 20 steps
    assert "TROUBLE_DIVERGENCE" not in healthy
    assert "TROUBLE_DIVERGENCE" not in one_bad_batch


def test_a_threshold_that_is_no_number_is_trouble():
    class Broken(Controller[Any]):
        def init(self, ops, shape):
            return build_controller(AdaptiveClipConfig(controller="static")).init(ops, shape)

        def update(self, state, observation):
            inner = build_controller(AdaptiveClipConfig(controller="static"))
            decision, state = inner.update(state, observation)
            return decision._replace(threshold=np.float32("nan")), state

    controller = GovernedController(inner=Broken(), fallback=True)
    state = controller.init(SCALAR, ())
    seen = Observation(np.float32(2.0), np.float32("nan"), np.float32(1.0))
    first, state = controller.update(state, seen)
    second, state = controller.update(state, seen)

    assert Reason(int(first.reason)) is Reason.TROUBLE_STATISTICS
    assert Reason(int(second.reason)) is Reason.FALLBACK
    assert second.threshold == 1.0
    assert second.coefficient == pytest.approx(0.5, rel=1e-5)


def test_tensors_arrays_and_scalars_are_governed_alike_bit_for_bit():
    config = AdaptiveClipConfig(**EVERYTHING)
    controller, ops = build_controller(config), tensor_ops(torch.device("cpu"))
    scalar, array, tensor = controller.init(SCALAR, ()), controller.init(ARRAY, (1,)), controller.init(ops, ())
    reasons = set()
    with np.errstate(all="ignore"):
        for norm, loss in zip(eventful(np.random.default_rng(3)), losses(np.random.default_rng(4)), strict=True):
            a, scalar = controller.update(scalar, Observation(norm, loss, np.float32(10.0)))
            b, array = controller.update(array, Observation(np.array([norm]), loss, np.float32(10.0)))
            c, tensor = controller.update(
                tensor, Observation(torch.tensor(norm), torch.tensor(loss), torch.tensor(10.0))
            )
            reasons.add(Reason(int(a.reason)).name)
            for x, y, z in zip(a, b, c, strict=True):
                assert np.float32(x).tobytes() == np.float32(y[0]).tobytes() == np.float32(float(z)).tobytes()
            for x, z in zip(scalar, tensor, strict=True):
                assert np.array_equal(x, z.numpy(), equal_nan=True)
    assert {"LIMIT_CEILING", "TROUBLE_BUDGET", "FALLBACK", "NONFINITE"} <= reasons


@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_a_governed_run_verifies_and_resumes(tmp_path, granularity):
    wide = {"min_threshold": None, "max_threshold": None, "max_widening_step": None, "max_widening_100": 100.0}
    config = AdaptiveClipConfig(granularity=granularity, **{**EVERYTHING, **wide, "freeze_after": 60})
    faults = {30: 80.0, 40: float("nan"), 50: float("nan")}
    model, optimizer = make()
    clipper = AdaptiveClipper(config, optimizer=optimizer, ledger=tmp_path / "l.jsonl")
    train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), 45, factors=faults)
    clipper.save_state(tmp_path)
    clipper.close()
    again = AdaptiveClipper(config, optimizer=optimizer, ledger=tmp_path / "l.jsonl")
    assert again.load_state(tmp_path)
    train(model, optimizer, lambda m, loss: again.clip_(m.parameters(), loss=loss), 45, start=45, factors=faults)
    again.close()
    report = verify_ledger(tmp_path / "l.jsonl")

    assert report.ok, report.findings
    assert report.recomputed == 90
    reasons = [json.loads(line).get("reason") for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert "FROZEN" in reasons


def test_stop_ends_a_loop_with_an_error_that_says_where(tmp_path):
    config = AdaptiveClipConfig(max_skipped=1, on_trouble="stop", ring_capacity=8)
    model, optimizer = make()
    clipper = AdaptiveClipper(config, optimizer=optimizer, ledger=tmp_path / "l.jsonl")
    bad = {10: float("nan"), 20: float("nan")}
    with pytest.raises(TrainingTroubleError, match=r"than `max_skipped` allows. It was found at step 20") as caught:
        train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters()), 60, factors=bad)

    assert caught.value.step == 20
    clipper.close(clean=False)
    assert verify_ledger(tmp_path / "l.jsonl").ok
