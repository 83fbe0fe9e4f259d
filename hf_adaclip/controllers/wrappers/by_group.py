"""Different controllers for different parameters, side by side on one vector of norms: what `parameter_rules` turns into.

    norms = [part 1 | part 2 | ...]        each part has a controller of its own, or none: excluded, coefficient 1

Every part decides as if it were alone; the parts share nothing but the step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from hf_adaclip.controllers.base import Controller, Decision, Observation, Reason, is_finite_norm
from hf_adaclip.controllers.numerics.fused import Fused
from hf_adaclip.controllers.numerics.ops import SCALAR, Ops, Shape, TensorOps, Value, ops_of
from hf_adaclip.controllers.wrappers.states import joined


class Part(NamedTuple):
    """Some neighbouring norms.

    Attributes:
        size: How many.
        controller: Who decides on them; None leaves them alone.
        static_threshold: Threshold of the warm-up, None for that of the run.
    """

    size: int
    controller: Controller[Any] | None
    static_threshold: float | None = None


@dataclass(frozen=True)
class _Update:
    controller: Any

    def __call__(self, state: Any, seen: Observation) -> tuple[Any, Decision]:
        decision, after = self.controller.update(state, seen)
        return after, decision


@dataclass(frozen=True)
class MixedController(Controller[Any]):
    """Several controllers on one vector of norms.

    Args:
        parts: In the order of the norms.
        max_pace: What an excluded part says of the pace: nothing that would hold back the others.
    """

    parts: tuple[Part, ...]
    max_pace: float = 1.0

    def __post_init__(self) -> None:
        made = [(i, part.controller) for i, part in enumerate(self.parts) if part.controller is not None]
        fields = frozenset(f"part{i}_{name}" for i, controller in made for name in controller.new_fields)
        object.__setattr__(self, "new_fields", fields)
        object.__setattr__(self, "revision", max((controller.revision for _, controller in made), default=1))

    @cached_property
    def _launches(self) -> dict[Any, Fused]:
        return {}

    @cached_property
    def _types(self) -> list[Any]:
        return [None if p.controller is None else type(p.controller.init(SCALAR, ())) for p in self.parts]

    def init(self, ops: Ops, shape: Shape) -> Any:
        """The states of all parts in one flat tuple, `part0_level` and so on.

        Raises:
            ValueError: There are not as many norms as the parts have.
        """
        if shape != (sum(part.size for part in self.parts),):
            raise ValueError(f"the parts {[p.size for p in self.parts]} are not the norms of shape {list(shape)}")
        names: list[str] = []
        values: list[Value] = []
        for i, part in enumerate(self.parts):
            if part.controller is not None:
                state = part.controller.init(ops, (part.size,))
                names += [f"part{i}_{name}" for name in state._fields]
                values += state
        return joined("MixedState", (), dict(zip(names, values, strict=True)))

    def update(self, state: Any, observation: Observation) -> tuple[Decision, Any]:
        ops = ops_of(observation.norm)
        decisions: list[Decision] = []
        values: list[Value] = []
        taken = begin = 0
        for part, kind in zip(self.parts, self._types, strict=True):
            seen = observation._replace(norm=observation.norm[begin : begin + part.size])
            begin += part.size
            if part.controller is None:
                decisions.append(self._leave_alone(seen.norm, ops))
                continue
            if part.static_threshold is not None:
                seen = seen._replace(static_threshold=ops(part.static_threshold))
            before = kind(*state[taken : taken + len(kind._fields)])
            taken += len(before)
            if ops.on_host:
                decision, after = part.controller.update(before, seen)
            else:
                after, decision = self._launch(part, ops)(before, seen)
            decisions.append(decision)
            values += after
        return Decision(*(ops.join(v) for v in _columns(decisions))), type(state)(*values)

    def narrowed(self, state: Any, ops: Ops) -> Any:
        values: list[Value] = []
        for part, kind in zip(self.parts, self._types, strict=True):
            if part.controller is not None:
                before = kind(*state[len(values) : len(values) + len(kind._fields)])
                values += part.controller.narrowed(before, ops)
        return type(state)(*values)

    def _launch(self, part: Part, ops: Ops) -> Fused:
        """The update of a part in one launch."""
        assert isinstance(ops, TensorOps)
        key = (id(part), ops.device)
        if key not in self._launches:
            self._launches[key] = Fused(_Update(part.controller), ops.device, (part.size,))
        return self._launches[key]

    def _leave_alone(self, norm: Value, ops: Ops) -> Decision:
        shape = ops.shape(norm)
        # The threshold of what is never clipped is its own norm; where there is none, any number does.
        threshold = ops.where(is_finite_norm(norm, ops), norm, ops(1.0))
        pace, within = ops.full(shape, self.max_pace), ops.full(shape, float(Reason.WITHIN))
        return Decision(threshold, ops.full(shape, 1.0), pace, within)


def _columns(decisions: list[Decision]) -> Iterator[list[Value]]:
    return ([d[i] for d in decisions] for i in range(len(Decision._fields)))
