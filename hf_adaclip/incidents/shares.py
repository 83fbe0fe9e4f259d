"""Which module and which tensor the norm of a step came from."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from torch import Tensor

from hf_adaclip.gradients.transfer import HOST, moved
from hf_adaclip.ledger.schema import number

_TENSORS: Final = 10
_MODULES: Final = 50


def shares_of(norms: Tensor, names: Sequence[str] | None) -> dict[str, Any]:
    """Modules and tensors by their share of the squared norm, the largest first; those that are not finite before all others.

    Args:
        norms: Of every gradient, shape `[number of gradients]`. The host reads them.
        names: Of the parameters that these belong to; None where nobody knows.
    """
    values = moved(norms, HOST).double().numpy()
    known = list(names) if names is not None else [f"parameter {i}" for i in range(len(values))]
    bad = ~np.isfinite(values)
    squares = np.where(bad, np.inf, values**2)
    total = float(squares.sum())
    order = np.argsort(-squares, kind="stable")
    modules: dict[str, float] = {}
    for name, square in zip(known, squares.tolist(), strict=True):
        owner = name.rpartition(".")[0] if names is not None else name
        modules[owner] = modules.get(owner, 0.0) + square
    ranked = sorted(modules.items(), key=lambda entry: -entry[1])
    found: dict[str, Any] = {
        "modules": [{"name": name, "share": _share(square, total)} for name, square in ranked[:_MODULES]],
        "tensors": [
            {"name": known[i], "norm": number(float(values[i])), "share": _share(float(squares[i]), total)}
            for i in order[:_TENSORS].tolist()
        ],
        "tensors_in_all": len(values),
    }
    if bad.any():
        found["tensors_not_finite"] = int(bad.sum())
    return found


def _share(square: float, total: float) -> float | None:
    """None where the norm as a whole is not finite, so that nothing has a share of it."""
    return round(square / total, 6) if 0 < total < np.inf else None
