"""Moments of a run: steps that are left out with their data, and going back to where it was."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_adaclip.controllers import Reason
from hf_adaclip.controllers.numerics.ops import Ops, Value
from hf_adaclip.ledger.records import Summary, state_from_tensors
from hf_adaclip.run.checkpoint import BESIDE, read_state
from hf_adaclip.run.events import of_rewound
from hf_adaclip.run.points import Point, Rewound, own

if TYPE_CHECKING:
    from hf_adaclip.config import AdaptiveClipConfig
    from hf_adaclip.controllers.wrappers.states import Keeping
    from hf_adaclip.run.alerts import Alerts
    from hf_adaclip.run.recorder import Recorder


class Moments:
    """The part of `Run` that leaves out and goes back."""

    config: "AdaptiveClipConfig"
    alerts: "Alerts"
    recorder: "Recorder | None"
    step: int
    static_threshold: float
    _state: tuple[Value, ...] | None
    _keeping: "Keeping"
    _device: torch.device
    _begun: Point | None
    _pending: int
    _parent: dict[str, Any] | None

    if TYPE_CHECKING:

        @property
        def ops(self) -> Ops: ...
        @property
        def num_tensors(self) -> int: ...
        @property
        def static(self) -> Value: ...
        def flush(self) -> None: ...
        def _look(self) -> None: ...
        def _here(self) -> dict[str, Any] | None: ...
        def _follow_on(self, restarted: Sequence[str] | None, rewound: Rewound | None = None) -> None: ...

    def leave_out(self) -> None:
        """Count a step for which there is no gradient; the controller goes on narrowed."""
        if self._state is None or self.recorder is None:
            self._pending += 1
        else:
            self._look()
            ops = self.ops
            nothing, one = ops(0.0), ops(1.0)
            unknown = ops(float("nan"))
            reason = ops(float(Reason.LEFT_OUT))
            self.recorder.record(
                nothing,
                Summary(self.static, nothing, one, reason),
                unknown,
                loss_scale=None,
                scaled=False,
                norms=ops.full((self.num_tensors,), float("nan")) if self.num_tensors else None,
                static_threshold=self.static_threshold,
            )
            self._state = self._keeping.controller.narrowed(self._state, ops)
        self.step += 1

    def keep(self) -> Point:
        """The present moment, to go back to; reads the rows that wait, so that it is the end of a block of the ledger."""
        if self._state is None:
            return Point(self.step, None, None, None)
        self.flush()
        return Point(self.step, own(self._state), self._keeping, self._here())

    def moment_in(self, path: Path) -> tuple[Point, dict[str, Tensor]] | None:
        """The moment that a state file of this run holds, and what lies beside the state; None without one, or for other parameters.

        Raises:
            StateError: The file is damaged, or belongs to another controller or config.
        """
        read = read_state(path, self.config)
        if read is None or self._state is None or read.groups != self._keeping.groups:
            return None
        tensors, beside = apart(read.tensors)
        shape = (self.num_tensors,) if self.num_tensors else ()
        try:
            state = state_from_tensors(self._keeping.controller, tensors, self.ops, shape, self._device)
        except ValueError:
            return None
        parent = None if read.ledger is None else {"sha256": read.ledger, "step": read.step}
        return Point(read.step, state, self._keeping, parent), beside

    def can_go_back(self, point: Point) -> bool:
        """Whether a moment is one of this run, with the parameters of now."""
        known = self._begun if point.state is None else point
        return known is not None and known.step == point.step and known.keeping is self._keeping

    def go_back(self, point: Point, reason: str) -> Rewound:
        """Decide on the next step as at that moment, but narrowed. Steps go on being counted, and the ledger has a new segment.

        Args:
            point: Of `keep`; `can_go_back` is true of it.
            reason: Why, in a sentence.
        """
        self.flush()
        known = self._begun if point.state is None else point
        assert known is not None
        assert known.state is not None
        rewound = Rewound(point.step, self.step - 1, reason)
        self._state, self._parent = own(known.state), known.parent
        self._follow_on(None, rewound)
        self._state = self._keeping.controller.narrowed(self._state, self.ops)
        self.alerts.tell([of_rewound(rewound)])
        return rewound


def apart(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of a state file, the controller's tensors, and the others without their prefix."""
    beside = {name.removeprefix(BESIDE): v for name, v in tensors.items() if name.startswith(BESIDE)}
    return {name: v for name, v in tensors.items() if not name.startswith(BESIDE)}, beside
