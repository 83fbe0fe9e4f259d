"""`AdaptiveClipper`: controller, gradients and ledger in one object, driven once per optimizer step."""

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_adaclip.config import AdaptiveClipConfig, ClipArgument, as_number
from hf_adaclip.controllers.adaptive import AdaptiveController
from hf_adaclip.controllers.numerics.ops import Lane, Value, ops_for
from hf_adaclip.drivers.clipping import ClippingDriver
from hf_adaclip.drivers.driver import Driver
from hf_adaclip.drivers.following import FollowingDriver
from hf_adaclip.drivers.lifetime import detach, let_go, weakly
from hf_adaclip.drivers.settling import settle
from hf_adaclip.drivers.watching import Watching, check_listener
from hf_adaclip.errors import ConfigError, StateError
from hf_adaclip.gradients import check_loss
from hf_adaclip.gradients.distance import check_rates
from hf_adaclip.gradients.norms import Parameters, as_tensors
from hf_adaclip.gradients.optimizers import distinct
from hf_adaclip.hints import shown, unknown_arguments
from hf_adaclip.incidents.capture import IncidentCapture
from hf_adaclip.ports.accelerate import AcceleratorPort
from hf_adaclip.ports.plain import PlainLoop, Port
from hf_adaclip.run.alerts import Alerts
from hf_adaclip.run.checkpoint import state_file
from hf_adaclip.run.counts import RunStatistics
from hf_adaclip.run.events import ClipEvent
from hf_adaclip.run.explain import describe
from hf_adaclip.run.fresh_data import FreshData
from hf_adaclip.run.losses import LossObserver
from hf_adaclip.run.recorder import is_rank_zero
from hf_adaclip.run.run import Run
from hf_adaclip.run.run_plan import RunPlan, checked_plan
from hf_adaclip.run.selftest import check_on_a_copy
from hf_adaclip.run.shape_gate import ShapeGate
from hf_adaclip.support import check_model, check_optimizer_given

logger = logging.getLogger(__name__)


class AdaptiveClipper(Watching):
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
        model: The model (or several): it tells matrices from embeddings, and names parameters for `granularity="module"`, for
            `parameter_rules` and in a per-tensor ledger. By default what the accelerator has prepared.
        ledger: Overrides `config.ledger`; `"auto"` means no ledger here.
        static_threshold: Overrides `config.static_threshold`; unset in both, 1.0, as in the Trainer.
        is_main_process: Whether this process writes the ledger; by default rank 0.
        output_dir: Folder of the run, where `incidents/` goes; by default the ledger's, else the working folder.
        plan: What the loop knows of its run: steps, warm-up and epochs ([`RunPlan`]).
        _lane: For tests, in which the CPU plays an accelerator: chooses the kind of numbers by device and shape.

    Raises:
        ConfigError: A setting is wrong, or `max_pace` > 1 without an optimizer.
        UnsupportedSetupError: The accelerator's distributed setup is not supported; torch or Accelerate lack what is relied on
            (`hf_adaclip.reliance`); or an optimizer of torch does not leave out, scale or pace a step on a copy of two numbers
            (`self_test=False` does not try).

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
        output_dir: str | Path | None = None,
        plan: RunPlan | None = None,
        _lane: Lane = ops_for,
    ) -> None:
        config = AdaptiveClipConfig.resolve(clip).resolved()
        if static_threshold is not None:
            config = config.replace(static_threshold=as_number(static_threshold))
        if ledger != "auto":
            config = config.replace(ledger=str(ledger) if isinstance(ledger, Path) else ledger)
        optimizers = distinct(_each(optimizer))
        models = _each(model)
        for each in models:
            check_model(each)
        port: Port = PlainLoop(models) if accelerator is None else AcceleratorPort(accelerator)
        engine = port if isinstance(port, AcceleratorPort) and port.steps_in_engine else None
        plan = checked_plan(plan)
        settled = settle(config, optimizers, models or port.models, plan, in_engine=engine is not None)
        config, self._off, by_itself, self._held = settled
        check_optimizer_given(config, optimizers, accelerator)
        if config.max_pace > 1:
            check_rates(optimizers)
        if engine is not None:
            config = config.replace(one_step_late=True)
        writes = is_rank_zero() if is_main_process is None else is_main_process
        self._lane = _lane
        self._run = Run(config, static_threshold=1.0, writes_ledger=writes, scaled=port.has_scaler, lane=_lane)
        self._losses = LossObserver(config, self._run, ranks_known=port.ranks_known)
        self._capture = IncidentCapture(config, self._run)
        self._driver: Driver
        gate: ShapeGate | None = None
        if engine is None:
            memory, ranged = config.spectral_memory > 0, config.spectral is not None
            if by_itself:
                gate = ShapeGate(by_itself, memory=memory, ranged=ranged)
            fresh = None
            if "fresh" in self._held.fields and isinstance(config.settings, AdaptiveController):
                fresh = FreshData(plan.first_epoch or 0, config.settings.pace_trust)
            self._driver = ClippingDriver(
                *(config, self._run, port, optimizers, lambda: models or port.models, self._losses, self._capture),
                gate=gate,
                fresh=fresh,
            )
        else:
            self._driver = FollowingDriver(self._run, engine, self._losses, self._capture)
        super().__init__(
            config, self._run, self._driver, self._capture, lambda: models or port.models, accelerator, output_dir
        )
        self._port = port
        self._closed = False
        # Weakly: a clipper that nobody else holds is at its end, whatever the accelerator still has of it.
        self._slot, self._handles = port.on_checkpoint(
            weakly(self.flush), weakly(self.save_state), weakly(self.load_state)
        )
        self._handles.append(self._capture)
        if gate is not None:
            self._handles.append(gate)
        # Rows that still wait are written when a clipper is dropped without `close`, or with the interpreter's end.
        self._at_end = weakref.finalize(self, let_go, self._run, self._driver.grip, self._handles)

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
    def static_threshold(self) -> float:
        """The static threshold of the next step."""
        return self._run.static_threshold

    @property
    def off(self) -> dict[str, str]:
        """Parts of the default that do not act, and why, as far as that is decided: the first step has a say in it."""
        return {**self._off, **self._driver.off}

    @property
    def held_back(self) -> str:
        """What the plan of the run holds back of the default, and how to override it, in a sentence; empty where nothing."""
        return self._held.sentence

    @property
    def only_clips(self) -> str | None:
        """Why none of the parts of the default acts, where there is one reason for all; None else."""
        reasons = [self.off.get(part) for part in ("pace", "spectral", "agreement")]
        return reasons[0] if len(set(reasons)) == 1 else None

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
        return self._driver.clip_(parameters, loss, measure=measure)

    def set_static_threshold(self, value: float) -> None:
        """From the next step on another static threshold: of `static`, of a warm-up, and of a ceiling that is held.

        What a schedule of `max_grad_norm` needs; the ledger holds it beside each step.

        Raises:
            ConfigError: It is not above 0, or the step is an engine's (DeepSpeed), which has its own threshold.
        """
        self._driver.set_static_threshold(value)
        self._tell_of_limit(f"the static threshold is {value:g}")

    def begins_after(self, steps: int) -> None:
        """So many steps of the training were made before the first that is counted here: the ledger tells, so that `verify` knows."""
        self._run.steps_before = max(steps, 0)

    def begin_epoch(self) -> None:
        """The data is about to be gone through again, or for the first time. In a Trainer that happens by itself.

        What has been seen before must not be known much better than what had not: then the pace goes back to 1.
        """
        self._driver.begin_epoch()

    def evaluated(self, loss: float) -> None:
        """The loss on held-out data, the same on every rank. In a Trainer that happens by itself.

        Where it rises while the training loss falls, the pace goes back to 1.
        """
        self._driver.evaluated(float(loss))

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
            parameters = self._driver.parameters
        check_on_a_copy(self.config, self._run.static_threshold, as_tensors(parameters), self._lane)
        self._driver.check()

    def flush(self) -> None:
        """Read the rows that wait on the device (the one host read), count them, write the ledger, tell of events.

        Raises:
            NonFiniteGradientError: `max_consecutive_nonfinite` steps in a row were skipped.
            TrainingTroubleError: Trouble was found and `on_trouble` is 'stop'.
            LedgerError: The ledger cannot be written and `ledger_required` is set.
        """
        self._capture.catch_up()
        self._run.flush()

    def on_event(self, listener: Callable[[ClipEvent], None]) -> None:
        """Call `listener` with every [`ClipEvent`], when the rows are read.

        Raises:
            ConfigError: It cannot be called.
        """
        check_listener(listener, "ClipEvent", "on_event")
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
            detach(self._driver.grip, self._handles)

    def __enter__(self) -> "AdaptiveClipper":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close(clean=kind is None)

    def explain(self) -> str:
        """Which way this clipper takes, and why, in a few lines for people."""
        driver, threshold = self._driver, self._run.static_threshold
        return describe(
            *(self.config, threshold, driver.why_skipping, self._port.how, driver.why_scaling, self._run.ceiling_held),
            self.off,
            fresh=self._held.why if "fresh" in self._held.fields else None,
            little=self._run.pace_ended,
            pace=self._run.last_pace,
        )

    # -- hand-written loops that cannot be edited ----------------------------------------------------------------

    @contextlib.contextmanager
    def install(self) -> Iterator["AdaptiveClipper"]:
        """Answer the accelerator's `clip_grad_norm_` while the context is open; afterwards it is as it was, and the clipper closed.

        The script's `max_norm` becomes the static threshold, unless the config sets one. Raises ConfigError without an accelerator.
        """
        if (why := self.only_clips) is not None:
            self.alerts.say(f"it only clips: {why}.")
        answering = self._port.replace_clipping(self.clip_, self._take_script_threshold, self.alerts.warn_once)
        self._losses.expected = False
        with self, answering:
            yield self

    def _take_script_threshold(self, max_norm: float) -> None:
        self._driver.take_script_threshold(max_norm)
        self._tell_of_limit(f"the script's `max_norm` is {max_norm:g}")

    def _tell_of_limit(self, said: str) -> None:
        limit = self.config.max_threshold
        if self.held_back and limit is not None and limit < self.static_threshold:
            self.alerts.warn_once(f"{said}, but no threshold is above `max_threshold`, {limit:g}. {self.held_back}")

    # -- state ---------------------------------------------------------------------------------------------------

    @property
    def _state_file(self) -> str:
        return state_file(self._slot.number)

    def save_state(self, folder: str | Path) -> None:
        """Write `clip_state.safetensors` into a checkpoint folder (nothing before the first step).

        A second clipper of the same accelerator writes `clip_state_1.safetensors`, and so on in the order they were made.
        """
        self._run.save(Path(folder) / self._state_file, self._driver.kept())

    def load_state(self, folder: str | Path) -> bool:
        """Read what [`save_state`] wrote, before the first step or to go back within a run.

        Returns:
            Whether there was a state to read. Without one a warning says so, and the controller goes on as it is.

        Raises:
            StateError: The file is damaged, or belongs to another controller or config.
        """
        self._capture.catch_up()
        loaded = self._run.load(Path(folder) / self._state_file)
        if loaded:
            self._driver.loaded()
        else:
            what = "goes on as it is" if self._run.begun else "starts afresh"
            logger.warning(
                "%s has no %s (a checkpoint without hf_adaclip?): the controller %s.", folder, self._state_file, what
            )
        return loaded


def _each(given: Any) -> list[Any]:
    """One, several or none, as a list."""
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
