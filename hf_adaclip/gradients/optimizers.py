"""What has to be known of one optimizer, whoever wrote it, before its steps can be guarded."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from hf_adaclip.errors import ClippingDefeatedError, ConfigError
from hf_adaclip.reliance import is_of, require, require_mention

SkipPath = Literal["device", "scaler", "host"]
"""How an optimizer leaves out a step: see `step_guard`."""
_DEVICE_SKIP = (torch.optim.Adam, torch.optim.AdamW)


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside `AcceleratedOptimizer` wrappers, which do not forward attributes.

    Raises:
        ConfigError: There is no `torch.optim.Optimizer` inside.
    """
    inner = optimizer
    if is_of("accelerate", inner):
        require(inner, "accelerator_state")
    while not isinstance(inner, torch.optim.Optimizer) or hasattr(inner, "accelerator_state"):
        deeper = getattr(inner, "optimizer", None)
        if deeper is None or deeper is inner:
            raise ConfigError(
                f"`optimizer` must be a torch.optim.Optimizer, possibly prepared by Accelerate, but is "
                f"{type(optimizer).__name__} instead. Pass what `optimizer.step()` is called on."
            )
        inner = deeper
    return inner


def distinct(optimizers: Iterable[Any]) -> list[Any]:
    """Each optimizer once, however often it is named and whatever is wrapped around it. An engine's own counts as itself."""
    found: dict[int, Any] = {}
    for optimizer in optimizers:
        try:
            key = id(unwrap_optimizer(optimizer))
        except ConfigError:
            key = id(optimizer)
        found.setdefault(key, optimizer)
    return list(found.values())


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def moves(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step just made had gradients and a rate: without, it only builds state (FSDP2 does that as it loads a checkpoint)."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    still = all(not isinstance(rate, Tensor) and rate == 0 for rate in rates)
    return not still and any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def without_parameters(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer with nothing to step on; what it sets on itself is lost."""
    stand_in: torch.optim.Optimizer = object.__new__(type(optimizer))
    stand_in.__dict__.update(vars(optimizer), param_groups=[], state=defaultdict(dict))
    return stand_in


def unscales_by_itself(optimizer: Any) -> bool:
    """Whether a fused optimizer divides the loss scale out within its step."""
    require_mention([torch.optim.Adam.__init__], "_step_supports_amp_scaling")
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def takes_flag(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it leaves a step out on the device, where `found_inf` says so."""
    return type(optimizer) in _DEVICE_SKIP and all(group.get("fused") for group in optimizer.param_groups)


def choose_path(optimizer: torch.optim.Optimizer, scaler: bool) -> tuple[SkipPath, str]:
    name = type(optimizer).__name__
    if scaler:
        return "scaler", "a GradScaler is active and skips overflowing steps by itself"
    if type(optimizer) not in _DEVICE_SKIP:
        return "host", f"{name} cannot skip a step on the device; one flag is read by the host per step"
    if not takes_flag(optimizer):
        return "host", f"{name} is not fused; one flag is read by the host per step (`fused=True` avoids it)"
    return "device", f"fused {name} skips a step on the device; the host reads nothing"


def watched(
    closure: Callable[[], Any], optimizer: torch.optim.Optimizer, clipped_within: Callable[[], bool]
) -> Callable[[], Any]:
    """A closure that is found out when it computes the gradients anew after they were clipped.

    Args:
        closure: What `optimizer.step` was given.
        optimizer: The optimizer.
        clipped_within: Whether the closure has had its gradients clipped itself.
    """

    def call() -> Any:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = [(p.grad, None if p.grad is None else p.grad._version) for p in parameters]
        value = closure()
        anew = any(
            p.grad is not None and (p.grad is not grad or p.grad._version != version)
            for p, (grad, version) in zip(parameters, before, strict=True)
        )
        if anew and not clipped_within():
            raise ClippingDefeatedError(
                "`closure` must leave the gradients as `clip_` left them, but it has computed them anew in `optimizer.step(closure)`. "
                "Call `clip_` in the closure, after `backward`, or call `optimizer.step()` without it."
            )
        return value

    return call
