"""The pace: a multiplier on the learning rate of one step, which clipping makes safe to raise.

    fast_t = f fast_{t-1} + (1 - f) loss_t             slow_t likewise with s > f; both start at the first loss
    progressing_t = fast_t < slow_t
    pace_t = max(1, pace_{t-1} * backoff)              after an excursion upward or a skipped step
           = min(max_pace, pace_{t-1} * growth)        when the norm is calm and the loss is progressing
           = pace_{t-1}                                otherwise

Calm norms alone are not progress: a model that sits in the majority class has the calmest of gradients, and a pace that
grows on them leaves the region where it could have learned. Hence the second signal, the trend of the training loss.
Without a loss the pace stays at 1.
"""

from typing import NamedTuple

from hf_adaclip.controllers.ops import Ops, Value


class Pace(NamedTuple):
    """Parameters of the pace; see the fields of the same meaning in `AdaptiveClipConfig`."""

    maximum: float
    growth: float
    backoff: float
    fast: float
    slow: float


class PaceState(NamedTuple):
    """`pace` of the last step and the two averages of the loss (NaN until one is known)."""

    pace: Value
    fast: Value
    slow: Value


def update_pace(pace: Pace, state: PaceState, loss: Value, *, calm: Value, trouble: Value, ops: Ops) -> PaceState:
    """One step of the pace.

    Args:
        pace: Parameters.
        state: State before the step.
        loss: Training loss of the step, shape `[]`; NaN or inf when unknown, and then nothing is learned from it.
        calm: Bool, whether the norm is inside the range and the controller is past its warm-up.
        trouble: Bool, whether the norm left the range upward or is not finite.
        ops: Ops on the state's device.
    """
    # A NaN compares as False everywhere: an unknown loss is neither below infinity nor progress.
    known = abs(loss) < ops(float("inf"))
    started = abs(state.slow) < ops(float("inf"))
    fast = ops.where(started, state.fast * ops(pace.fast) + loss * ops(1.0 - pace.fast), loss)
    slow = ops.where(started, state.slow * ops(pace.slow) + loss * ops(1.0 - pace.slow), loss)
    fast = ops.where(known, fast, state.fast)
    slow = ops.where(known, slow, state.slow)
    grown = ops.minimum(state.pace * ops(pace.growth), ops(pace.maximum))
    shrunk = ops.maximum(state.pace * ops(pace.backoff), ops(1.0))
    value = ops.where(calm & known & (fast < slow), grown, state.pace)
    return PaceState(ops.where(trouble, shrunk, value), fast, slow)
