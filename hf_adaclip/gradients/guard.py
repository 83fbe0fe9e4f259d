"""The last moment before `optimizer.step`: leaving a step out, setting its pace, measuring what really arrives.

A step is left out in one of three ways, chosen once per optimizer:

- `device`: fused Adam and AdamW skip on the device when their `found_inf` is 1.0; nothing is read by the host. This is the
  default optimizer of the Trainer. Only these exact classes are trusted: RMSprop ignores the attribute silently, and fused
  SGD with momentum leaves its buffer uninitialised when its first step is skipped (torch 2.13).
- `scaler`: a `GradScaler` is active; it found the same overflow while unscaling and leaves the step out by itself.
- `host`: any other optimizer, or none known: the flag is read (one host read per step) and the gradients are dropped, so that
  the optimizer sees no parameter to update. Weights, moments and step counters stay as they were, bit for bit; counters that some
  optimizers keep per group (`stable_adamw` and others) and move all the same are put back, where the optimizer is known.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hf_adaclip.controllers.ops import Ops, Value
from hf_adaclip.gradients.norms import Gradients

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
        self._left_out = False
        self._folded = False
        self._kept: list[dict[str, Any]] = []
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]

    def arm(
        self,
        *,
        skip: Tensor | None,
        pace: Value | None = None,
        measure: Callable[[], None] | None = None,
        fold: Tensor | None = None,
    ) -> None:
        """Prepare the next `optimizer.step()`.

        Args:
            skip: Bool tensor, shape `[]`: leave the step out. Acted on here only on the `device` path; None when the step has been
                dealt with otherwise.
            pace: Multiplier on the learning rate of this step, shape `[]`; None leaves the rate alone.
            measure: Called just before the optimizer reads the gradients; after it has, when it scales them.
            fold: What the step divides the gradients by, float32, shape `[]`; only on the `device` path.
        """
        if self.path == "device" and skip is not None:
            # Exactly 1.0 or 0.0: any other value neither skips nor steps right (it drives the step counter negative).
            self.optimizer.found_inf = skip.to(torch.float32)  # type: ignore[attr-defined]
        self._folded = fold is not None
        if fold is not None:
            self.optimizer.grad_scale = fold  # type: ignore[attr-defined]
        self._pace = pace
        self._measure = measure

    def leave_out(self) -> None:
        """The gradients of the next step have been dropped: what it changes in the groups is not to stay."""
        self._left_out = True

    def detach(self) -> None:
        """Remove the hooks; the optimizer is as if this object had never been."""
        for handle in self._handles:
            handle.remove()
        self._clear()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._left_out:
            self._kept = [{k: _copy(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        if self._measure is not None and not self._folded:
            self._measure()
        if self._pace is not None:
            self._base_rates = [group["lr"] for group in optimizer.param_groups]
            # Fused Adam(W) takes the rate as a tensor; other optimizers compute with it on the host.
            pace = self._pace if self.path == "device" and isinstance(self._pace, Tensor) else float(self._pace)
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * pace

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        measure = self._measure if self._folded else None
        self._clear()
        if measure is not None:  # the fused step has written the scaled gradients back
            measure()

    def _clear(self) -> None:
        # What is armed is armed for one step: a stale flag would skip, and a stale rate would compound.
        if self._base_rates is not None:
            for group, rate in zip(self.optimizer.param_groups, self._base_rates, strict=True):
                group["lr"] = rate
            self._base_rates = None
        for group, kept in zip(self.optimizer.param_groups, self._kept, strict=False):
            group.update(kept)
        self._kept, self._left_out = [], False
        if self.path == "device":
            self.optimizer.found_inf = None  # type: ignore[attr-defined]
        if self._folded:
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self._folded = False
        self._pace = self._measure = None


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _choose_path(optimizer: torch.optim.Optimizer, scaler: bool) -> tuple[Path, str]:
    name = type(optimizer).__name__
    if scaler:
        return "scaler", "a GradScaler is active and skips overflowing steps by itself"
    if type(optimizer) not in _DEVICE_SKIP:
        return "host", f"{name} cannot skip a step on the device; one flag is read by the host per step"
    if not all(group.get("fused") for group in optimizer.param_groups):
        return "host", f"{name} is not fused; one flag is read by the host per step (`fused=True` avoids it)"
    return "device", f"fused {name} skips a step on the device; the host reads nothing"


class Guards:
    """The guards of all optimizers that step on one set of gradients; there may be none, when no optimizer is known.

    Args:
        optimizers: Optimizers, wrapped by Accelerate or not.
        scaler: Whether a `GradScaler` drives them.
    """

    def __init__(self, optimizers: Sequence[Any], *, scaler: bool) -> None:
        self._scaler = scaler
        self._guards = [StepGuard(o, scaler=scaler) for o in optimizers]

    def __bool__(self) -> bool:
        return bool(self._guards)

    @property
    def why(self) -> list[str]:
        """Per optimizer, how a step is left out and why so."""
        return [guard.why for guard in self._guards]

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers, without what Accelerate wraps around them."""
        return [guard.optimizer for guard in self._guards]

    @property
    def others_look(self) -> bool:
        """Whether hooks of others run before a step: they are to see gradients as clipping leaves them."""
        hooks = [h for guard in self._guards for h in guard.optimizer._optimizer_step_pre_hooks.values()]
        return any(not isinstance(getattr(hook, "__self__", None), StepGuard) for hook in hooks)

    @property
    def paths(self) -> list[Path]:
        """How each leaves a step out."""
        return [guard.path for guard in self._guards]

    @property
    def parameters(self) -> list[Tensor]:
        """All parameters of all optimizers."""
        return [p for guard in self._guards for group in guard.optimizer.param_groups for p in group["params"]]

    def adopt(self, optimizers: Sequence[Any]) -> None:
        """Guard these, if none is guarded yet."""
        if not self._guards:
            self._guards = [StepGuard(o, scaler=self._scaler) for o in optimizers]

    def arm(
        self,
        gradients: Gradients,
        *,
        finite: Value,
        pace: Value | None,
        ops: Ops,
        measure: Callable[[list[Tensor]], None] | None,
        fold: Tensor | None = None,
    ) -> None:
        """Prepare the coming step.

        Args:
            gradients: What the optimizers step on.
            finite: Bool, shape `[]`; False leaves the step out, be it that it is not finite or that the controller wants it so.
            pace: Multiplier on the learning rate, None to leave it alone.
            ops: The kind of numbers that `finite` and `pace` are.
            measure: Called with the gradients as the first optimizer is about to read them, or has scaled them.
            fold: What the one optimizer is to divide the gradients by; None where they are scaled already.
        """
        skip = ~finite
        on_device = bool(self._guards) and all(guard.path == "device" for guard in self._guards)
        # In host memory the flag is a plain bool; on an accelerator, reading it is the one host read of this path.
        if (ops.on_host or not on_device) and bool(skip):
            # Every optimizer passes over parameters without a gradient: no weight, moment or counter moves.
            for i in gradients.present:
                gradients.parameters[i].grad = None
            for guard in self._guards:
                guard.leave_out()

        def take_measure() -> None:
            tensors = [g for i in gradients.present if (g := gradients.parameters[i].grad) is not None]
            if tensors and measure is not None:
                with torch.no_grad():
                    measure(tensors)

        for position, guard in enumerate(self._guards):
            guard.arm(
                skip=None if ops.on_host else skip,
                pace=pace,
                measure=None if measure is None or position else take_measure,
                fold=fold,
            )

    def detach(self) -> None:
        """Let go of all optimizers."""
        for guard in self._guards:
            guard.detach()
