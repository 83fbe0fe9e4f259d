"""States after steps that were left out: narrower and slower, on both kinds of numbers, and the same however often."""

from typing import Any

import numpy as np
import pytest
import torch

from hf_adaclip import CONTROLLERS, AdaptiveClipConfig
from hf_adaclip.controllers import Observation, build_controller
from hf_adaclip.controllers.numerics.ops import ARRAY, SCALAR, tensor_ops

WAYS: dict[str, dict[str, Any]] = {
    **{name: {"controller": name} for name, kind in CONTROLLERS.items() if not kind.fine},
    "pace": {"max_pace": 8.0, "pace_start": 2, "pace_trust": 1.0},
    "limits": {"max_pace": 8.0, "pace_start": 2, "pace_trust": 1.0, "max_widening_100": 2.0, "max_skipped": 5},
    "skip": {"on_spike": "skip"},
    "late": {"one_step_late": True},
    "rules": {"granularity": "tensor", "ceiling_share": 1.0, "parameter_rules": {"a": "median", "b": "exclude"}},
}
PARTS = [(None, 2), ("a", 1), ("b", 1)]


def learned(controller, ops, shape, steps=40):
    state = controller.init(ops, shape)
    draw = np.random.default_rng(0)
    with np.errstate(all="ignore"):
        for _ in range(steps):
            norm = ops.full(shape, float(np.float32(1 + 0.1 * draw.standard_normal())))
            nan = ops(float("nan"))
            seen = Observation(norm if shape else norm[()], nan, ops(1.5), reach=ops(6.0))
            _, state = controller.update(state, seen)
    return state


def numbers(state):
    return {name: np.asarray(value, dtype=np.float32) for name, value in zip(state._fields, state, strict=True)}


@pytest.mark.parametrize("name", WAYS)
def test_a_state_is_narrowed_once(name):
    config = AdaptiveClipConfig(**({} if name == "median" else {"warmup_observations": 5}), **WAYS[name])
    split = "parameter_rules" in WAYS[name]
    controller = build_controller(config, PARTS if split else ())
    found = []
    for ops in (ARRAY if split else SCALAR, tensor_ops(torch.device("cpu"))):
        state = learned(controller, ops, (4,) if split else ())
        once = controller.narrowed(state, ops)
        assert type(once) is type(state)
        twice = controller.narrowed(once, ops)
        before, after, again = map(numbers, (state, once, twice))
        for field in before:
            np.testing.assert_array_equal(after[field], again[field])
            if field.endswith("width"):
                assert (after[field] <= 4.5).all()
                assert (before[field] >= 5).all()
            elif field.endswith("pace"):
                assert (after[field] <= 1).all()
            else:
                np.testing.assert_array_equal(after[field], before[field])
        if name in ("pace", "limits"):
            assert before["pace"] > 1.5
        found.append(after)
    for field in found[0]:
        np.testing.assert_array_equal(found[0][field], found[1][field])


def test_what_is_frozen_keeps_range_and_pace():
    config = AdaptiveClipConfig(warmup_observations=5, freeze_after=20, max_pace=8.0, pace_start=2, pace_trust=1.0)
    controller = build_controller(config)
    state = learned(controller, SCALAR, ())
    assert numbers(controller.narrowed(state, SCALAR)) == numbers(state)
