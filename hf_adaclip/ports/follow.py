"""A run under an engine that steps by itself (DeepSpeed): its norms are followed, its next threshold is set."""

from collections.abc import Callable

from torch import Tensor

from hf_adaclip.controllers.base import is_finite_norm
from hf_adaclip.controllers.numerics.ops import Value
from hf_adaclip.errors import ConfigError
from hf_adaclip.gradients import to_value
from hf_adaclip.ports.accelerate import AcceleratorPort
from hf_adaclip.ports.deepspeed import EnginePort
from hf_adaclip.run.run import Run


class EngineFollower:
    """Keeps a run in step with an engine.

    Args:
        port: The accelerator, which has the engine or will have it once it has prepared a model.
        run: What decides, one step late.
    """

    def __init__(self, port: AcceleratorPort, run: Run) -> None:
        self._port, self._run = port, run
        self._engine: EnginePort | None = None

    def follow(self, observe: Callable[[Tensor], Value]) -> Tensor:
        """Take in the step that the engine has made, and find the next threshold.

        Args:
            observe: Gives the loss as a number of the run's kind; called with the norm, once the kind is known.

        Returns:
            The norm before clipping.
        """
        total = self.attach().norm
        if self._port.syncs_now:
            ops = self._run.begin(total.device)
            norm = to_value(total, ops)
            self._run.decide(norm, norm, observe(total), is_finite_norm(norm, ops), loss_scale=None)
            self._run.step += 1
        return total

    def attach(self) -> EnginePort:
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

    def detach(self) -> None:
        """Let go of the engine."""
        if self._engine is not None:
            self._engine.detach()

    def _next_threshold(self) -> float | None:
        told = self._run.state.get("late_threshold")
        if told is None or self._run.config.shadow or not float(told) > 0:
            return None
        return float(told)
