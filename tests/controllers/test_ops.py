"""Tensors, arrays and scalars give the same bits: what is decided on a GPU can be replayed on a laptop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import Observation
from hf_adaclip.controllers.numerics.ops import ARRAY, SCALAR, Value, tensor_ops
from hf_adaclip.ledger.records import state_bytes
from tests.cases import CASES
from tests.streams import eventful, losses

CPU = torch.device("cpu")


def controller_of(case):
    return AdaptiveClipConfig(controller=case.name, **case.settings).settings


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_scalars_and_tensors_decide_alike_bit_for_bit(case, rng):
    controller, ops = controller_of(case), tensor_ops(CPU)
    on_host, on_device = controller.init(SCALAR, ()), controller.init(ops, ())
    for norm, loss in zip(eventful(rng), losses(rng), strict=True):
        with np.errstate(all="ignore"):
            host, on_host = controller.update(on_host, Observation(norm, loss, np.float32(1.0)))
        seen = Observation(torch.tensor(norm), torch.tensor(loss), torch.tensor(1.0))
        device, on_device = controller.update(on_device, seen)
        assert [np.float32(h).tobytes() for h in host] == [d.numpy().tobytes() for d in device]
        assert state_bytes(on_host) == state_bytes(type(on_device)(*(t.numpy() for t in on_device)))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_one_tensor_among_many_is_decided_as_if_it_were_alone(case):
    streams = np.stack([eventful(np.random.default_rng(s)) for s in range(3)], axis=1)
    loss = losses(np.random.default_rng(9))
    controller, ops = controller_of(case), tensor_ops(CPU)
    together, on_device = controller.init(ARRAY, (3,)), controller.init(ops, (3,))
    alone = [controller.init(SCALAR, ()) for _ in range(3)]
    with np.errstate(all="ignore"):
        for row, step_loss in zip(streams, loss, strict=True):
            decision, together = controller.update(together, Observation(row, step_loss, np.float32(1.0)))
            seen = Observation(torch.tensor(row), torch.tensor(step_loss), torch.tensor(1.0))
            tensors, on_device = controller.update(on_device, seen)
            for i in range(3):
                single, alone[i] = controller.update(alone[i], Observation(row[i], step_loss, np.float32(1.0)))
                assert [float(v[i]) for v in decision] == pytest.approx(
                    [float(v) for v in single], rel=0, abs=0, nan_ok=True
                )
                assert [float(v[i]) for v in tensors] == pytest.approx(
                    [float(v) for v in single], rel=0, abs=0, nan_ok=True
                )


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@given(
    norms=st.lists(
        st.floats(0, 2.0**127, width=32, allow_subnormal=False) | st.just(float("nan")) | st.just(float("inf")),
        min_size=1,
        max_size=60,
    )
)
@settings(max_examples=40, deadline=None)
def test_no_stream_breaks_a_controller(case, norms):
    """Threshold, coefficient, pace and state stay sane whatever comes, and a non-finite norm teaches nothing."""
    controller = controller_of(case)
    state = controller.init(SCALAR, ())
    with np.errstate(all="ignore"):
        for value in norms:
            norm = np.float32(value)
            before = state
            decision, state = controller.update(state, Observation(norm, np.float32("nan"), np.float32(1.0)))
            assert 0 < decision.coefficient <= 1 or norm > 1e30
            assert decision.pace > 0
            if not np.isfinite(norm):
                assert decision.coefficient == 1
                assert state_bytes(state) == state_bytes(before)
            else:
                assert np.float32(norm * decision.coefficient) <= max(norm, decision.threshold)


OPERATORS = [name for name in vars(Value) if name.startswith("__") and callable(vars(Value)[name])]


@pytest.mark.parametrize("kinds", [(torch.Tensor,), (np.ndarray,), (np.float32, np.bool_)])
def test_a_value_is_what_the_three_kinds_of_numbers_have_in_common(kinds):
    """The type that mypy holds the controllers to; of numpy's scalars it is what numbers and flags have together."""
    kept = {"__init__", "__subclasshook__", "__class_getitem__"}
    of_rows = {"__getitem__", "__setitem__", "__len__"}  # what only histories and groups have
    for name in set(OPERATORS) - kept - (of_rows if len(kinds) > 1 else set()):
        assert any(getattr(kind, name, None) is not None for kind in kinds), name
    assert all(hasattr(kind, name) for kind in kinds for name in ("shape", "tolist"))
