"""The last moment before `optimizer.step`: leaving a step out, setting its pace, measuring what really arrives.

A step is left out in one of three ways, chosen once per optimizer:

- `device`: fused Adam and AdamW skip on the device when their `found_inf` is 1.0; nothing is read by the host. This is the
  default optimizer of the Trainer. Only these exact classes are trusted: RMSprop ignores the attribute silently, and fused
  SGD with momentum leaves its buffer uninitialised when its first step is skipped (torch 2.13).
- `scaler`: a `GradScaler` is active; it found the same overflow while unscaling and leaves the step out by itself.
- `host`: any other optimizer: the flag is read (one host read per step), and the call of `step` that comes next does nothing. Weights,
  moments and counters stay as they were, bit for bit, wherever the optimizer keeps them.

Where no optimizer is known the gradients are dropped instead, so that it sees no parameter to update. So they are when clipping is
called within `step`, by its closure: then the optimizer is at work already.
"""

import functools
import itertools
import logging
from collections.abc import Callable
from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor

from hf_adaclip.controllers.numerics.ops import Value
from hf_adaclip.errors import ClippingDefeatedError, ConfigError, UnsupportedSetupError
from hf_adaclip.gradients.agreement import Agreement
from hf_adaclip.gradients.callers import stepping_scaler, steps_running
from hf_adaclip.gradients.optimizers import (
    choose_path,
    copied,
    moves,
    takes_flag,
    unwrap_optimizer,
    watched,
    without_parameters,
)
from hf_adaclip.gradients.pacing import Pacing

logger = logging.getLogger(__name__)

_COUNT: Final = itertools.count()
NOT_UNSCALED = (
    "`scaler.unscale_(optimizer)` must be called before `clip_`, but the gradients were still multiplied by the loss scale when their norm "
    "was taken. Call it between `backward` and `clip_`, as for `torch.nn.utils.clip_grad_norm_`."
)


class StepGuard:
    """Stands between clipping and `optimizer.step()` of one optimizer.

    Args:
        optimizer: The optimizer, wrapped by Accelerate or not.
        scaler: Whether a `GradScaler` drives the optimizer.
        shapes: Whether it sets the pace of steps, or takes a part of them back. Of several that do, the newest does.

    Attributes:
        shapes: The same; False once it is detached.
        age: Which of all guards it is, counted from the first.
        agreement: Takes back a part of each step that was prepared; None where that is off.
        armed: Whether a step that was prepared has not been made yet.
        consumed: Prepared steps that were made or left out.
        unarmed: Steps that moved weights and were not prepared, since the first that was.
    """

    def __init__(self, optimizer: Any, *, scaler: bool = False, shapes: bool = True) -> None:
        self.optimizer = unwrap_optimizer(optimizer)
        self._scaler, self.shapes, self.age = scaler, shapes, next(_COUNT)
        self.path, self.why = choose_path(self.optimizer, scaler)
        self.armed = False
        self.consumed = self.unarmed = 0
        self.agreement: Agreement | None = None
        self._pacing = Pacing(self.optimizer)
        self._pace: Value | float | None = None
        self._measure: Callable[[], None] | None = None
        self._skip: Tensor | None = None
        self._fold: Tensor | None = None
        self._leaves_out = self._within = self._others_armed = False
        self._depth = 0  # calls of `step` that have begun and not ended; stale after one that raised
        self._kept: list[dict[str, Any]] = []
        self._wrapped: MethodType | None = None
        self._own_step: Any = None
        self._before = self.optimizer.register_step_pre_hook(self._before_step)
        self._after = self.optimizer.register_step_post_hook(self._after_step)
        self._agreeing: Any = None  # the hook of the agreement, where there is one

    @property
    def running(self) -> bool:
        """Whether `step` is going on: clipping is called by its closure."""
        return self._depth > 0 and steps_running(self.optimizer) > 0

    @property
    def displaced(self) -> bool:
        """Whether a newer one shapes the steps of this optimizer: twice the pace is its square, and nobody would put the rate back."""
        return self.shapes and any(other.shapes and other.age > self.age for other in _guards_on(self.optimizer))

    def check_owner(self) -> None:
        """Whether it may shape steps.

        Raises:
            UnsupportedSetupError: A newer one does.
        """
        if self.displaced:
            raise UnsupportedSetupError(
                f"`optimizer` must be paced by one clipper, but another one was made for this {type(self.optimizer).__name__} since. Close "
                'that one; or make both with `clip="guard"`, which only clips.'
            )

    @property
    def reads_pace(self) -> bool:
        """Whether the host has to know the pace, though the step takes the rate as a tensor (see `Pacing.needs_number`)."""
        return self.path == "device" and self._pacing.needs_number

    def choose_again(self) -> bool:
        """The way a step is left out, after groups were added or a state was loaded, which may change `fused`; whether it is another."""
        before = self.path
        if before == "scaler" or (before == "device") == takes_flag(self.optimizer):
            return False
        self._clear()
        self.path, self.why = choose_path(self.optimizer, self._scaler)
        return self.path != before

    def arm(
        self,
        *,
        skip: Value | bool | None,
        pace: Value | float | None = None,
        measure: Callable[[], None] | None = None,
        fold: Tensor | None = None,
    ) -> None:
        """Prepare the next `optimizer.step()`, or the rest of the one that is going on.

        Args:
            skip: Whether to leave the step out. A bool tensor, shape `[]`, is acted on only on the `device` path.
            pace: Multiplier on the learning rate of this step, shape `[]`; None leaves the rate alone.
            measure: Called just before the optimizer reads the gradients; after it has, when it scales them.
            fold: What the step divides the gradients by, float32, shape `[]`; only on the `device` path.
        """
        self._come_first()
        self._within = self.running
        if self._within:
            if pace is not None and isinstance(self.optimizer, torch.optim.LBFGS):
                raise ConfigError(
                    "`max_pace` must be 1 with LBFGS, but is larger instead: it reads its learning rate before it calls the closure."
                )
            self._kept = []
        else:
            self._depth = 0
        self._clear()
        self.armed = True
        self._pace, self._measure, self._fold, self._leaves_out = pace, measure, fold, skip is True
        if self.path == "device" and isinstance(skip, Tensor):
            # Exactly 1.0 or 0.0: any other value neither skips nor steps right (it drives the step counter negative).
            self._skip = skip.to(torch.float32)
            self.optimizer.found_inf = self._skip  # type: ignore[attr-defined]
        if fold is not None:
            self.optimizer.grad_scale = fold  # type: ignore[attr-defined]
        if self._within:
            if self._leaves_out:
                self._kept = [
                    {k: copied(v) for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups
                ]
            self._begin()
            return
        # A hook that was registered since would run after ours, and could change what has been measured.
        hooks: Any = self.optimizer._optimizer_step_pre_hooks
        if next(reversed(hooks), None) != self._before.id and self._before.id in hooks:
            hooks.move_to_end(self._before.id)
        if self._leaves_out or pace is not None:
            self._wrap_step()

    def _come_first(self) -> None:
        """After a step, before anybody else's hook: one that limits weights, or steps a schedule, is to see what the step really was."""
        if self.agreement is not None and self._agreeing is None:
            self._agreeing = self.optimizer.register_step_post_hook(self._agree)
        hooks: Any = self.optimizer._optimizer_step_post_hooks
        ours = [hook.id for hook in (self._agreeing, self._after) if hook is not None and hook.id in hooks]
        if list(itertools.islice(hooks, len(ours))) != ours:
            for key in reversed(ours):
                hooks.move_to_end(key, last=False)

    def _agree(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        outermost = optimizer is self.optimizer and self._depth <= 1
        if outermost and self.armed and self.agreement is not None and not self._leaves_out:
            self.agreement.after()

    def detach(self) -> None:
        """Remove the hooks; the optimizer is as if this object had never been."""
        self._clear()
        self.agreement, self.shapes = None, False
        self.consumed = 0
        if not steps_running(self.optimizer):  # as the garbage collector finds it, while torch goes through the hooks
            for hook in (self._before, self._after, self._agreeing):
                if hook is not None:
                    hook.remove()
            self._agreeing = None

    # -- around one step -----------------------------------------------------------------------------------------

    def _wrap_step(self) -> None:
        """For one call, `step` of this instance is one that can be left out, and puts the rate back when it raises."""
        inner = self.optimizer.step

        def step(_: Any, *args: Any, **kwargs: Any) -> Any:
            if self._leaves_out and not self.displaced:  # of an earlier run, whose step was never made
                return self._pass_over(*args, **kwargs)
            try:
                return inner(*args, **kwargs)
            except BaseException:
                self._pacing.restore()  # still armed: the step has not been made, and may be tried again
                self._depth = 0
                raise

        # With the attributes of what is there: a learning rate scheduler knows its own wrapper by one.
        functools.update_wrapper(step, getattr(inner, "__func__", inner))
        self._own_step = self.optimizer.__dict__.get("step")
        self._wrapped = MethodType(step, self.optimizer)
        self.optimizer.step = self._wrapped  # type: ignore[method-assign]

    def _pass_over(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        self._clear()
        self.consumed += 1
        if hasattr(self.optimizer.step, "_wrapped_by_lr_sched"):
            self.optimizer._opt_called = True  # type: ignore[attr-defined] # what a scheduler warns without
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if optimizer is not self.optimizer:
            return None  # the stand-in below
        self._depth += 1
        if self._depth > 1 and steps_running(optimizer) < 2:
            self._pacing.restore()
            self._depth = 1
        if not self.armed:
            self._others_armed = any(guard.armed for guard in _guards_on(optimizer))
            return None
        self._assert_attributes()
        if self._depth > 1:  # `step` has called `super().step()`
            return None
        if self._leaves_out and not self.displaced:
            # Somebody had kept the method from before it was wrapped (Accelerate does, with a scaler). It runs on nothing.
            return (without_parameters(optimizer), *args[1:]), kwargs
        self._begin()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            return None
        closure = watched(closure, optimizer, lambda: self._within)
        return (args[0], closure), {k: v for k, v in kwargs.items() if k != "closure"}

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if optimizer is not self.optimizer:
            return
        self._depth = max(self._depth - 1, 0)
        if self._depth:
            return
        if self.armed:
            measure = self._measure if self._fold is not None or self._within else None
            self._clear()
            self.consumed += 1
            if (
                measure is not None
            ):  # the fused step has written the scaled gradients back, or the closure had more to do
                measure()
        elif self.consumed and not self._others_armed and moves(optimizer):
            self.unarmed += 1
            if self.unarmed == 1:
                logger.warning(
                    "Adaptive clipping: `clip_` must be called before every `optimizer.step()`, but %s has made a step without it after "
                    "%d steps with it. Its gradients were not clipped.",
                    type(optimizer).__name__,
                    self.consumed,
                )

    def _begin(self) -> None:
        if self._measure is not None and self._fold is None and not self._within:
            self._measure()
        if self.displaced:  # what an earlier run has prepared and never made
            return
        if self._pace is not None:
            # Fused Adam(W) takes the rate as a tensor; other optimizers compute with it on the host.
            on_device = self.path == "device" and isinstance(self._pace, Tensor)
            pace = self._pace if on_device else float(self._pace)
            self._pacing.apply(pace, getattr(self.optimizer, "found_inf", None) if on_device else None)
        if self.agreement is not None and not self._leaves_out:
            self.agreement.before()

    def _assert_attributes(self) -> None:
        """What a GradScaler has written over ours, just before it called `step`."""
        optimizer: Any = self.optimizer
        if self._skip is not None:
            theirs = getattr(optimizer, "found_inf", None)
            if theirs is not self._skip:
                optimizer.found_inf = self._skip if theirs is None else torch.clamp(theirs + self._skip, max=1.0)
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None and scale is not self._fold and stepping_scaler() is not None:
            raise ClippingDefeatedError(NOT_UNSCALED)

    def _clear(self) -> None:
        # What is armed is armed for one step: a stale flag would skip, and a stale rate would compound.
        self._pacing.restore()
        if self.agreement is not None:
            self.agreement.forget()
        for group, kept in zip(self.optimizer.param_groups, self._kept, strict=False):
            group.update(kept)
        if self._wrapped is not None and self.optimizer.__dict__.get("step") is self._wrapped:
            if self._own_step is None:
                del self.optimizer.step
            else:
                self.optimizer.step = self._own_step  # type: ignore[method-assign]
        if self.path == "device":
            self.optimizer.found_inf = None  # type: ignore[attr-defined]
        if self._fold is not None:
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self._kept, self._leaves_out, self.armed = [], False, False
        self._pace = self._measure = self._skip = self._fold = self._wrapped = self._own_step = None


def _guards_on(optimizer: torch.optim.Optimizer) -> list[StepGuard]:
    owners = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values())
    return [owner for owner in owners if isinstance(owner, StepGuard)]
