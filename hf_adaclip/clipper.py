"""`AdaptiveClipper`: controller, gradients and ledger in one object, driven once per optimizer step."""

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hf_adaclip.config import AdaptiveClipConfig, ClipArgument, as_number
from hf_adaclip.controllers.base import is_finite_norm
from hf_adaclip.controllers.numerics.ops import Value
from hf_adaclip.errors import ConfigError, StateError
from hf_adaclip.gradients import (
    Gradients,
    Guards,
    check_loss,
    collect,
    global_norm,
    observe_loss,
    scale_,
    tensor_norms,
    to_value,
)
from hf_adaclip.gradients.absence import AbsenceCheck, norms_of
from hf_adaclip.gradients.distance import check_rates
from hf_adaclip.gradients.fused import scale_of
from hf_adaclip.gradients.norms import Parameters, as_tensors
from hf_adaclip.hints import shown, unknown_arguments
from hf_adaclip.ports.accelerate import AcceleratorPort, Slot
from hf_adaclip.ports.deepspeed import EnginePort
from hf_adaclip.ports.follow import EngineFollower
from hf_adaclip.ports.lifetime import detach, let_go, weakly
from hf_adaclip.run.alerts import Alerts
from hf_adaclip.run.checkpoint import state_file
from hf_adaclip.run.counts import RunStatistics
from hf_adaclip.run.events import ClipEvent
from hf_adaclip.run.explain import describe
from hf_adaclip.run.per_parameter import PerParameter
from hf_adaclip.run.plan import StepPlan
from hf_adaclip.run.ranks import RankCheck, world_size
from hf_adaclip.run.recorder import is_rank_zero
from hf_adaclip.run.run import Run
from hf_adaclip.run.selftest import FirstStepCheck, check_on_a_copy
from hf_adaclip.support import check_capture, check_optimizer_given

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
        model: The model, where the names of parameters matter: for `granularity="module"`, for `parameter_rules`, and to read them in
            a per-tensor ledger. By default what the accelerator has prepared.
        ledger: Overrides `config.ledger`; `"auto"` means no ledger here.
        static_threshold: Overrides `config.static_threshold`; unset in both, 1.0, as in the Trainer.
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

    if not TYPE_CHECKING:  # which is to see the arguments

        def __new__(cls, *args, **given):
            """Refuse unknown names with a hint, before Python does it without one."""
            if problems := unknown_arguments(cls.__init__, given, AdaptiveClipConfig.names()):
                raise ConfigError(problems)
            return super().__new__(cls)

    def __init__(
        self,
        clip: ClipArgument = "adaptive",
        *,
        accelerator: Any = None,
        optimizer: Any = None,
        model: Any = None,
        ledger: str | Path | None = "auto",
        static_threshold: float | None = None,
        is_main_process: bool | None = None,
    ) -> None:
        config = AdaptiveClipConfig.resolve(clip).resolved()
        if static_threshold is not None:
            config = config.replace(static_threshold=as_number(static_threshold))
        if ledger != "auto":
            config = config.replace(ledger=str(ledger) if isinstance(ledger, Path) else ledger)
        optimizers = (
            () if optimizer is None else tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
        )
        check_optimizer_given(config, optimizers, accelerator)
        if config.max_pace > 1:
            check_rates(optimizers)
        self._port = None if accelerator is None else AcceleratorPort(accelerator)
        in_engine = self._port is not None and self._port.steps_in_engine
        if in_engine:
            config = config.replace(one_step_late=True)
        self.config = config
        self._optimizers = optimizers
        scaled = self._port is not None and self._port.has_scaler
        self._guards = Guards(() if in_engine else optimizers, scaler=scaled)
        writes = is_rank_zero() if is_main_process is None else is_main_process
        self._run = Run(config, static_threshold=1.0, writes_ledger=writes, scaled=scaled)
        self._follower = EngineFollower(self._port, self._run) if in_engine and self._port is not None else None
        self._check = FirstStepCheck(enabled=config.self_test)
        self._absence = AbsenceCheck(self.alerts.warn_once)
        self._models = [] if model is None else [model]
        port, models = self._port, self._models
        self._per_parameter = PerParameter(
            config, self._run, self._guards, lambda: models or ([] if port is None else port.models), self._run.alerts
        )
        self._closed = False
        self._installed = False  # then no rank ever knows a loss
        self._handles: list[Any] = []
        self._slot: Slot | None = None
        if self._port is not None:
            # Weakly: a clipper that nobody else holds is at its end, whatever the accelerator still has of it.
            self._slot, self._handles = self._port.on_checkpoint(
                weakly(self.flush), weakly(self.save_state), weakly(self._load_or_start_afresh)
            )
        # Rows that still wait are written when a clipper is dropped without `close`, or with the interpreter's end.
        self._at_end = weakref.finalize(self, let_go, self._run, self._guards, self._follower, self._handles)

    @property
    def step(self) -> int:
        """Optimizer steps decided on so far, over resumptions."""
        return self._run.step

    @property
    def state(self) -> dict[str, Value]:
        """The controller's state by name; empty before the first step."""
        return self._run.state

    @property
    def statistics(self) -> RunStatistics:
        """Counts of what was done, as of the last time that rows were read."""
        return self._run.statistics

    @property
    def alerts(self) -> Alerts:
        """Where events go."""
        return self._run.alerts

    # -- the step ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def clip_(
        self,
        parameters: Parameters,
        max_norm: None = None,
        *,
        loss: Tensor | float | None = None,
        measure: bool | None = None,
    ) -> Tensor:
        """Decide on this step's gradient and scale it in place.

        With an accelerator that is still accumulating, the norm so far is returned and nothing else happens. Under DeepSpeed the engine
        has stepped already: the step is recorded, and the threshold of the next one is set.

        Args:
            parameters: Any iterable of parameters, or one tensor.
            max_norm: What `torch.nn.utils.clip_grad_norm_` takes here, and what is refused: a threshold is set once, at the clipper.
            loss: Training loss of this step, one real number: evidence of progress for `adaptive`, needed by `divergence_spreads`. Over
                several ranks it counts where they are known: by `accelerator`, or by `model` in `DistributedDataParallel`.
            measure: Whether to measure and record the norm that really reaches the optimizer (one more read of the gradients, on
                the device). By default once in 50 steps.

        Returns:
            The norm before clipping, float32, shape `[]`, on the gradients' device. A step in which no parameter has a gradient (every
            label masked, no `backward`) is one of norm 0, from which nothing is learnt.

        Raises:
            ConfigError: `max_norm` was given; `parameters` are no tensors, or none has had a gradient in the first 10 steps; or `loss` is
                not one real number.
            UnsupportedSetupError: A gradient is sparse, of a dtype that has no norm, or on a device that is not supported; or two sets
                of parameters take turns within one step.
            StateError: The state was loaded from, or made for, other parameters.
            NonFiniteGradientError: Too many steps in a row were not finite (noticed when the rows are read).
        """
        if self._closed:
            raise StateError(
                "`clip_` must be called before `close`, but this clipper was closed. Make a new one for a new run."
            )
        if max_norm is not None:
            raise ConfigError(
                f"`max_norm` must be left out of `clip_`, but is {shown(max_norm)} instead: the controller sets the threshold. That of the "
                "warm-up is `static_threshold` of AdaptiveClipper."
            )
        check_loss(loss)
        if self._follower is not None:
            return self._follower.follow(lambda total: self._observe(loss, total.device))
        gradients = collect(parameters)
        if self._port is not None:
            if not self._port.syncs_now:
                return global_norm(norms_of(gradients))
            self._guards.adopt(self._port.only_optimizer())
            self._port.unscale(self._optimizers)
        self._absence.look(gradients)
        norms = norms_of(gradients)
        check_capture(norms.device)
        run, kept = self._run, self._per_parameter
        if not kept.begun:
            run.ranks = self._rank_check()
        total = global_norm(norms)  # in the order given, which decides the last bit
        gradients, norms = kept.place(gradients, norms)
        if self._guards.changed():
            self._check.again()
            kept.look_again(gradients)
        scope, ops = kept.scope, run.ops
        norm = to_value(total, ops)
        finite = None if scope.grouping is None else is_finite_norm(norm, ops)
        observed = scope.observe(gradients, norms, norm, finite, ops)
        left = scope.limit_(gradients, total, run.step, ops)
        seen_loss = self._observe(loss, total.device)
        scale = None if self._port is None else self._port.loss_scale
        reach = None if kept.reach is None else kept.reach.observe(gradients, total, ops)
        planned = run.decide(norm, observed, seen_loss, finite, loss_scale=scale, left=left, reach=reach)
        if kept.reach is not None:
            kept.reach.pace = 1.0 if planned.pace is None else planned.pace
        measure = run.step % MEASURE_EVERY == 0 if measure is None else measure
        self._apply_(gradients, planned, total.device, measure=measure)
        kept.clipped(gradients)
        run.step += 1
        return total

    def _apply_(self, gradients: Gradients, planned: StepPlan, device: torch.device, *, measure: bool) -> None:
        """Scale the gradients as planned, and prepare the optimizer's step."""
        kept, ops = self._per_parameter, self._run.ops
        coefficient = planned.coefficient
        if planned.by_group:
            coefficient = kept.scope.coefficients(gradients, coefficient, device, ops)
        checks = self._check.pending and self._guards.in_use and bool(gradients.tensors)
        # In the step that is checked nothing is folded, so that a gradient that grows on its way is found before anything has moved.
        fold = None
        if kept.why_not_folded is None and not checks:
            fold = scale_of(coefficient, ops) if planned.fold is None else planned.fold
        if fold is None and gradients.tensors:
            scale_(gradients.tensors, coefficient)
        if checks:
            self._check.clipped(gradients.tensors)
        self._guards.arm(
            gradients,
            finite=planned.taken,
            left_out=planned.left_out,
            told=planned.told,
            pace=planned.pace,
            ops=ops,
            measure=weakly(self._measure) if measure or checks else None,
            fold=fold,
        )

    def _rank_check(self) -> RankCheck | None:
        """Only where it is known who has to decide alike: on some ranks of a run there may be no clipper at all."""
        if self._port is not None:
            return RankCheck() if self._port.ranks_decide_alike else None
        groups = [model.process_group for model in self._models if isinstance(model, DistributedDataParallel)]
        return RankCheck(groups[0]) if groups else None

    def _observe(self, loss: Tensor | float | None, device: torch.device) -> Value:
        if loss is None and self.config.divergence_spreads > 0:
            self.alerts.warn_once("`divergence_spreads` > 0 needs the training loss: call `clip_(..., loss=loss)`.")
        ranks = self._run.ranks
        average = self.config.looks_at_loss and not self._installed
        if average and not (self._port or ranks or self.config.divergence_spreads > 0) and world_size() > 1:
            # Ranks that see different losses would decide differently, and who they are is not known here: some may have no clipper.
            average, loss = False, None
        return observe_loss(loss, device, self._run.ops, average=average, group=None if ranks is None else ranks.group)

    def _measure(self, gradients: list[Tensor]) -> None:
        assert self._run.recorder is not None
        self._run.recorder.set_applied(global_norm(tensor_norms(gradients)))
        if warning := self._check.stepping(gradients):
            self.alerts.warn_once(warning)

    def set_static_threshold(self, value: float) -> None:
        """From the next step on another static threshold: of `static`, of a warm-up, and of a ceiling that is held.

        What a schedule of `max_grad_norm` needs; the ledger holds it beside each step.

        Raises:
            ConfigError: It is not above 0, or the step is an engine's (DeepSpeed), which has its own threshold.
        """
        self._run.set_static_threshold(value, in_engine=self._follower is not None)

    # -- checking, reading, ending -------------------------------------------------------------------------------

    def self_test(self, parameters: Parameters | None = None) -> None:
        """Plant a spike on a copy of a few parameters and see it cut; the run itself is not touched.

        A Trainer calls it as training begins. That nothing undoes the clipping afterwards is checked in the first step, wherever an
        optimizer is known.

        Args:
            parameters: The trainable parameters; by default those of the optimizer.

        Raises:
            ClippingDefeatedError: The spike came through, or somebody has replaced what `install` had put in place.
            UnsupportedSetupError: The DeepSpeed engine's threshold cannot be set.
        """
        if parameters is None:
            parameters = self._guards.parameters
        check_on_a_copy(self.config, self._run.static_threshold, as_tensors(parameters))
        if self._follower is not None:
            self._follower.attach()
        elif self._port is not None:
            self._port.check_replaced()

    def flush(self) -> None:
        """Read the rows that wait on the device (the one host read), count them, write the ledger, tell of events.

        Raises:
            NonFiniteGradientError: `max_consecutive_nonfinite` steps in a row were skipped.
            TrainingTroubleError: Trouble was found and `on_trouble` is 'stop'.
            LedgerError: The ledger cannot be written and `ledger_required` is set.
        """
        self._run.flush()

    def on_event(self, listener: Callable[[ClipEvent], None]) -> None:
        """Call `listener` with every [`ClipEvent`], when the rows are read.

        Raises:
            ConfigError: It cannot be called.
        """
        if not callable(listener):
            raise ConfigError(
                f"`listener` must be a function of one ClipEvent, but is {shown(listener)} instead. Pass such as `clipper.on_event(print)`."
            )
        self.alerts.listeners.append(listener)

    def metrics(self) -> dict[str, float | int | str]:
        """What to log: the last decision, and what happened since the last call. Reads the device once."""
        self.flush()
        return self.statistics.metrics()

    def close(self, *, clean: bool = True, counted_steps: int | None = None) -> None:
        """Write what is left, end the ledger with a footer, and let go of the optimizer. May be called twice.

        Args:
            clean: Whether the run ended as it should; a ledger without a footer says that it did not.
            counted_steps: Optimizer steps that the loop has counted itself, for the footer: where they are more than those decided on,
                clipping was not reached in all of them, and `verify` says so.
        """
        if self._closed:
            return
        self._closed = True
        self._at_end.detach()
        try:
            self._run.close(clean=clean, counted_steps=counted_steps)
        finally:
            detach(self._guards, self._follower, self._handles)

    def __enter__(self) -> "AdaptiveClipper":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close(clean=kind is None)

    def explain(self) -> str:
        """Which way this clipper takes, and why, in a few lines for people."""
        setup = None if self._port is None else self._port.how
        skipping = [EnginePort.WHY] if self._follower is not None else self._guards.why
        scaling = self._per_parameter.why_not_folded if self._follower is None else EnginePort.SCALING
        return describe(self.config, self._run.static_threshold, skipping, setup, scaling, self._run.ceiling_held)

    # -- hand-written loops that cannot be edited ----------------------------------------------------------------

    @contextlib.contextmanager
    def install(self) -> Iterator["AdaptiveClipper"]:
        """Answer the accelerator's `clip_grad_norm_` while the context is open; afterwards it is as it was, and the clipper closed.

        The script's `max_norm` becomes the static threshold, unless the config sets one. Raises ConfigError without an accelerator.
        """
        if self._port is None:
            raise ConfigError("`accelerator` must be given to AdaptiveClipper before `install`, but is None instead.")
        self._installed = True
        with self, self._port.replace_clipping(self.clip_, self._take_script_threshold, self.alerts.warn_once):
            yield self

    def _take_script_threshold(self, max_norm: float) -> None:
        if self.config.static_threshold is None and self._follower is None:
            self.set_static_threshold(max_norm)

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def _state_file(self) -> str:
        return state_file(0 if self._slot is None else self._slot.number)

    def save_state(self, folder: str | Path) -> None:
        """Write `clip_state.safetensors` into a checkpoint folder (nothing before the first step).

        A second clipper of the same accelerator writes `clip_state_1.safetensors`, and so on in the order they were made.
        """
        reach = self._per_parameter.reach
        self._run.save(Path(folder) / self._state_file, None if reach is None else reach.tensors())

    def load_state(self, folder: str | Path) -> bool:
        """Read what [`save_state`] wrote, before the first step or to go back within a run.

        Returns:
            Whether there was a state to read. Without one the controller starts afresh.

        Raises:
            StateError: The file is damaged, or belongs to another controller or config.
        """
        loaded = self._run.load(Path(folder) / self._state_file)
        if loaded:
            self._per_parameter.forget()
        if loaded and self._follower is not None:
            self._follower.attach()  # the engine's own checkpoint brings an old threshold along
        return loaded

    def _load_or_start_afresh(self, folder: str | Path) -> None:
        if not self.load_state(folder):
            logger.info("%s has no %s: the controller starts afresh.", folder, self._state_file)
