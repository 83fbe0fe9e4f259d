"""Between what the clipper has and what the ledger stores: step records, controller states."""

import math
import re
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_adaclip.controllers import CONTROLLERS, Controller, Reason, build_controller
from hf_adaclip.controllers.base import is_finite_norm
from hf_adaclip.controllers.numerics.ops import ARRAY, SCALAR, Ops, Shape, Value, ops_of
from hf_adaclip.gradients.transfer import HOST, moved
from hf_adaclip.ledger.schema import SHAPE_FIELDS, number, number_or_null, parse_number


def step_record(
    step: int, row: dict[str, float], seconds: float, norms: list[float] | None, static: float | None = None
) -> dict[str, Any]:
    """One step as it stands in the ledger.

    Args:
        step: Optimizer step, counted from 0.
        row: A row of the ring, by column name.
        seconds: Wall-clock time since the clipper was made.
        norms: Norm of every tensor, NaN where it has no gradient; None when the granularity is global.
        static: The static threshold of the step, where it is another than the header's.
    """
    record: dict[str, Any] = {"step": step}
    record.update((key, number(row[key])) for key in ("norm", "threshold", "coefficient", "pace"))
    record["reason"] = Reason(int(row["reason"])).name
    record.update((key, number_or_null(row[key])) for key in ("loss", "loss_scale"))
    if row["reach"] == row["reach"]:
        record["reach"] = number(row["reach"])  # only where there is a pace
    if static is not None:
        record["static_threshold"] = number(static)
    record.update((key, number(row[key])) for key in SHAPE_FIELDS if key in row and row[key] == row[key])
    record["time"] = round(seconds, 3)
    record["applied_norm"] = number_or_null(row["applied_norm"])
    if norms is not None:
        record["norms"] = [number(n) for n in norms]
    return record


class Summary(NamedTuple):
    """One step as a whole, all shape `[]`: what a record and a log line show."""

    threshold: Value
    coefficient: Value
    pace: Value
    reason: Value


def summarise(norm: Value, norms: Value, threshold: Value, coefficient: Value, pace: Value, reason: Value) -> Summary:
    """Threshold, coefficient, pace and reason of a step whose tensors were decided on one by one.

    Args:
        norm: Global norm, shape `[]`.
        norms: Norm of every tensor, shape `[num_tensors]`, NaN where it has no gradient.
        threshold, coefficient, pace, reason: The decision, shape `[num_tensors]`.

    Returns:
        As threshold the norm that is meant to reach the optimizer, as coefficient its ratio to `norm` (exactly 1 when no tensor is
        altered), as pace the smallest, as reason the most severe of the tensors that have a gradient.
    """
    ops = ops_of(norms)
    # Arrays or tensors, whose reductions have one name.
    shared: Any = shares(norm, norms, coefficient, pace, reason, ops)
    squares, extremes = shared
    return whole(norm, squares.sum(), *(row.max() for row in extremes), ops=ops)


def shares(
    norm: Value, norms: Value, coefficient: Value, pace: Value, reason: Value, ops: Ops
) -> tuple[Value, list[Value]]:
    """What each tensor adds to the summary: the square of its norm that is left; and its reason, whether it is altered, and the opposite
    of its pace, of which the largest count."""
    there = is_finite_norm(norms, ops)
    finite = is_finite_norm(norm, ops)
    kept = ops.where(there, norms * coefficient, ops(0.0))
    worst = ops.where(there, reason, ops(0.0))
    bar = ops(float(Reason.NONFINITE))
    worst = ops.where(finite, worst, ops.where(reason > bar, reason, bar))
    altered = ops.where(coefficient == ops(1.0), ops(0.0), ops(1.0))
    # A tensor without a gradient says nothing about the pace; when none has one, the step is left out and all count.
    slowest = ops.where(there | ~finite, pace, ops(float("inf")))
    return kept * kept, [worst, altered, -slowest]


def whole(norm: Value, squares: Value, worst: Value, altered: Value, slowest: Value, *, ops: Ops) -> Summary:
    """The summary, of the sum of the squares and the largest of what else `shares` gives."""
    intended = ops.sqrt(squares)
    left_alone = (altered == ops(0.0)) | ~is_finite_norm(norm, ops)
    coefficient = ops.where(left_alone, ops(1.0), intended / norm)
    return Summary(ops.where(left_alone, norm, intended), coefficient, -slowest, worst)


def state_fields(state: tuple[Value, ...]) -> dict[str, Value]:
    """The values of a state by name."""
    names: tuple[str, ...] = state._fields  # type: ignore[attr-defined]
    return dict(zip(names, state, strict=True))


def state_to_tensors(state: tuple[Value, ...]) -> dict[str, Tensor]:
    """The values of a state by name, as tensors."""
    return {
        name: torch.from_numpy(np.array(v)) if not isinstance(v, Tensor) else v
        for name, v in state_fields(state).items()
    }


_PREFIX: Final = re.compile(r"(part\d+_)?(oversight_)?")
# What no rule ever makes negative, and what counts. Fields that are not here are only checked for being numbers.
_WHOLE: Final = frozenset(("run", "count", "slot", "steps", "skipped", "bad", "trouble", "pace_steps"))
_NOT_NEGATIVE: Final = _WHOLE.union(
    ("level", "spread", "width", "candidate", "acted", "pace", "held_pace"),
    ("mean", "variance", "history", "bound", "average", "squares", "weight"),
    ("edge", "anchor", "loss_spread", "late_threshold", "loss_seen", "floors"),
    ("given", "quiet", "crest", "memory", "rival", "hits", "other", "other_hits", "above"),
)
_OF_THE_LOSS: Final = frozenset(("loss_mean", "loss_spread", "loss_best"))
"""NaN in states of a first revision that knew no loss."""
_OF_A_THRESHOLD: Final = frozenset(("edge", "quiet", "late_threshold"))
"""Infinite where the static threshold is one that never acts."""


def parts_of(controller: Controller[Any]) -> list[Controller[Any]]:
    """A controller, and all that it is made of, the outermost first."""
    inner = [getattr(controller, "inner", None), *(part.controller for part in getattr(controller, "parts", ()))]
    return [controller, *(c for i in inner if i is not None for c in parts_of(i))]


def revisions(config: Any) -> dict[str, Any]:
    """Which revision of its rule decides, for the header of a ledger and the metadata of a state.

    Returns:
        `revision` of the controller that the config names, 1 at first; where anything else that takes part is beyond its first,
        `revisions` too, by class.
    """
    patterns = list(config.parameter_rules) if isinstance(config.parameter_rules, dict) else []
    built = build_controller(config, [(None, 1), *((p, 1) for p in patterns)])
    others = {type(c).__name__: int(getattr(c, "revision", 1)) for c in parts_of(built)}
    found: dict[str, Any] = {"revision": int(getattr(CONTROLLERS[config.controller], "revision", 1))}
    others.pop(CONTROLLERS[config.controller].__name__, None)
    if later := {name: number for name, number in sorted(others.items()) if number != 1}:
        found["revisions"] = later
    return found


def new_fields(controller: Controller[Any]) -> frozenset[str]:
    """Fields that states of older revisions lack; they begin as in `init`."""
    return frozenset().union(*(getattr(c, "new_fields", frozenset()) for c in parts_of(controller)))


def state_problem(name: str, value: Tensor, like: Any) -> str | None:
    """Why no run can have a field like this, or None.

    Args:
        name: Of the field.
        value: In host memory.
        like: The field before the first step: NaN and infinity are right where they stand in it.
    """
    if value.dtype != torch.float32:
        return f"`{name}` must be float32, but is {str(value.dtype).removeprefix('torch.')}"
    begins = np.asarray(like, dtype=np.float32)
    unknown, endless = bool(np.isnan(begins).any()), bool(np.isinf(begins).any())
    field = _PREFIX.sub("", name, count=1)
    if not (unknown or field in _OF_THE_LOSS) and bool(value.isnan().any()):
        return f"`{name}` must be a number, but is NaN"
    if not (endless or unknown or field in _OF_A_THRESHOLD) and bool(value.isinf().any()):
        return f"`{name}` must be finite, but is infinite"
    known = value[value.isfinite()]
    if field in _NOT_NEGATIVE and (bool((known < 0).any()) or bool((value == -math.inf).any())):
        return f"`{name}` must not be negative, but is {float(value.min()):g}"
    if field in _WHOLE and bool((known != known.floor()).any()):
        return f"`{name}` counts, so it must be whole, but is {float(known[known != known.floor()][0]):g}"
    if field == "pace" and bool((known == 0).any()):
        return f"`{name}` must be above 0, but is 0"
    return None


def state_from_tensors(
    controller: Controller[Any], tensors: dict[str, Tensor], ops: Ops, shape: Shape, device: torch.device
) -> tuple[Value, ...]:
    """The state that `state_to_tensors` took apart, as numbers of the kind that `ops` works on.

    Raises:
        ValueError: A field is missing, has another shape, or a value that no run can have.
    """
    template = controller.init(ops, shape)
    begins = controller.init(ARRAY if shape else SCALAR, shape)
    late = new_fields(controller)
    values: list[Value] = []
    for (name, like), first in zip(state_fields(template).items(), begins, strict=True):
        if name not in tensors:
            if _PREFIX.sub("", name, count=1) in late:
                values.append(like)
                continue
            raise ValueError(f"the state has no `{name}`")
        value, want = tensors[name], tuple(like.shape)
        if tuple(value.shape) != want:
            raise ValueError(
                f"`{name}` of the state has shape {list(value.shape)}, these parameters need {list(want)}"
            )
        if problem := state_problem(name, moved(value, HOST), first):
            raise ValueError(problem)
        if ops.on_host:
            array = moved(value, HOST).numpy().copy()
            values.append(array if want else array[()])
        else:
            values.append(moved(value, device))
    return type(template)(*values)  # type: ignore[no-any-return]


def state_to_json(state: tuple[Value, ...]) -> dict[str, Any]:
    """A controller's state as JSON: numbers for scalars, nested lists otherwise."""

    def convert(value: Any) -> Any:
        return [convert(v) for v in value] if isinstance(value, list) else number(value)

    return {name: convert(value.tolist()) for name, value in state_fields(state).items()}


def state_from_json(controller: Controller[Any], values: dict[str, Any], ops: Ops, shape: Shape) -> tuple[Value, ...]:
    """The state that `state_to_json` wrote, in host memory.

    Raises:
        ValueError: A field is missing, is no number, has another shape, or a value that no run can have.
    """

    def convert(value: Any) -> Any:
        return [convert(v) for v in value] if isinstance(value, list) else parse_number(value)

    tensors = {name: torch.tensor(convert(value), dtype=torch.float32, device=HOST) for name, value in values.items()}
    return state_from_tensors(controller, tensors, ops, shape, HOST)


def state_bytes(state: tuple[Value, ...]) -> bytes:
    """A state's values as bytes: two states in host memory are equal bit for bit when these are."""
    return b"".join(name.encode() + np.ascontiguousarray(v).tobytes() for name, v in state_fields(state).items())
