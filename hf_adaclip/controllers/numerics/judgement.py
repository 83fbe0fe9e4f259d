"""Where a norm stands in the range of `adaptive`, and what is said of it."""

from typing import NamedTuple

from hf_adaclip.controllers.base import Reason
from hf_adaclip.controllers.numerics.ops import Ops, Value


class Judgement(NamedTuple):
    """A norm and where it stands; bools are False in the warm-up and for norms that say nothing.

    Attributes:
        norm: Not below the smallest normal number.
        finite, usable, warm, ready: Finite; and above zero; in the warm-up; usable and after it.
        level, x, far, near, edge, top: See the formulas of `adaptive`.
        over, low, recurring: Above the top; below the range; above the edge and explained by the remembered level.
        unusual, upward, accepted, spike: Beyond the inner edge; upward; the last of a run that is a new level; cut back to near the level.
        candidate, run: Of the run, with this norm.
    """

    norm: Value
    finite: Value
    usable: Value
    warm: Value
    ready: Value
    level: Value
    x: Value
    far: Value
    near: Value
    edge: Value
    top: Value
    high: Value
    over: Value
    low: Value
    recurring: Value
    unusual: Value
    upward: Value
    accepted: Value
    spike: Value
    candidate: Value
    run: Value


def reason_of(judged: Judgement, threshold: Value, static: Value, *, kept: Value, quiet: Value, ops: Ops) -> Value:
    """The [`Reason`] of a step, as a number.

    Args:
        judged: Where the norm stands.
        threshold: What was decided.
        static: The static threshold.
        kept: Bool, whether the static threshold is what holds.
        quiet: Threshold of the last step that was left as it was, 0 before the first.
        ops: The kind of numbers that all of these are.
    """
    j = judged
    # Against the last step that was left alone: the threshold of a spike is its target and not the width of the range.
    wider = (threshold > quiet) & (quiet > ops(0.0)) & ~kept & ~j.unusual
    reason = ops.where(wider, ops(float(Reason.WIDENED)), ops(float(Reason.WITHIN)))
    reason = ops.where(j.warm, ops(float(Reason.WARMUP)), reason)
    reason = ops.where(j.low | ~j.usable, ops(float(Reason.VANISHING)), reason)
    reason = ops.where(j.accepted, ops(float(Reason.NEW_LEVEL)), reason)
    held = ops.where(threshold == static, ops(float(Reason.HELD)), ops(float(Reason.BOUNDED)))
    reason = ops.where(j.ready & (j.norm > threshold), held, reason)
    reason = ops.where(j.spike, ops(float(Reason.SPIKE)), reason)
    return ops.where(j.finite, reason, ops(float(Reason.NONFINITE)))
