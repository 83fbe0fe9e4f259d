"""Does this torch, and does this optimizer, do what steps are left out, scaled and paced by? Found out before the first step.

On a copy of two numbers: an optimizer of the same class with the same settings. Only classes of torch are copied. One of somebody else
may compile, draw random numbers or talk to other ranks as it is made; it is looked at in the first real step (`FirstStepCheck`).
"""

import inspect
import sys
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import lr_scheduler
from torch.optim import optimizer as torch_optimizer

from hf_adaclip.errors import UnsupportedSetupError
from hf_adaclip.gradients.optimizers import SkipPath
from hf_adaclip.reliance import RELIANCES, missing, require, require_mention

_RATE: Final = 2.0**-4  # of the copy: a step of it shows in every dtype
_PACE: Final = 2.0
_SCALE: Final = 4.0
_START: Final = 1.0
_GRADIENT: Final = 0.5
_SAME: Final = 0.01
"""Relative difference that rounding explains."""


def check_torch() -> None:
    """Whether torch has what is relied on.

    Raises:
        UnsupportedSetupError: Something is missing.
    """
    for row in RELIANCES:
        if row.owner == "torch":
            require(torch, row.name)
    require(require(torch.utils, "_foreach_utils"), "_group_tensors_by_device_and_dtype")
    require(torch.Tensor, "_version")
    require(sys, "_getframe")
    require(torch_optimizer, "_global_optimizer_pre_hooks")
    require(torch.optim.Optimizer, "profile_hook_step")
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        require_mention([torch.optim.Optimizer.__init__], name)
    for name in ("_wrapped_by_lr_sched", "_opt_called"):
        require_mention([lr_scheduler.LRScheduler.step], name)


def probe(optimizer: torch.optim.Optimizer, path: SkipPath, *, paced: bool) -> None:
    """Make steps of a copy: one that is left out, one that scales, and one at another rate.

    Args:
        optimizer: The real one, which is not touched.
        path: How it leaves out steps.
        paced: Whether its rate is going to be paced.

    Raises:
        UnsupportedSetupError: A step was not left out or not scaled, or does not go by its rate.
    """
    kind = type(optimizer)
    groups = [group for group in optimizer.param_groups if group["params"]]
    if kind.__module__.split(".")[:2] != ["torch", "optim"] or not groups or not (paced or path == "device"):
        return
    known = set(inspect.signature(kind).parameters) - {"params", "lr"}
    settings = {name: value for name, value in groups[0].items() if name in known}
    like = groups[0]["params"][0]
    if like.is_meta:
        return
    try:
        plain, other, copy = (_Copy(kind, settings, like) for _ in range(3))
        first, second = plain.step(), plain.step()
    except Exception:
        return  # one that needs a closure, or sparse gradients: the first real step is looked at
    if path == "device":
        _require_skip_and_scale(copy, first)
    # In the second step: some optimizers keep the rate of their first one.
    other.step()
    if paced and second and abs(other.step(pace=_PACE) / second - 1) < _SAME:
        raise UnsupportedSetupError(
            f"`optimizer` must go by the learning rate of its groups when `max_pace` > 1, but {kind.__name__} moved as far at {_PACE:g} "
            "times the rate. Set `max_pace=1`, or choose another optimizer."
        )


def _require_skip_and_scale(copy: "_Copy", first: float) -> None:
    # A first step that is left out must leave no trace either: the one after it goes as far as a first one.
    if copy.step(found_inf=1.0) or abs(copy.step(found_inf=0.0) - first) > _SAME * first:
        raise missing("found_inf")
    before = copy.everything()
    copy.step(found_inf=1.0)
    if any(not torch.equal(a, b) for a, b in zip(before, copy.everything(), strict=True)):
        raise missing("found_inf")
    copy.step(grad_scale=_SCALE)
    if abs(float(copy.gradient.float().mean()) * _SCALE / _GRADIENT - 1) > _SAME:
        raise missing("grad_scale")


class _Copy:
    """An optimizer with one parameter of two numbers."""

    def __init__(self, kind: Any, settings: dict[str, Any], like: Tensor) -> None:
        dtype = like.dtype if like.is_floating_point() else torch.float32
        local = like.to_local() if hasattr(like, "to_local") else like
        # Of two dimensions, because some are made for matrices alone.
        self._parameter = torch.nn.Parameter(torch.full((1, 2), _START, dtype=dtype, device=local.device))
        self._optimizer: Any = kind([self._parameter], lr=_RATE, **settings)
        # Past the hooks: those that somebody has registered for all optimizers are not to see this one.
        self._step = getattr(kind.step, "__wrapped__", kind.step)

    @property
    def gradient(self) -> Tensor:
        assert self._parameter.grad is not None
        return self._parameter.grad

    def everything(self) -> list[Tensor]:
        """Weights, moments and counters."""
        state = self._optimizer.state.get(self._parameter, {})
        return [v.detach().clone() for v in (self._parameter, *state.values()) if isinstance(v, Tensor)]

    @torch.no_grad()
    def step(self, *, pace: float = 1.0, found_inf: float | None = None, grad_scale: float | None = None) -> float:
        """How far one step goes."""
        parameter = self._parameter
        before = parameter.detach().clone()
        parameter.grad = torch.full_like(parameter, _GRADIENT)
        for name, value in (("found_inf", found_inf), ("grad_scale", grad_scale)):
            number = None if value is None else torch.tensor(value, dtype=torch.float32, device=parameter.device)
            setattr(self._optimizer, name, number)
        self._optimizer.param_groups[0]["lr"] = _RATE * pace
        self._step(self._optimizer)
        return float((parameter - before).abs().sum())
