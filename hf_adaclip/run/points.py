"""A moment of a run that it can go back to, and how a ledger says so."""

from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from hf_adaclip.controllers.numerics.ops import Value
from hf_adaclip.ledger.header import Rewound as Rewound  # what a ledger holds of it is all that there is

State = TypeVar("State", bound=tuple[Value, ...])


class Point(NamedTuple):
    """The controller at a moment between two steps.

    Attributes:
        step: Steps decided on so far.
        state: Of the controller, values of its own; None before the first step: then it is what that step begins with.
        keeping: Whom it is kept for; another object once the parameters are others.
        parent: Hash of the ledger's seal there and the step, as a resumed run names its parent; None without a ledger.
    """

    step: int
    state: tuple[Value, ...] | None
    keeping: object
    parent: dict[str, Any] | None


def own(state: State) -> State:
    """The same values in memory of their own."""
    return type(state)(*(v.clone() if isinstance(v, Tensor) else np.array(v)[()] for v in state))
