"""One step late: against the slow references, which know nothing of it."""

import copy
import math

import numpy as np
import pytest

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import Observation, Reason, build_controller
from hf_adaclip.controllers.numerics.ops import SCALAR
from hf_adaclip.controllers.wrappers.delayed import LateController
from tests.cases import CASES
from tests.streams import eventful, losses

STATIC = 0.25


@pytest.mark.parametrize("case", [c for c in CASES if not c.settings.get("max_pace")], ids=lambda c: c.id)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_applied_was_known_before_and_what_is_learned_is_the_same(case, seed):
    rng = np.random.default_rng(seed)
    config = AdaptiveClipConfig(
        controller=case.name,
        static_threshold=STATIC,
        one_step_late=True,
        warmup_observations=20,
        on_spike="clip",
        granularity="global",
        **case.settings,
    )
    late = build_controller(config)
    assert isinstance(late, LateController)
    inner = config.settings
    reference = case.reference(**{k: v for k, v in config.to_dict().items() if k != "controller"})

    state, own = late.init(SCALAR, ()), inner.init(SCALAR, ())
    told = STATIC
    for step, (norm, loss) in enumerate(zip(eventful(rng), losses(rng), strict=True)):
        seen = Observation(norm, loss, np.float32(STATIC))
        with np.errstate(all="ignore"):
            decision, state = late.update(state, seen)
            _, own = inner.update(own, seen)
        where = f"step {step}, norm {norm}"
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(own, state[:-1], strict=True)), where
        assert math.isclose(decision.threshold, told, rel_tol=case.rtol), where
        reason = Reason(int(decision.reason))
        if not math.isfinite(norm):
            assert (reason, float(decision.coefficient)) == (Reason.NONFINITE, 1.0)
            continue
        assert math.isclose(decision.coefficient, min(1.0, told / (norm + 1e-6)), rel_tol=case.rtol), where
        if reason is not Reason.WARMUP:
            assert (reason in (Reason.HELD, Reason.BOUNDED, Reason.CLIPPED, Reason.SPIKE)) == (
                decision.coefficient < 1
            ), where
        known = {"loss": float(loss)} if case.name == "adaptive" else {}
        threshold = reference.step(float(norm), **known)[0]
        told = copy.deepcopy(reference).step(min(float(norm), threshold), **known)[0]


def test_a_spike_is_bounded_by_the_edge_and_not_by_itself():
    config = AdaptiveClipConfig(one_step_late=True, ceiling_share=1.0)
    controller = build_controller(config)
    state = controller.init(SCALAR, ())
    rng = np.random.default_rng(0)
    applied = []
    for step in range(300):
        norm = np.float32(np.exp(0.1 * rng.standard_normal()) * (100 if step in (200, 201, 250) else 1))
        with np.errstate(all="ignore"):
            decision, state = controller.update(state, Observation(norm, np.float32("nan"), np.float32(1)))
        applied.append(float(norm * decision.coefficient))

    assert min(applied[200], applied[201], applied[250]) > 1.3, "the edge, and not the level"
    assert max(applied[200], applied[201], applied[250]) < 2.0
    calm = [a for i, a in enumerate(applied[60:], 60) if i not in (200, 201, 250)]
    assert np.mean([a < 1e-9 or a > 2 for a in calm]) == 0
