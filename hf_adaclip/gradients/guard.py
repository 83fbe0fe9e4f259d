"""The last moment before `optimizer.step`: leaving a step out, setting its pace, measuring what really arrives.

A step is left out in one of three ways, chosen once per optimizer:

- `device`: fused Adam and AdamW skip on the device when their `found_inf` is 1.0; nothing is read by the host. This is the
  default optimizer of the Trainer. Only these exact classes are trusted: RMSprop ignores the attribute silently, and fused
  SGD with momentum leaves its buffer uninitialised when its first step is skipped (torch 2.13).
- `scaler`: a `GradScaler` is active; it found the same overflow while unscaling and leaves the step out by itself.
- `host`: any other optimizer, or none known: the flag is read (one host read per step) and the gradients are dropped, so that
  the optimizer sees no parameter to update. Weights, moments and step counters stay as they were, bit for bit.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from hf_adaclip.controllers.ops import Value

Path = Literal["device", "scaler", "host"]
_DEVICE_SKIP = (torch.optim.Adam, torch.optim.AdamW)


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside `AcceleratedOptimizer` wrappers, which do not forward attributes.

    Raises:
        TypeError: There is no `torch.optim.Optimizer` inside.
    """
    inner = optimizer
    while not isinstance(inner, torch.optim.Optimizer) or hasattr(inner, "accelerator_state"):
        deeper = getattr(inner, "optimizer", None)
        if deeper is None or deeper is inner:
            raise TypeError(
                f"`optimizer` must be a torch.optim.Optimizer, possibly prepared by Accelerate, but is "
                f"{type(optimizer).__name__} instead."
            )
        inner = deeper
    return inner


class StepGuard:
    """Stands between clipping and `optimizer.step()` of one optimizer.

    Args:
        optimizer: The optimizer, wrapped by Accelerate or not.
        scaler: Whether a `GradScaler` drives the optimizer.
    """

    def __init__(self, optimizer: Any, *, scaler: bool = False) -> None:
        self.optimizer = unwrap_optimizer(optimizer)
        self.path, self.why = _choose_path(self.optimizer, scaler)
        self._pace: Value | None = None
        self._base_rates: list[Any] | None = None
        self._measure: Callable[[], None] | None = None
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]

    def arm(
        self, *, skip: Tensor | None, pace: Value | None = None, measure: Callable[[], None] | None = None
    ) -> None:
        """Prepare the next `optimizer.step()`.

        Args:
            skip: Bool tensor, shape `[]`: leave the step out. Acted on here only on the `device` path; None when the step has been
                dealt with otherwise.
            pace: Multiplier on the learning rate of this step, shape `[]`; None leaves the rate alone.
            measure: Called just before the optimizer reads the gradients.
        """
        if self.path == "device" and skip is not None:
            # Exactly 1.0 or 0.0: any other value neither skips nor steps right (it drives the step counter negative).
            self.optimizer.found_inf = skip.to(torch.float32)  # type: ignore[attr-defined]
        self._pace = pace
        self._measure = measure

    def detach(self) -> None:
        """Remove the hooks; the optimizer is as if this object had never been."""
        for handle in self._handles:
            handle.remove()
        self._clear()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._measure is not None:
            self._measure()
        if self._pace is not None:
            self._base_rates = [group["lr"] for group in optimizer.param_groups]
            # Fused Adam(W) takes the rate as a tensor; other optimizers compute with it on the host.
            pace = self._pace if self.path == "device" and isinstance(self._pace, Tensor) else float(self._pace)
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * pace

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._clear()

    def _clear(self) -> None:
        # What is armed is armed for one step: a stale flag would skip, and a stale rate would compound.
        if self._base_rates is not None:
            for group, rate in zip(self.optimizer.param_groups, self._base_rates, strict=True):
                group["lr"] = rate
            self._base_rates = None
        if self.path == "device":
            self.optimizer.found_inf = None  # type: ignore[attr-defined]
        self._pace = self._measure = None


def _choose_path(optimizer: torch.optim.Optimizer, scaler: bool) -> tuple[Path, str]:
    name = type(optimizer).__name__
    if scaler:
        return "scaler", "a GradScaler is active and skips overflowing steps by itself"
    if type(optimizer) not in _DEVICE_SKIP:
        return "host", f"{name} cannot skip a step on the device; one flag is read by the host per step"
    if not all(group.get("fused") for group in optimizer.param_groups):
        return "host", f"{name} is not fused; one flag is read by the host per step (`fused=True` avoids it)"
    return "device", f"fused {name} skips a step on the device; the host reads nothing"
