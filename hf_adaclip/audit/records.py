"""Between what the clipper has and what the ledger stores: step records, controller states."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_adaclip.audit.schema import number, number_or_null, parse_number
from hf_adaclip.controllers import Controller, Reason
from hf_adaclip.controllers.base import is_finite_norm
from hf_adaclip.controllers.ops import Ops, Shape, Value, ops_of


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
    there = is_finite_norm(norms, ops)
    finite = is_finite_norm(norm, ops)
    kept = ops.where(there, norms * coefficient, ops(0.0))
    intended = ops.sqrt((kept * kept).sum())
    untouched = (coefficient == ops(1.0)).all()
    whole = ops.where(untouched | ~finite, ops(1.0), intended / norm)
    worst = ops.where(there, reason, ops(0.0)).max()
    alarm = ops.where(reason > ops(float(Reason.NONFINITE)), reason, ops(float(Reason.NONFINITE))).max()
    worst = ops.where(finite, worst, alarm)
    # A tensor without a gradient says nothing about the pace; when none has one, the step is left out and all count.
    slowest = ops.where(there | ~finite, pace, ops(float("inf"))).min()
    return Summary(ops.where(untouched | ~finite, norm, intended), whole, slowest, worst)


def state_fields(state: tuple[Value, ...]) -> dict[str, Value]:
    """The values of a state by name."""
    names: tuple[str, ...] = state._fields  # type: ignore[attr-defined]
    return dict(zip(names, state, strict=True))


def state_to_tensors(state: tuple[Value, ...]) -> dict[str, Tensor]:
    """The values of a state by name, as tensors."""
    return {
        name: torch.as_tensor(np.asarray(v)) if not isinstance(v, Tensor) else v
        for name, v in state_fields(state).items()
    }


def state_from_tensors(
    controller: Controller[Any], tensors: dict[str, Tensor], ops: Ops, shape: Shape, device: torch.device
) -> tuple[Value, ...]:
    """The state that `state_to_tensors` took apart, as numbers of the kind that `ops` works on.

    Raises:
        ValueError: A field is missing or has another shape.
    """
    template = controller.init(ops, shape)
    values: list[Value] = []
    for name, like in state_fields(template).items():
        if name not in tensors:
            raise ValueError(f"the state has no `{name}`")
        value, want = tensors[name].to(torch.float32), tuple(like.shape)
        if tuple(value.shape) != want:
            raise ValueError(
                f"`{name}` of the state has shape {list(value.shape)}, these parameters need {list(want)}"
            )
        if ops.on_host:
            array = value.cpu().numpy().copy()
            values.append(array if want else array[()])
        else:
            values.append(value.to(device))
    return type(template)(*values)  # type: ignore[no-any-return]


def state_to_json(state: tuple[Value, ...]) -> dict[str, Any]:
    """A controller's state as JSON: numbers for scalars, nested lists otherwise."""

    def convert(value: Any) -> Any:
        return [convert(v) for v in value] if isinstance(value, list) else number(value)

    return {name: convert(value.tolist()) for name, value in state_fields(state).items()}


def state_from_json(controller: Controller[Any], values: dict[str, Any], ops: Ops, shape: Shape) -> tuple[Value, ...]:
    """The state that `state_to_json` wrote, in host memory.

    Raises:
        ValueError: A field is missing, is no number, or has another shape.
    """

    def convert(value: Any) -> Any:
        return [convert(v) for v in value] if isinstance(value, list) else parse_number(value)

    tensors = {name: torch.tensor(convert(value), dtype=torch.float32) for name, value in values.items()}
    return state_from_tensors(controller, tensors, ops, shape, torch.device("cpu"))


def state_bytes(state: tuple[Value, ...]) -> bytes:
    """A state's values as bytes: two states in host memory are equal bit for bit when these are."""
    return b"".join(name.encode() + np.ascontiguousarray(v).tobytes() for name, v in state_fields(state).items())
