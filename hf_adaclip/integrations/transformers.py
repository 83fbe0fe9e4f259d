"""`AdaptiveClipTrainer`, `AdaptiveClipMixin` and `attach`: the clipper in the seam of `transformers.Trainer`.

The seam is `Trainer._clip_grad_norm(model)`, called once per optimizer step after accumulation, in transformers 5.3 and later. What it
returns is the `grad_norm` that the Trainer logs.
"""

import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_sagemaker_mp_enabled

from hf_adaclip.clipper import AdaptiveClipper
from hf_adaclip.config import AdaptiveClipConfig, ClipArgument, as_number
from hf_adaclip.errors import ConfigError, StateError, TrainingTroubleError
from hf_adaclip.integrations.attaching import TrainBegin, find_train_begin, take_replaced
from hf_adaclip.integrations.seam import (
    check_bases,
    check_instance,
    check_max_grad_norm,
    check_seam,
    misnamed_clip,
    warn_of_own_clipping,
)
from hf_adaclip.integrations.watch import SeamWatch
from hf_adaclip.ledger.tail import find_tail
from hf_adaclip.report.run_report import clipping_section, load_run
from hf_adaclip.run.counts import for_reporters
from hf_adaclip.run.events import ClipEvent
from hf_adaclip.support import (
    check_accelerator,
    check_device,
    check_device_map,
    check_optimizer_name,
    check_setup,
    distributed_type,
)

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

logger = logging.getLogger(__name__)
# A default Trainer shows what is logged under `transformers`, warnings and above; of other packages it shows no more than that either.
_shown = transformers_logging.get_logger("transformers.hf_adaclip")

LEDGER_FILE = "clip_ledger.jsonl"
PACE_START_SHARE = 0.1
AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


class AdaptiveClipMixin(_Base):
    """Gives any `Trainer` subclass adaptive clipping. It stands first: `class MyTrainer(AdaptiveClipMixin, SFTTrainer)`.

    `args.max_grad_norm` keeps a meaning, unless `static_threshold` is set: it is the threshold while the controller warms up, and where it
    cut most of that, the ceiling afterwards (`ceiling_share`).

    Args:
        clip (`str`, `dict`, `Path` or `AdaptiveClipConfig`, *optional*, defaults to `"adaptive"`):
            Name of a controller, a config or its fields, or the path of a config's JSON.
        args, kwargs:
            What the Trainer takes.

    Raises:
        ConfigError: A setting is wrong, or `max_grad_norm` is 0 or None, for which transformers never calls the seam.
        UnsupportedSetupError: transformers has no seam (before 5.3), or the distributed setup is not supported.
    """

    clip_config: AdaptiveClipConfig
    clipper: AdaptiveClipper | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        bases = cls.__mro__
        if Trainer in bases and bases.index(Trainer) < bases.index(AdaptiveClipMixin):
            before = next(kind for kind in cls.__bases__ if issubclass(kind, Trainer))
            raise ConfigError(
                f"`AdaptiveClipMixin` must stand before {before.__name__} among the bases of {cls.__name__}, but stands after it: Trainer "
                f"would never call it. Write `class {cls.__name__}(AdaptiveClipMixin, {before.__name__})`."
            )

    def __init__(self, *args: Any, clip: ClipArgument = "adaptive", **kwargs: Any) -> None:
        check_bases(type(self), AdaptiveClipMixin)
        config = AdaptiveClipConfig.resolve(clip)
        try:
            super().__init__(*args, **kwargs)
        except TypeError as error:
            if (misnamed := misnamed_clip(str(error), kwargs)) is not None:
                raise misnamed from error
            raise
        self._set_up_clipping(config)

    def _set_up_clipping(self, config: AdaptiveClipConfig) -> None:
        check_seam()
        check_instance(self)
        if is_sagemaker_mp_enabled():
            check_setup("SAGEMAKER_MP")
        check_accelerator(self.accelerator)
        check_device(self.args.device)
        check_device_map(self.model)
        check_optimizer_name(self.args.optim)
        self._given_config = config
        self.clip_config = self._complete_config(trial=None)
        self.clipper = None
        self._step_loss: Tensor | None = None
        self._loss_sum: Tensor | None = None
        self._loss_sum_since = -1
        self._planned_steps = 0
        self._max_grad_norm = self.args.max_grad_norm
        self._max_grad_norm_was_set = False
        self._logs_own_line = False
        self._joined = False
        self._watch = SeamWatch(self)
        self.add_callback(self._watch)
        warn_of_own_clipping(type(self), AdaptiveClipMixin)

    def _complete_config(self, trial: Any) -> AdaptiveClipConfig:
        """The config with what the Trainer knows filled in. Anew for every run: a search changes `args` between its trials."""
        check_max_grad_norm(self.args.max_grad_norm)
        config = self._given_config
        if config.ledger == "auto":
            folder = self.args.output_dir if trial is None else self._get_output_dir(trial)
            config = config.replace(ledger=str(Path(folder or ".") / LEDGER_FILE))
        if distributed_type(self.accelerator) == "DEEPSPEED":
            config = config.replace(
                one_step_late=True
            )  # what is not possible there is refused here, not at the first step
        if config.static_threshold is None:
            config = config.replace(static_threshold=as_number(self.args.max_grad_norm))
        return config

    # -- the run -------------------------------------------------------------------------------------------------

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, "_given_config"):
            raise ConfigError(
                f"`{type(self).__name__}.__init__` must call `super().__init__(...)`, but it went past AdaptiveClipMixin: nothing would be "
                "clipped adaptively."
            )
        # Every call is a run of its own: a second `train()`, another trial, or a retry with a smaller batch starts afresh.
        self.clipper = self._step_loss = self._loss_sum = None
        trial = inspect.signature(super()._inner_training_loop).bind(*args, **kwargs).arguments.get("trial")
        self.clip_config = self._complete_config(trial)
        self._max_grad_norm, self._max_grad_norm_was_set = self.args.max_grad_norm, False
        filters = self.args.logging_nan_inf_filter
        self.args.logging_nan_inf_filter = filters and not self.clip_config.nan_filter_on_device
        try:
            output = super()._inner_training_loop(*args, **kwargs)
        except BaseException:
            self._end_clipping(clean=False)
            raise
        finally:
            self.args.logging_nan_inf_filter = filters  # it is the caller's object
        self._end_clipping(clean=True)
        return output

    def _join_run(self, run: TrainBegin) -> None:
        """Take part in a run whose loop is not ours: it was begun before clipping was attached, by nobody who will end it for us."""
        self._joined = True
        self.clip_config = self._complete_config(run.trial)
        self.args.logging_nan_inf_filter = (
            self.args.logging_nan_inf_filter and not self.clip_config.nan_filter_on_device
        )
        self._load_clip_state(run.checkpoint)

    def _end_clipping(self, *, clean: bool) -> None:
        # The clipper stays: its statistics and its config are what people look at after training.
        self._watch.end()
        if self.clipper is not None:
            self.clipper.close(clean=clean, counted_steps=self._watch.counted_steps)

    def _config_of_run(self) -> AdaptiveClipConfig:
        hook = "on_pre_optimizer_step"
        lookers = [
            c
            for c in self.callback_handler.callbacks
            if getattr(type(c), hook, None) is not getattr(TrainerCallback, hook) and c is not self._watch
        ]
        # Such a callback may look at the gradients, and is to see them clipped.
        config, planned = self.clip_config, self._planned_steps or self.state.max_steps
        if planned:
            config = config.with_pace_start(pace_start(planned, self.args.get_warmup_steps(planned)))
        return config.replace(fold="never") if lookers else config

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self._planned_steps = num_training_steps
        return super().create_scheduler(num_training_steps, optimizer)

    def _ready_clipper(self) -> AdaptiveClipper:
        # The optimizer exists, and is prepared by Accelerate, only once training has begun.
        if self.clipper is None:
            self.clipper = AdaptiveClipper(
                self._config_of_run(), accelerator=self.accelerator, optimizer=self.optimizer, model=self.model
            )
            self.clipper.on_event(self._tell_callbacks)
            self.clipper.alerts.stop = self._end_on_trouble
            if self.is_world_process_zero():
                _shown.warning(_in_one_line(self.clipper.config))
            logger.info("Adaptive clipping:\n%s", self.clipper.explain())
        return self.clipper

    # -- the step ------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        check_max_grad_norm(self.args.max_grad_norm)  # a callback may have set it: at 0 the seam is not called
        loss = super().training_step(*args, **kwargs)
        # The losses of the micro-batches of one step add up to the step's loss, as in the Trainer's own running sum.
        self._step_loss = loss.detach() if self._step_loss is None else self._step_loss + loss.detach()
        return self._filter(loss) if self.clip_config.nan_filter_on_device else loss

    def _filter(self, loss: Tensor) -> Tensor:
        """What the Trainer's own filter adds to its sum of losses for one that is not finite, found without a host read."""
        since = self._globalstep_last_logged
        if self._loss_sum is None or since != self._loss_sum_since:
            self._loss_sum, self._loss_sum_since = torch.zeros((), dtype=torch.float32, device=loss.device), since
        mean = self._loss_sum / (1 + self.state.global_step - since)
        loss = torch.where(torch.isfinite(loss), loss, mean)
        self._loss_sum = self._loss_sum + loss.detach()
        return loss

    def _clip_grad_norm(self, model: torch.nn.Module) -> Tensor:
        clipper = self._ready_clipper()
        loss, self._step_loss = self._step_loss, None
        if loss is None:
            clipper.alerts.warn_once(
                "the loss of a step is not known: a `training_step` did not call `super()`, or was put in its place. It is not recorded."
            )
        if self.args.max_grad_norm != self._max_grad_norm:
            self._follow_max_grad_norm(clipper)
        return clipper.clip_(model.parameters(), loss=loss, measure=self._logs_after_this_step() or None)

    def _follow_max_grad_norm(self, clipper: AdaptiveClipper) -> None:
        """A callback has set another `max_grad_norm`: from this step on it is the static threshold."""
        before, self._max_grad_norm = self._max_grad_norm, self.args.max_grad_norm
        if self._given_config.static_threshold is None:
            clipper.set_static_threshold(float(self._max_grad_norm))
            said = "it is the static threshold from here on, and the ledger holds it beside each step"
        else:
            said = "it has no effect, because `static_threshold` is set"
        if not self._max_grad_norm_was_set:
            self._max_grad_norm_was_set = True
            logger.warning(
                "`max_grad_norm` was set from %g to %g before step %d: %s.",
                before,
                self._max_grad_norm,
                self.state.global_step,
                said,
            )

    def _end_on_trouble(self, error: TrainingTroubleError) -> None:
        logger.error("%s A checkpoint of the weights as they are now is kept.", error)
        self.control.should_save = True
        self.control.should_training_stop = True

    def _tell_callbacks(self, event: ClipEvent) -> None:
        for callback in self.callback_handler.callbacks:
            hook = getattr(callback, "on_clip_event", None)
            if hook is not None:
                hook(self.args, self.state, self.control, event=event)

    def _logs_after_this_step(self) -> bool:
        step = self.state.global_step + 1
        if step == 1 and self.args.logging_first_step:
            return True
        every = self.state.logging_steps
        return self.args.logging_strategy == "steps" and every > 0 and step % every == 0

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._logs_own_line = self.control.should_log and self.state.global_step > self._globalstep_last_logged
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            self._logs_own_line = False

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        # Only in the Trainer's own line: a script may log losses of its own, and a window of `clip/*` ends with every reading.
        if self.clipper is not None and self._logs_own_line and "grad_norm" in logs:
            self._logs_own_line = False
            metrics = self.clipper.metrics()
            if self.clipper.config.max_pace > 1 and not self.clipper.config.shadow and metrics:
                metrics["clip/learning_rate"] = logs["learning_rate"] * float(metrics["clip/pace"])
            logs = {**logs, **for_reporters(metrics, self.callback_handler.callbacks)}
        super().log(logs, *args, **kwargs)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.clipper is not None:
            self.clipper.flush()  # on every rank: if it has to stop the run, all of them stop
            if self.args.should_save:
                self.clipper.save_state(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._load_clip_state(checkpoint)

    def _load_clip_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        try:
            loaded = self._ready_clipper().load_state(checkpoint)
        except StateError as error:
            if self._given_config.static_threshold is None and "`static_threshold`" in str(error):
                raise StateError(
                    str(error).replace("`static_threshold` (in a Trainer `max_grad_norm`)", "`max_grad_norm`")
                ) from error
            raise
        if not loaded:
            logger.warning(
                "%s has no state of hf_adaclip (a checkpoint of the stock Trainer?): the controller starts afresh.",
                checkpoint,
            )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The usual card, with a section on what clipping did in this run (of the ledger, so there is none without one)."""
        super().create_model_card(*args, **kwargs)
        try:
            self._add_to_card()
        except Exception as error:  # what only records ends nothing
            logger.warning("The model card got no section on clipping (%s: %s).", type(error).__name__, error)

    def _add_to_card(self) -> None:
        ledger = Path(self.clip_config.ledger or "")
        card = Path(self.args.output_dir or ".") / "README.md"
        if not self.is_world_process_zero() or not ledger.is_file() or not card.is_file():
            return
        if self.clipper is not None:
            self.clipper.flush()
        section = clipping_section(load_run(ledger), find_tail(ledger).sha256, learning_rate=self.args.learning_rate)
        text = ModelCard.load(card)
        text.text = f"{text.text.rstrip()}\n\n{section}"
        tags = text.data.tags or []
        text.data.tags = [*([tags] if isinstance(tags, str) else tags), "hf_adaclip"]
        text.save(card)


class AdaptiveClipTrainer(AdaptiveClipMixin, Trainer):
    """`transformers.Trainer` with adaptive clipping: everything else is Trainer.

    Args:
        clip (`str`, `dict`, `Path` or `AdaptiveClipConfig`, *optional*, defaults to `"adaptive"`):
            Name of a controller, a config or its fields, or the path of a config's JSON.
        args, kwargs:
            What the Trainer takes.

    Writes `clip_ledger.jsonl` into `args.output_dir`, `clip_state.safetensors` into every checkpoint, and logs `clip/threshold`,
    `clip/coefficient`, `clip/fraction`, `clip/norm_max`, `clip/spikes`, `clip/skipped`, `clip/pace`, `clip/phase` and more beside
    `grad_norm` (see `RunStatistics.metrics`); with `max_pace` above 1 also `clip/learning_rate`, the rate of the last step with its pace.
    """


def attach(trainer: AnyTrainer, clip: ClipArgument = "adaptive") -> AnyTrainer:
    """Give adaptive clipping to a Trainer that somebody else built, before its `train()` or in `on_train_begin`. Returns the same object.

    Args:
        trainer: Any `transformers.Trainer`, of any subclass. Methods replaced on the object are called like those of a base class.
        clip: As for [`AdaptiveClipTrainer`].

    Raises:
        ConfigError: It has adaptive clipping already, or a setting is wrong.
        UnsupportedSetupError: transformers or the distributed setup is not supported.
    """
    if not isinstance(trainer, Trainer):
        raise ConfigError(f"`trainer` must be a transformers.Trainer, but is {_kind_of(trainer)} instead.")
    if isinstance(trainer, AdaptiveClipMixin):
        raise ConfigError("`trainer` must not have adaptive clipping yet, but it has: attach once, before `train()`.")
    begun = find_train_begin(trainer) if trainer.is_in_train else None
    if trainer.is_in_train and begun is None:
        raise ConfigError(
            "`trainer` must not be in the middle of `train()`, but is, or was when an exception ended it: attach before, to a new Trainer, "
            "or in `on_train_begin`."
        )
    if begun is None and trainer.state.global_step:
        logger.warning(
            "`attach` comes after %d steps of training, which were not clipped adaptively; the next `train()` is.",
            trainer.state.global_step,
        )
    config = AdaptiveClipConfig.resolve(clip)
    kind, before = type(trainer), dict(trainer.__dict__)
    # A subclass made on the spot, so that `super()` finds the methods of whatever Trainer this is.
    base = take_replaced(trainer, AdaptiveClipMixin)
    trainer.__class__ = type(
        f"AdaptiveClip{kind.__name__}", (AdaptiveClipMixin, base), {"__module__": kind.__module__}
    )
    try:
        AdaptiveClipMixin._set_up_clipping(trainer, config)  # type: ignore[arg-type]
        if begun is not None:
            AdaptiveClipMixin._join_run(trainer, begun)  # type: ignore[arg-type]
    except Exception:
        trainer.__class__ = kind
        trainer.__dict__.clear()
        trainer.__dict__.update(before)
        raise
    return trainer


def _kind_of(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def pace_start(steps: int, warmup_steps: float) -> int:
    """Steps of the pace's start in a run of so many: a schedule that warms up has a start of its own, and two of them are too slow."""
    return max(1, round(PACE_START_SHARE * steps - warmup_steps))


def _in_one_line(config: AdaptiveClipConfig) -> str:
    threshold = f"static threshold {config.static_threshold:g}"
    ledger = "none" if config.ledger in (None, "none") else config.ledger
    return (
        f"Adaptive clipping by `{config.controller}`{' in shadow' if config.shadow else ''}, {threshold}; ledger {ledger}. "
        "`trainer.clipper.explain()` says more."
    )
