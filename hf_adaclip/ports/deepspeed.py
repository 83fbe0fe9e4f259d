"""What the clipper needs of a DeepSpeed engine, without importing DeepSpeed.

`accelerator.backward` runs the engine's whole step: norm, clipping, optimizer, all before a script gets to clip anything. What can be
set from outside is the engine's threshold, before the backward pass, from what is known by then: the norms of earlier steps.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from hf_adaclip.errors import UnsupportedSetupError
from hf_adaclip.gradients.transfer import HOST
from hf_adaclip.reliance import require


class EnginePort:
    """Sets the threshold of an engine and reads its norm.

    Args:
        engine: A `deepspeed.DeepSpeedEngine`.
        threshold: Called before every forward pass: the threshold of the coming step, or None while there is none.

    Raises:
        UnsupportedSetupError: The engine does not clip, or not by a threshold that can be set (ZeRO stages 1 to 3 can), or lacks what is
            relied on.
    """

    WHY: Final = (
        "the engine leaves a step out that is not finite; in bfloat16, where it does not, a hook on its optimizer does"
    )

    SCALING: Final = "the engine scales inside its own step"

    def __init__(self, engine: Any, threshold: Callable[[], float | None]) -> None:
        self._engine, self._threshold = engine, threshold
        self._zero = engine.optimizer
        if any(kind.__module__.startswith("deepspeed.runtime.zero.") for kind in type(self._zero).__mro__):
            require(self._zero, "clip_grad")
            require(self._zero, "_global_grad_norm")
        if not hasattr(self._zero, "clip_grad") or not hasattr(self._zero, "_global_grad_norm"):
            raise UnsupportedSetupError(
                f"`zero_optimization.stage` of the DeepSpeed config must be 1, 2 or 3, but the engine has a "
                f"{type(self._zero).__name__} instead, whose threshold cannot be set."
            )
        configured = engine.gradient_clipping()
        if not isinstance(configured, int | float) or not configured > 0:  # 'auto' too, where nobody has filled it in
            raise UnsupportedSetupError(
                f"`gradient_clipping` of the DeepSpeed config must be above 0, but is {configured} instead: the engine "
                "would not clip at all. Set it to 1.0 (with Accelerate), or to 'auto' in a Trainer, which then takes `max_grad_norm`."
            )
        inner = getattr(self._zero, "optimizer", None)
        # Before the forward pass and not after the step: loading a checkpoint puts an old threshold back in between.
        self._handles = [engine.register_forward_pre_hook(self._tell)]
        if isinstance(inner, torch.optim.Optimizer):
            self._handles.append(inner.register_step_pre_hook(self._leave_out))

    @property
    def static_threshold(self) -> float:
        """The threshold that the engine was configured with: the one of its first step."""
        return float(self._engine.gradient_clipping())

    @property
    def norm(self) -> Tensor:
        """Global norm of the step that was just taken, before clipping, float32, shape `[]` in host memory (the engine has read it)."""
        return torch.tensor(_norm_of(self._engine.get_global_grad_norm()), dtype=torch.float32, device=HOST)

    def detach(self) -> None:
        """Remove the hooks; the engine keeps the last threshold."""
        for handle in self._handles:
            handle.remove()

    def _tell(self, module: Any, args: Any) -> None:
        value = self._threshold()
        if value is not None:
            self._zero.clip_grad = value

    def _leave_out(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # In bfloat16, ZeRO stages 1 and 2 apply a step that is not finite. Without gradients the optimizer passes over its parameters.
        if not math.isfinite(_norm_of(self._zero._global_grad_norm)):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None


def _norm_of(value: Any) -> float:
    """A norm as DeepSpeed keeps it: a number or a tensor; -1 stands for one that is not finite, None for none."""
    norm = math.nan if value is None else float(value)
    return norm if norm >= 0 else math.nan
