"""Every controller against its slow, independent implementation, with the state taken apart and put together on the way."""

import json
import math

import numpy as np
import pytest

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import CONTROLLERS, Observation, Reason
from hf_adaclip.controllers.numerics.ops import SCALAR
from hf_adaclip.ledger.records import state_from_json, state_to_json
from tests.cases import CASES
from tests.streams import eventful, losses, reaches


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("seed", range(5))
def test_decisions_equal_the_reference(case, seed):
    rng = np.random.default_rng(seed)
    config = AdaptiveClipConfig(controller=case.name, static_threshold=0.25, **case.settings)
    controller = config.settings
    settings = {k: v for k, v in config.to_dict().items() if k != "controller"}
    reference = case.reference(**settings)

    state = controller.init(SCALAR, ())
    for step, (norm, loss, reach) in enumerate(zip(eventful(rng), losses(rng), reaches(rng), strict=True)):
        with np.errstate(all="ignore"):
            decision, state = controller.update(state, Observation(norm, loss, np.float32(0.25), reach=reach))
        if step % 37 == 0:  # the state survives a round trip through JSON bit for bit
            state = state_from_json(controller, json.loads(json.dumps(state_to_json(state))), SCALAR, ())
        further = (float(loss),) if case.name == "adaptive" else ()
        threshold, coefficient, pace, reason = reference.step(float(norm), float(reach), *further)
        where = f"step {step}, norm {norm}"
        assert Reason(int(decision.reason)).name == reason, where
        assert math.isclose(decision.coefficient, coefficient, rel_tol=case.rtol), where
        if reason != "NONFINITE":  # such a step is left out; its threshold means nothing
            assert math.isclose(decision.threshold, threshold, rel_tol=case.rtol), where
        assert math.isclose(decision.pace, pace, rel_tol=1e-4), where


def test_every_controller_has_a_case():
    # Rules on units and elements have no norm to replay; their references are in tests/gradients/test_fine.py.
    assert {case.name for case in CASES} == {name for name, kind in CONTROLLERS.items() if not kind.fine}
