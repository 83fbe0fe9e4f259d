"""`AdaptiveClipper`: controller, gradients and ledger in one object, driven once per optimizer step."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_adaclip.accelerator import AcceleratorPort
from hf_adaclip.alerts import Alerts
from hf_adaclip.audit.records import (
    Summary,
    state_fields,
    state_from_tensors,
    state_to_json,
    state_to_tensors,
    summarise,
)
from hf_adaclip.checkpoint import STATE_FILE, read_state, write_state
from hf_adaclip.config import AdaptiveClipConfig, ClipArgument
from hf_adaclip.controllers import Observation, build_controller
from hf_adaclip.controllers.base import coefficient_of, is_finite_norm
from hf_adaclip.controllers.ops import Ops, Value, ops_for
from hf_adaclip.describe import describe
from hf_adaclip.errors import ConfigError, StateError
from hf_adaclip.events import ClipEvent
from hf_adaclip.gradients import (
    Gradients,
    StepGuard,
    TensorNorms,
    collect,
    global_norm,
    observe_loss,
    scale_,
    tensor_norms,
    to_value,
)
from hf_adaclip.gradients.norms import Parameters
from hf_adaclip.recorder import Recorder, is_rank_zero, start_recorder
from hf_adaclip.statistics import RunStatistics

logger = logging.getLogger(__name__)

MEASURE_EVERY = 50  # steps between two measurements of the applied norm, in loops that do not say otherwise


class AdaptiveClipper:
    """Adaptive gradient clipping for any PyTorch loop.

    Call [`clip_`] once per optimizer step, between `backward` and `optimizer.step()`, in place of
    `torch.nn.utils.clip_grad_norm_` or `accelerator.clip_grad_norm_`.

    Args:
        clip: A controller name, an [`AdaptiveClipConfig`], or the path of its JSON.
        accelerator: The loop's `accelerate.Accelerator`. Its loss scale is divided out before the norm is taken, and the
            controller's state is saved and loaded with `save_state` and `load_state`.
        optimizer: The optimizer (or several) that steps on these gradients. Known, a fused Adam(W) on an accelerator leaves a
            non-finite step out without a host read, and the applied norm is measured at the last moment. Needed when
            `max_pace` > 1; otherwise the only optimizer that an accelerator has prepared is taken.
        ledger: Overrides `config.ledger`; `"auto"` means no ledger here.
        static_threshold: Overrides `config.static_threshold`; unset in both, 1.0.
        is_main_process: Whether this process writes the ledger; by default rank 0.

    Raises:
        ConfigError: A setting is wrong, or `max_pace` > 1 without an optimizer.
        UnsupportedSetupError: The accelerator's distributed setup is not supported.

    Example:
        >>> import torch
        >>> from hf_adaclip import AdaptiveClipper
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> clipper = AdaptiveClipper("adaptive", optimizer=optimizer)
        >>> for _ in range(30):
        ...     loss = model(torch.ones(2, 4)).square().mean()
        ...     loss.backward()
        ...     norm = clipper.clip_(model.parameters())
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> clipper.metrics()["clip/skipped"]
        0
    """

    def __init__(
        self,
        clip: ClipArgument = "adaptive",
        *,
        accelerator: Any = None,
        optimizer: Any = None,
        ledger: str | Path | None = "auto",
        static_threshold: float | None = None,
        is_main_process: bool | None = None,
    ) -> None:
        config = AdaptiveClipConfig.resolve(clip)
        if static_threshold is not None:
            config = config.replace(static_threshold=float(static_threshold))
        if ledger != "auto":
            config = config.replace(ledger=None if ledger is None else str(ledger))
        optimizers = (
            () if optimizer is None else tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
        )
        if config.max_pace > 1 and not optimizers:
            raise ConfigError(
                f"`optimizer` must be given when `max_pace` > 1 (it is {config.max_pace}), but is None instead: "
                "the pace multiplies its learning rate."
            )
        self.config = config
        self.statistics = RunStatistics()
        self.alerts = Alerts()
        self._controller = build_controller(config)
        self._static_threshold = 1.0 if config.static_threshold is None else config.static_threshold
        self._optimizers = optimizers
        self._port = None if accelerator is None else AcceleratorPort(accelerator)
        self._scaled = self._port is not None and self._port.has_scaler
        self._guards = [StepGuard(o, scaler=self._scaled) for o in optimizers]
        self._is_main = is_rank_zero() if is_main_process is None else is_main_process
        self._handles: list[Any] = []
        if self._port is not None:
            self._handles = self._port.on_checkpoint(self.flush, self.save_state, self._load_or_start_afresh)

        # Made at the first step, when device and number of tensors are known.
        self._state: tuple[Value, ...] | None = None
        self._recorder: Recorder | None = None
        self._ops: Ops | None = None
        self._num_tensors = 0
        self._tensor_norms = TensorNorms()
        self._loaded: dict[str, Tensor] | None = None
        self._parent: dict[str, Any] | None = None
        self._step = 0
        self._closed = False

    @property
    def step(self) -> int:
        """Optimizer steps decided on so far, over resumptions."""
        return self._step

    @property
    def state(self) -> dict[str, Value]:
        """The controller's state by name; empty before the first step."""
        return {} if self._state is None else state_fields(self._state)

    # -- the step ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def clip_(
        self, parameters: Parameters, *, loss: Tensor | float | None = None, measure: bool | None = None
    ) -> Tensor:
        """Decide on this step's gradient and scale it in place.

        With an accelerator that is still accumulating, the norm so far is returned and nothing else happens.

        Args:
            parameters: Any iterable of parameters, or one tensor.
            loss: Training loss of this step, a scalar. Recorded; needed for the pace to grow.
            measure: Whether to measure and record the norm that really reaches the optimizer (one more read of the gradients, on
                the device). By default once in 50 steps.

        Returns:
            The norm before clipping, float32, shape `[]`, on the gradients' device.

        Raises:
            ConfigError: There is no parameter, or none has a gradient.
            UnsupportedSetupError: A gradient is sparse.
            StateError: The state was loaded from, or made for, other parameters.
            NonFiniteGradientError: Too many steps in a row were not finite (noticed when the rows are read).
        """
        if self._closed:
            raise StateError(
                "`clip_` must be called before `close`, but this clipper was closed. Make a new one for a new run."
            )
        gradients = collect(parameters).required()
        if self._port is not None:
            if not self._port.syncs_now:
                return global_norm(tensor_norms(gradients.tensors))
            self._port.unscale(self._optimizers)
        norms = tensor_norms(gradients.tensors)
        total = global_norm(norms)
        ops, recorder = self._begin(gradients, total.device)

        norm = to_value(total, ops)
        finite = is_finite_norm(norm, ops)
        observed = norm if not self._num_tensors else self._tensor_norms.spread(gradients, norms, finite, ops)
        if loss is None and self.config.looks_at_loss:
            self.alerts.warn_once(
                "`max_pace` > 1 and `divergence_spreads` > 0 need the training loss: call `clip_(..., loss=loss)`."
            )
        seen_loss = observe_loss(loss, total.device, ops, average=self.config.looks_at_loss)
        static = ops(self._static_threshold)
        assert self._state is not None
        with np.errstate(all="ignore"):  # both branches of a `where` are computed, as on a device
            seen = Observation(observed, seen_loss, static, finite)
            decision, self._state = self._controller.update(self._state, seen)
            summary = Summary(*decision) if not self._num_tensors else summarise(norm, observed, *decision)

        applied = decision.coefficient
        if self.config.shadow:
            applied = ops.where(finite, coefficient_of(norm, static, ops), ops(1.0))
        elif self._num_tensors:
            applied = self._tensor_norms.gather(gradients, applied, total.device, ops)
        scale_(gradients.tensors, applied)

        if recorder.full:
            self.flush()
        loss_scale = None if self._port is None else self._port.loss_scale
        recorder.record(norm, summary, seen_loss, loss_scale=loss_scale, scaled=self._scaled, norms=observed)
        measure = self._step % MEASURE_EVERY == 0 if measure is None else measure
        self._arm(gradients, finite, summary.pace, ops, measure)
        self._step += 1
        return total

    def _arm(self, gradients: Gradients, finite: Value, pace: Value, ops: Ops, measure: bool) -> None:
        recorder = self._recorder
        assert recorder is not None

        def take_measure() -> None:
            tensors = [g for i in gradients.present if (g := gradients.parameters[i].grad) is not None]
            if tensors:
                with torch.no_grad():
                    recorder.set_applied(global_norm(tensor_norms(tensors)))

        skip = ~finite
        on_device = bool(self._guards) and all(guard.path == "device" for guard in self._guards)
        # In host memory the flag is a plain bool; on an accelerator, reading it is the one host read of this path.
        if (ops.on_host or not on_device) and bool(skip):
            # Every optimizer passes over parameters without a gradient: no weight, moment or counter moves.
            for i in gradients.present:
                gradients.parameters[i].grad = None
        paced = None if self.config.max_pace == 1 or self.config.shadow else pace
        for position, guard in enumerate(self._guards):
            guard.arm(
                skip=None if ops.on_host else skip,
                pace=paced,
                measure=take_measure if measure and position == 0 else None,
            )

    # -- beginning, reading, ending ------------------------------------------------------------------------------

    def _begin(self, gradients: Gradients, device: torch.device) -> tuple[Ops, Recorder]:
        count = len(gradients.parameters) if self.config.granularity == "tensor" else 0
        if self._recorder is not None and self._ops is not None:
            if count != self._num_tensors:
                raise StateError(
                    f"`parameters` must be the {self._num_tensors} trainable tensors that the state was made for when "
                    f"`granularity` is 'tensor', but are {count} instead. Use one clipper per set of parameters."
                )
            return self._ops, self._recorder
        if self._port is not None and not self._guards:
            self._guards = [StepGuard(o, scaler=self._scaled) for o in self._port.only_optimizer()]
        shape = (count,) if count else ()
        ops = ops_for(device, shape)
        if self._loaded is None:
            self._state = self._controller.init(ops, shape)
        else:
            try:
                self._state = state_from_tensors(self._controller, self._loaded, ops, shape, device)
            except ValueError as error:
                raise StateError(f"`{STATE_FILE}` does not fit: {error}. Resume with the same model.") from error
        self._ops, self._num_tensors, self._loaded = ops, count, None
        writes = self._is_main and self.config.ledger not in (None, "none", "auto")
        self._recorder = start_recorder(
            self.config,
            writes=writes,
            exact=self._controller.exact,
            state=self._state,
            static_threshold=self._static_threshold,
            ops=ops,
            device=device,
            num_tensors=count,
            first_step=self._step,
            statistics=self.statistics,
            parent=self._parent,
        )
        return ops, self._recorder

    def flush(self) -> None:
        """Read the rows that wait on the device (the one host read), count them, write the ledger, tell of events.

        Raises:
            NonFiniteGradientError: `max_consecutive_nonfinite` steps in a row were skipped.
            TrainingTroubleError: Trouble was found and `on_trouble` is 'stop'.
        """
        if self._recorder is None:
            return
        events = self._recorder.flush()
        self.alerts.tell(events)
        self.statistics.stop_if_hopeless(self.config.max_consecutive_nonfinite, last_step=self._step - 1)
        self.alerts.stop_on_trouble(self.config.on_trouble, events)

    def on_event(self, listener: Callable[[ClipEvent], None]) -> None:
        """Call `listener` with every [`ClipEvent`], when the rows are read."""
        self.alerts.listeners.append(listener)

    def metrics(self) -> dict[str, float | int | str]:
        """What to log: the last decision, and what happened since the last call. Reads the device once."""
        self.flush()
        return self.statistics.metrics()

    def close(self, *, clean: bool = True) -> None:
        """Write what is left, end the ledger with a footer, and let go of the optimizer. May be called twice.

        Args:
            clean: Whether the run ended as it should; a ledger without a footer says that it did not.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
            if self._recorder is not None:
                self.alerts.tell(self._recorder.finish())
        finally:
            for guard in self._guards:
                guard.detach()
            for handle in self._handles:
                handle.remove()
            if self._recorder is not None and self._recorder.ledger is not None and self._state is not None:
                footer = {
                    "steps": self._step,
                    "counts": self.statistics.counts_by_name(),
                    "final_state": state_to_json(self._state),
                }
                self._recorder.ledger.close(footer if clean else None)

    def __enter__(self) -> "AdaptiveClipper":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close(clean=kind is None)

    def explain(self) -> str:
        """Which way this clipper takes, and why, in a few lines for people."""
        setup = None if self._port is None else self._port.how
        return describe(self.config, self._static_threshold, [guard.why for guard in self._guards], setup)

    # -- hand-written loops that cannot be edited ----------------------------------------------------------------

    @contextlib.contextmanager
    def install(self) -> Iterator["AdaptiveClipper"]:
        """Answer the accelerator's `clip_grad_norm_` while the context is open; afterwards it is as it was, and the clipper closed.

        The script's `max_norm` becomes the static threshold, unless the config sets one. Raises ConfigError without an accelerator.
        """
        if self._port is None:
            raise ConfigError("`accelerator` must be given to AdaptiveClipper before `install`, but is None instead.")
        with self, self._port.replace_clipping(self.clip_, self._take_script_threshold):
            yield self

    def _take_script_threshold(self, max_norm: float) -> None:
        if self.config.static_threshold is None and self._recorder is None:
            self._static_threshold = max_norm

    # -- state ---------------------------------------------------------------------------------------------------

    def save_state(self, folder: str | Path) -> None:
        """Write `clip_state.safetensors` into a checkpoint folder (nothing before the first step)."""
        if self._state is None or self._recorder is None:
            return
        self.flush()
        ledger = self._recorder.ledger
        if ledger is not None:
            ledger.sync()
        write_state(
            folder,
            state_to_tensors(self._state),
            self.config,
            step=self._step,
            static_threshold=self._static_threshold,
            statistics=self.statistics.to_dict(),
            ledger=None if ledger is None else ledger.head,
        )

    def load_state(self, folder: str | Path) -> bool:
        """Read what [`save_state`] wrote, before the first step or to go back within a run.

        Returns:
            Whether there was a state to read. Without one the controller starts afresh.

        Raises:
            StateError: The file is damaged, or belongs to another controller or config.
        """
        read = read_state(folder, self.config)
        if read is None:
            return False
        if self._recorder is not None:
            # Going back within a run: what was recorded stays, and the next step opens a segment that names where it goes on from.
            self.flush()
            if self._recorder.ledger is not None:
                self._recorder.ledger.close()
            self._recorder = self._ops = None
        tensors, self._step, self._static_threshold, self.statistics, head = read
        self._loaded, self._parent = tensors, None if head is None else {"sha256": head, "step": self._step}
        return True

    def _load_or_start_afresh(self, folder: str | Path) -> None:
        if not self.load_state(folder):
            logger.info("%s has no %s: the controller starts afresh.", folder, STATE_FILE)
