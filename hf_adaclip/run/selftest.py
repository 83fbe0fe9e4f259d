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
from hf_adaclip.controllers.numerics.ops import Lane, ops_for
from hf_adaclip.errors import ClippingDefeatedError
from hf_adaclip.gradients import global_norm, scale_, tensor_norms, to_value
from hf_adaclip.gradients.callers import stepping_scaler
from hf_adaclip.gradients.step_guard import NOT_UNSCALED
from hf_adaclip.ledger.schema import APPLIED_TOLERANCE

RISE = 1000.0
"""How many times the calm norm the planted spike has."""
PLANTED = 256.0
"""Every number of the copies: all dtypes hold it and what clipping leaves of it. The norm is reckoned up to the threshold's size."""
USUAL = 1e-3, 1e15
"""A threshold outside is tested as 1. Above, its spike or the square of that is no float32, so no norm would get there; below, the small
constants that methods add to a norm or a spread let every spike through, which is theirs to do."""
_MAX_CALM_STEPS = 300
_MAX_NUMBERS = 4096
_NUMBERS = 64


def check_on_a_copy(
    config: AdaptiveClipConfig, static_threshold: float, like: Sequence[Tensor], lane: Lane = ops_for
) -> None:
    """Plant a spike on small tensors, one of every device, dtype and kind that parameters have, and see it cut.

    The controller is a new one under the same config, fed with a calm series first. Neither the parameters nor any state of the
    run are touched.

    Args:
        config: The settings.
        static_threshold: Threshold of the warm-up.
        like: The trainable parameters.
        lane: Chooses the kind of numbers that the run works with.

    Raises:
        ClippingDefeatedError: The spike came through.
    """
    if CONTROLLERS[config.controller].fine:
        return  # no threshold of its own; the measurement in the first step covers it
    level = max(static_threshold, config.min_threshold or 0.0)
    if not USUAL[0] <= level <= USUAL[1]:
        config, static_threshold, level = config.replace(min_threshold=None, static_threshold=1.0), 1.0, 1.0
    copies = [_planted(p) for p in _representatives(like)]
    if not copies:
        return
    controller = build_controller(config)
    device = copies[0].device
    ops = lane(device, ())
    state = controller.init(ops, ())
    calm, static = level / 2, ops(static_threshold)
    # What one unit of the copies' norm stands for.
    unit = RISE * calm / (PLANTED * math.sqrt(sum(c.numel() for c in copies)))
    with torch.no_grad(), np.errstate(all="ignore"):
        for _ in range(min(getattr(config.settings, "warmup_observations", 0), _MAX_CALM_STEPS) + 1):
            seen = Observation(ops(calm), ops(math.nan), static)
            _, state = controller.update(state, seen)
        planted = to_value(global_norm(tensor_norms(copies)), ops) * ops(unit)
        decision, _ = controller.update(
            state, Observation(planted, ops(math.nan), static, is_finite_norm(planted, ops))
        )
        scale_(copies, decision.coefficient)
        # By another way than the one that is under test.
        left = unit * math.sqrt(sum(float(_whole(c).abs().double().square().sum()) for c in copies))
    allowed = float(decision.threshold) * (1 + APPLIED_TOLERANCE)
    if not left <= allowed or not left < RISE * calm / 10:
        raise ClippingDefeatedError(
            f"A planted spike must be cut, but one of norm {RISE * calm:g} was left at {left:g} ({allowed:g} allowed) by controller "
            f"'{config.controller}' on {device}. Please report this with the versions in use; `self_test=False` trains without the check."
        )


def _representatives(parameters: Sequence[Tensor]) -> list[Tensor]:
    """One trainable parameter for every device, dtype and kind: the largest of moderate size, or else the smallest."""
    chosen: dict[Any, Tensor] = {}
    for p in parameters:
        key = (p.device, p.dtype, type(p).__name__)
        if p.requires_grad and p.numel() and not p.is_meta:
            sizes = [q.numel() for q in (p, chosen.get(key, p))]
            moderate = [size for size in sizes if size <= _MAX_NUMBERS]
            if key not in chosen or sizes[0] == (max(moderate) if moderate else min(sizes)):
                chosen[key] = p.detach()
    return list(chosen.values())


def _planted(parameter: Tensor) -> Tensor:
    """A tensor like this one, and small if it is a plain one: of others the shape may matter, such as for how ranks share it."""
    if type(parameter) is Tensor:
        return torch.full((_NUMBERS,), PLANTED, dtype=parameter.dtype, device=parameter.device)
    return torch.full_like(parameter, PLANTED, requires_grad=False)


def _whole(tensor: Tensor) -> Tensor:
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


class FirstStepCheck:
    """Compares what clipping left with what the optimizer is given: in the first step that is finite, and when hooks or optimizers change.

    Args:
        enabled: Whether to check at all.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = self._pending = enabled
        self._left: Tensor | None = None

    @property
    def pending(self) -> bool:
        """Whether the check is still to be made."""
        return self._pending

    def again(self) -> None:
        """Check the next step too: somebody may have come in between."""
        self._pending = self._enabled

    def clipped(self, gradients: list[Tensor]) -> None:
        """Remember the norm that clipping left."""
        self._left = global_norm(tensor_norms(gradients))

    def stepping(self, gradients: list[Tensor]) -> str | None:
        """Compare with the norm that the optimizer is about to read.

        Returns:
            A warning when it is smaller.

        Raises:
            ClippingDefeatedError: It is larger, or the loss scale was still in it when it was clipped. The optimizer has not stepped yet.
        """
        if not self._pending or self._left is None:
            return None
        left, given = float(self._left), float(global_norm(tensor_norms(gradients)))
        if not math.isfinite(left):
            return None  # a step that is left out; the next one will tell
        self._pending = False
        if given < left * (1 - APPLIED_TOLERANCE):
            scaler = stepping_scaler()
            if (
                scaler is not None and abs(left / (given * scaler.get_scale()) - 1) < APPLIED_TOLERANCE
            ):  # divided out just now
                raise ClippingDefeatedError(NOT_UNSCALED)
            return (
                f"the gradient had a norm of {left:g} after clipping and {given:g} at `optimizer.step()`: something makes it smaller in "
                "between, and decides how far the step goes. Look at callbacks and hooks that clip or scale again, and whether `clip_` "
                "stands before `optimizer.step()`."
            )
        if not given <= left * (1 + APPLIED_TOLERANCE):
            raise ClippingDefeatedError(
                f"The gradient must reach the optimizer as clipping left it, but its norm was {left:g} after clipping and is {given:g} at "
                "`optimizer.step()`: something changes it in between. Look at callbacks with `on_pre_optimizer_step`, at hooks on the "
                "optimizer, and at a loop that unscales or multiplies gradients after clipping. If that is meant to be, set "
                "`self_test=False`."
            )
        return None
