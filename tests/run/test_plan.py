"""The truth table of `plan`: what a decision means for gradients, step and rate."""

import itertools

import numpy as np
import pytest
import torch

from hf_adaclip.controllers.base import Decision
from hf_adaclip.controllers.numerics.ops import SCALAR, tensor_ops
from hf_adaclip.run.plan import plan

OPS = {"host": SCALAR, "device": tensor_ops(torch.device("cpu"))}
FACTS = ("shadow", "bounded", "leaves_out", "paced", "finite", "zero")


def planned(ops, *, shadow, bounded, leaves_out, paced, finite, zero):
    number = ops.full((), 4.0 if finite else float("nan"))
    coefficient = ops.full((), 0.0 if zero else 0.25)
    decision = Decision(ops.full((), 1.0), coefficient, ops.full((), 8.0), ops.full((), 0.0))
    return plan(
        decision,
        ops.full((), 8.0),
        number,
        number < ops(float("inf")),
        static=ops.full((), 2.0),
        shadow=shadow,
        bounded=bounded,
        leaves_out=leaves_out,
        paced=paced,
        ops=ops,
    )


def wanted(*, shadow, bounded, leaves_out, paced, finite, zero):
    """Coefficient, whether by group, whether the step is taken, and the pace."""
    if shadow:  # exactly the stock run: the static threshold of 2 on a norm of 4, and nothing else
        return (0.5 if finite else 1.0), False, finite, None
    pace = 8.0 if paced else None
    if bounded:
        return 1.0, False, finite, pace
    return (0.0 if zero else 0.25), True, finite and not (leaves_out and zero), pace


@pytest.mark.parametrize("lane", OPS)
@pytest.mark.parametrize("values", list(itertools.product([False, True], repeat=len(FACTS))))
def test_the_truth_table(lane, values):
    facts = dict(zip(FACTS, values, strict=True))
    with np.errstate(all="ignore"):
        got = planned(OPS[lane], **facts)
    coefficient, by_group, taken, pace = wanted(**facts)
    assert float(got.coefficient) == pytest.approx(coefficient, rel=1e-6)
    assert got.by_group == by_group
    assert bool(got.taken) == taken
    assert (None if got.pace is None else float(got.pace)) == pace
