"""Does clipping take effect here? A spike planted on a copy, and the first real step measured at the last moment.

Several packages that promise adaptive clipping are silent no-ops in some setups. These two checks turn that into an error at the
first step. They cost two more reads of the gradients in one step, and a few milliseconds at the start.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import CONTROLLERS, Observation, build_controller
from hf_adaclip.controllers.base import is_finite_norm
from hf_adaclip.controllers.ops import ops_for
from hf_adaclip.errors import ClippingDefeatedError
from hf_adaclip.gradients import global_norm, scale_, tensor_norms, to_value

SPIKE = 1000.0
"""How many times the calm norm the planted spike has."""
TOLERANCE = 0.01
"""Relative difference of two norms of the same gradient that rounding explains (bfloat16: 1 in 256)."""
_MAX_CALM_STEPS = 300
_MAX_NUMBERS = 4096
_PATIENCE = 20  # a loss scaler that starts too high leaves out the first steps by itself


def check_on_a_copy(config: AdaptiveClipConfig, static_threshold: float, like: Sequence[Tensor]) -> None:
    """Plant a spike on copies of a few small parameters, one of every device and dtype, and see it cut.

    The controller is a new one under the same config, fed with a calm series first. Neither the parameters nor any state of the
    run are touched.

    Args:
        config: The settings.
        static_threshold: Threshold of the warm-up.
        like: The trainable parameters.

    Raises:
        ClippingDefeatedError: The spike came through.
    """
    if CONTROLLERS[config.controller].fine:
        return  # no threshold of its own; the measurement in the first step covers it
    copies = [torch.ones_like(p, requires_grad=False) for p in _representatives(like)]
    if not copies:
        return
    controller = build_controller(config)
    device = copies[0].device
    ops = ops_for(device, ())
    state = controller.init(ops, ())
    calm = max(static_threshold, config.min_threshold or 0.0) / 2
    static = ops(static_threshold)
    with torch.no_grad(), np.errstate(all="ignore"):
        unit = float(global_norm(tensor_norms(copies)))
        for _ in range(min(config.warmup_observations, _MAX_CALM_STEPS) + 1):
            seen = Observation(ops(calm), ops(math.nan), static)
            _, state = controller.update(state, seen)
        scale_(copies, ops(SPIKE * calm / unit))
        planted = to_value(global_norm(tensor_norms(copies)), ops)
        decision, _ = controller.update(
            state, Observation(planted, ops(math.nan), static, is_finite_norm(planted, ops))
        )
        scale_(copies, decision.coefficient)
        # By another way than the one that is under test.
        left = math.sqrt(sum(float(_whole(c).double().square().sum()) for c in copies))
    allowed = float(decision.threshold) * (1 + TOLERANCE)
    if not left <= allowed or not left < SPIKE * calm / 10:
        raise ClippingDefeatedError(
            f"A planted spike must be cut, but one of norm {SPIKE * calm:g} was left at {left:g} ({allowed:g} allowed) by controller "
            f"'{config.controller}' on {device}. Please report this with the versions in use; `self_test=False` trains without the check."
        )


def _representatives(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The largest parameter of moderate size for every device and dtype."""
    chosen: dict[Any, Tensor] = {}
    for p in parameters:
        key = (p.device, p.dtype, type(p).__name__)
        if (
            p.requires_grad
            and 0 < p.numel() <= _MAX_NUMBERS
            and (key not in chosen or p.numel() > chosen[key].numel())
        ):
            chosen[key] = p.detach()
    return list(chosen.values())


def _whole(tensor: Tensor) -> Tensor:
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


class FirstStepCheck:
    """Compares what clipping left with what the optimizer is given, in the first step that is finite.

    Args:
        enabled: Whether to check at all.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._pending = enabled
        self._left: Tensor | None = None
        self._waiting: list[Tensor] = []  # what clipping left in steps after which no optimizer was seen to step

    @property
    def pending(self) -> bool:
        """Whether the check is still to be made."""
        return self._pending

    def clipped(self, gradients: list[Tensor]) -> str | None:
        """Remember the norm that clipping left. Returns a warning when the optimizer that was named never seems to step."""
        if len(self._waiting) == _PATIENCE:
            # A step that is not finite is left out, and says nothing about who steps.
            self._waiting = [left for left in self._waiting if math.isfinite(float(left))]
        if len(self._waiting) < _PATIENCE:
            self._left = global_norm(tensor_norms(gradients))
            self._waiting.append(self._left)
            return None
        self._pending = False
        return (
            f"`optimizer` must be the one that steps on these gradients, but its `step` was not called in {_PATIENCE} steps with a finite "
            "norm: it cannot leave out a step that is not finite, nor be paced."
        )

    def stepping(self, gradients: list[Tensor]) -> None:
        """Compare with the norm that the optimizer is about to read.

        Raises:
            ClippingDefeatedError: It is larger. The optimizer has not stepped yet.
        """
        if not self._pending or self._left is None:
            return
        left, given = float(self._left), float(global_norm(tensor_norms(gradients)))
        if not math.isfinite(left):
            return  # a step that is left out; the next one will tell
        self._pending = False
        if not given <= left * (1 + TOLERANCE):
            raise ClippingDefeatedError(
                f"The gradient must reach the optimizer as clipping left it, but its norm was {left:g} after clipping and is {given:g} at "
                "`optimizer.step()`: something changes it in between. Look at callbacks with `on_pre_optimizer_step`, at hooks on the "
                "optimizer, and at a loop that unscales or multiplies gradients after clipping. If that is meant to be, set "
                "`self_test=False`."
            )
