"""What a clipper asks of its driver. Which one it is depends on who makes the optimizer's step, and is settled when it is made."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_adaclip.gradients.norms import Parameters


class Grip(Protocol):
    """What holds on to optimizers or to an engine. It outlives the clipper, so it must not lead back to models or to the clipper."""

    def detach(self) -> None:
        """Let go; everything is as if this object had never been."""


class Driver(Protocol):
    """Takes a run through its steps."""

    @property
    def grip(self) -> Grip:
        """What has to let go at the end."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The trainable parameters as far as they are known before the first step; else none."""

    @property
    def why_skipping(self) -> Sequence[str]:
        """Per known optimizer, how a step is left out and why so."""

    @property
    def off(self) -> Mapping[str, str]:
        """Why parts of the default do not act, by part, as far as the steps have shown."""

    @property
    def why_scaling(self) -> str | None:
        """Why gradients are scaled where they are; None where the optimizer's step does it."""

    def clip_(self, parameters: Parameters, loss: Tensor | float | None, *, measure: bool | None) -> Tensor:
        """See `AdaptiveClipper.clip_`."""

    def check(self) -> None:
        """What can be found out before the first step about whether clipping will take effect.

        Raises:
            ClippingDefeatedError: It will not.
            UnsupportedSetupError: It cannot.
        """

    def set_static_threshold(self, value: float) -> None:
        """See `AdaptiveClipper.set_static_threshold`."""

    def take_script_threshold(self, max_norm: float) -> None:
        """A script that clips through `install` has said its `max_norm`."""

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """Those that are known."""

    def leave_out(self) -> None:
        """Count a step for which there is no gradient."""

    def keep(self, tensors: dict[str, Tensor] | None = None) -> Callable[[], None]:
        """What puts back what is kept for single parameters, once the weights are put back; or `tensors` in its place, of a checkpoint."""

    def kept(self) -> dict[str, Tensor] | None:
        """What a checkpoint keeps beside the controller's state."""

    def loaded(self) -> None:
        """The run has been loaded, before its first step or to go back."""

    def begin_epoch(self) -> None:
        """See `AdaptiveClipper.begin_epoch`."""

    def evaluated(self, loss: float) -> None:
        """See `AdaptiveClipper.evaluated`."""

    def sees(self, batch: Any) -> None:
        """See `AdaptiveClipper.watch`."""
