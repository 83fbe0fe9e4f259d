"""A run under an engine that steps by itself (DeepSpeed): its norms are followed, its next threshold is set."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hf_adaclip.controllers.base import is_finite_norm
from hf_adaclip.errors import ConfigError
from hf_adaclip.gradients import to_value
from hf_adaclip.gradients.norms import Parameters
from hf_adaclip.incidents.capture import IncidentCapture
from hf_adaclip.ports.accelerate import AcceleratorPort
from hf_adaclip.ports.deepspeed import EnginePort
from hf_adaclip.run.losses import LossObserver
from hf_adaclip.run.run import Run, check_static_threshold


class FollowingDriver:
    """Keeps a run in step with an engine.

    Args:
        run: What decides, one step late.
        port: The accelerator, which has the engine or will have it once it has prepared a model.
        losses: What makes a training loss of the run's kind.
        incidents: Hears of every step.
    """

    why_skipping: Sequence[str] = (EnginePort.WHY,)
    why_scaling: str | None = EnginePort.SCALING
    parameters: Sequence[Tensor] = ()
    optimizers: Sequence[torch.optim.Optimizer] = ()
    off: Mapping[str, str] = MappingProxyType({})

    def __init__(self, run: Run, port: AcceleratorPort, losses: LossObserver, incidents: IncidentCapture) -> None:
        self._incidents = incidents
        self._port, self._run, self._losses = port, run, losses
        self._engine: EnginePort | None = None

    @property
    def grip(self) -> "FollowingDriver":
        return self

    def clip_(self, parameters: Parameters, loss: Tensor | float | None, *, measure: bool | None) -> Tensor:
        """Take in the step that the engine has made, and find the next threshold."""
        total = self._attach().norm
        if self._port.syncs_now:
            ops = self._run.begin(total.device)
            norm, seen_loss = to_value(total, ops), self._losses.observe(loss, total.device)
            self._run.decide(norm, norm, seen_loss, is_finite_norm(norm, ops), loss_scale=None)
            self._incidents.made()
            self._run.step += 1
        return total

    def check(self) -> None:
        self._attach()

    def set_static_threshold(self, value: float) -> None:
        check_static_threshold(value)
        raise ConfigError(
            f"`static_threshold` must stay what the DeepSpeed config says, but is to become {value:g}: the engine clips."
        )

    def take_script_threshold(self, max_norm: float) -> None:
        """Nothing: the engine has a threshold of its own."""

    def leave_out(self) -> None:
        self._run.leave_out()

    def keep(self, tensors: dict[str, Tensor] | None = None) -> Callable[[], None]:
        return lambda: None

    def kept(self) -> dict[str, Tensor] | None:
        return None

    def loaded(self) -> None:
        self._attach()  # the engine's own checkpoint brings an old threshold along

    def detach(self) -> None:
        """Let go of the engine."""
        if self._engine is not None:
            self._engine.detach()

    def begin_epoch(self) -> None:
        """There is no pace to take back."""

    def evaluated(self, loss: float) -> None:
        """There is no pace to take back."""

    def sees(self, batch: Any) -> None:
        """There is no spectral range."""

    def _attach(self) -> EnginePort:
        """From here on the engine is told its threshold before every step.

        Raises:
            ConfigError: A static threshold is set that is not the engine's.
            UnsupportedSetupError: The engine's threshold cannot be set.
        """
        if self._engine is None:
            engine = EnginePort(self._port.engine(), self._next_threshold)
            configured, wanted = engine.static_threshold, self._run.config.static_threshold
            if wanted not in (None, configured):
                engine.detach()
                raise ConfigError(
                    f"`static_threshold` must be the `gradient_clipping` of the DeepSpeed config ({configured:g}), which rules its first "
                    f"step, but is {wanted} instead. Leave it unset."
                )
            self._engine, self._run.static_threshold = engine, configured
        return self._engine

    def _next_threshold(self) -> float | None:
        told = self._run.state.get("late_threshold")
        if told is None or self._run.config.shadow or not float(told) > 0:
            return None
        return float(told)
