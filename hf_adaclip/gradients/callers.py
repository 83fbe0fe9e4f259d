"""Who is on the call stack: asked only in odd cases, where nothing else tells them apart."""

import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Final

import torch

from hf_adaclip.reliance import require

_STEP: Final[CodeType] = require(torch.optim.Optimizer, "profile_hook_step")(print).__code__
"""Code of the function that torch puts around every optimizer's `step`, which runs the hooks."""


def steps_running(optimizer: torch.optim.Optimizer | None) -> int:
    """How many calls of this optimizer's `step`, or of any, are going on: two within a `step` that calls `super().step()`.

    A counter in hooks cannot tell that from a step that comes after one that raised, which runs no hook at its end.
    """
    running = (frame for frame in _callers() if frame.f_code is _STEP)
    return sum(1 for frame in running if optimizer is None or frame.f_locals.get("self") is optimizer)


def stepping_scaler() -> torch.amp.GradScaler | None:
    """The `GradScaler` of torch whose `step` is going on, which nobody has to have told us of."""
    for frame in _callers():
        scaler = frame.f_locals.get("self") if frame.f_code.co_name == "step" else None
        if isinstance(scaler, torch.amp.GradScaler):
            return scaler
    return None


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
