"""`AdaptiveClipTrainer` and `AdaptiveClipMixin`: the clipper in the seam of `transformers.Trainer`.

The seam is `Trainer._clip_grad_norm(model)`, called once per optimizer step after accumulation, in transformers 5.3 and later. What it
returns is the `grad_norm` that the Trainer logs.
"""

import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_sagemaker_mp_enabled

from hf_adaclip.clipper import AdaptiveClipper
from hf_adaclip.config import AdaptiveClipConfig, ClipArgument, as_number
from hf_adaclip.errors import ConfigError, StateError, TrainingTroubleError
from hf_adaclip.incidents.skip_list import read_skip_list
from hf_adaclip.integrations.early_state import EarlyState
from hf_adaclip.integrations.first_line import in_one_line
from hf_adaclip.integrations.left_out_samples import leave_out_samples, too_late
from hf_adaclip.integrations.model_card import add_section
from hf_adaclip.integrations.rewinding import Rewinding
from hf_adaclip.integrations.sample_indices import SampleIndices
from hf_adaclip.integrations.seam import (
    check_bases,
    check_instance,
    check_max_grad_norm,
    check_seam,
    misnamed_clip,
    warn_of_own_clipping,
)
from hf_adaclip.integrations.step_losses import StepLosses
from hf_adaclip.integrations.telling import Telling
from hf_adaclip.integrations.watch import SeamWatch
from hf_adaclip.ledger.schema import LEDGER_FILE
from hf_adaclip.run.counts import for_reporters
from hf_adaclip.run.ranks import of_first_rank
from hf_adaclip.run.run_plan import RunPlan, steps_per_epoch
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
    _awaits_inputs = _shown_inputs = _introduced = False
    _resumed: str | None = None

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
        self._trial: Any = None
        try:
            self.clip_config = self._complete_config(trial=None)
        except ConfigError:
            if self.train_dataset is not None:
                raise
            self.clip_config = config  # to evaluate it does for; `train` says what is wrong
        self.clipper = None
        self._losses = StepLosses()
        self._samples = SampleIndices()
        self._planned_steps = 0
        self._steps_per_epoch: int | None = None
        self._max_grad_norm = self.args.max_grad_norm
        self._max_grad_norm_was_set = False
        self._logs_own_line = False
        self._joined = False
        self._watch, self._rewinding = SeamWatch(self), Rewinding(self)
        self._early = EarlyState(self, self._watch)
        self.add_callback(self._watch)
        self.add_callback(self._rewinding)
        warn_of_own_clipping(type(self), AdaptiveClipMixin)

    def _run_folder(self, trial: Any = None) -> Path:
        """Where the run's files go; a trial of a search has a folder of its own."""
        known = trial if trial is not None else self._trial
        return Path((self.args.output_dir if known is None else self._get_output_dir(known)) or ".")

    def _complete_config(self, trial: Any) -> AdaptiveClipConfig:
        """The config with what the Trainer knows filled in. Anew for every run: a search changes `args` between its trials."""
        check_max_grad_norm(self.args.max_grad_norm)
        config = self._given_config
        if config.ledger == "auto":
            config = config.replace(ledger=str(self._run_folder(trial) / LEDGER_FILE))
        if distributed_type(self.accelerator) == "DEEPSPEED":
            # What is not possible there is refused here, not at the first step.
            config = config.replace(one_step_late=True)
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
        self.clipper, self._losses, self._resumed, self._steps_per_epoch = None, StepLosses(), None, None
        trial = inspect.signature(super()._inner_training_loop).bind(*args, **kwargs).arguments.get("trial")
        self._trial = trial
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

    def _join_run(self, checkpoint: str | None, trial: Any) -> None:
        """Take part in a run whose loop is not ours: it was begun before clipping was attached, by nobody who will end it for us."""
        self._joined, self._trial = True, trial
        if of_first_rank(lambda: read_skip_list(self._run_folder())).samples:
            raise too_late()
        self.clip_config = self._complete_config(trial)
        self.args.logging_nan_inf_filter = (
            self.args.logging_nan_inf_filter and not self.clip_config.nan_filter_on_device
        )
        self._load_clip_state(checkpoint)

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
        return self.clip_config.replace(fold="never") if lookers else self.clip_config

    def _plan_of_run(self) -> RunPlan:
        planned = self._planned_steps or self.state.max_steps
        per_epoch = self._steps_per_epoch
        if per_epoch is None:
            per_epoch = steps_per_epoch(self.callback_handler.train_dataloader, self.args.gradient_accumulation_steps)
        return RunPlan(
            steps=planned or None,
            warmup_steps=self.args.get_warmup_steps(planned),
            epochs=self.state.max_steps / per_epoch if per_epoch and self.state.max_steps else None,
            epoch_steps=per_epoch,
            checkpoint=self._resumed,
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self._planned_steps = num_training_steps
        return super().create_scheduler(num_training_steps, optimizer)

    def _ready_clipper(self) -> AdaptiveClipper:
        clipper = self._made_clipper()
        if not self._introduced:  # with what a checkpoint says, where one was loaded
            self._introduced = True
            if self.is_world_process_zero():
                _shown.warning(in_one_line(clipper, self.clip_config, self.model))
            logger.info("Adaptive clipping:\n%s", clipper.explain())
        return clipper

    def _made_clipper(self) -> AdaptiveClipper:
        # The optimizer exists, and is prepared by Accelerate, only once training has begun.
        if self.clipper is None:
            self.clipper = AdaptiveClipper(
                self._config_of_run(),
                accelerator=self.accelerator,
                optimizer=self.optimizer,
                model=self.model,
                output_dir=self._run_folder(),
                plan=self._plan_of_run(),
            )
            self._telling = Telling(self, self.clipper)
            self.clipper.alerts.stop = self._end_on_trouble
            self._introduced = False
        return self.clipper

    # -- the step ------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        check_max_grad_norm(self.args.max_grad_norm)  # a callback may have set it: at 0 the seam is not called
        if self._rewinding.leaves_out():
            self._samples.next()
            return torch.zeros((), dtype=torch.float32, device=self.args.device)
        self._awaits_inputs, self._shown_inputs = True, False
        given = kwargs.get("inputs", args[1] if len(args) > 1 else None)
        given = dict(given) if isinstance(given, dict) else given  # of which a loss may take entries out
        loss = super().training_step(*args, **kwargs)
        self._losses.add(loss)
        self._awaits_inputs = False
        if not self._shown_inputs:  # a `training_step` that prepares its inputs by itself
            self._show_batch(given)
        if not self.clip_config.nan_filter_on_device:
            return loss
        return self._losses.filtered(loss, self._globalstep_last_logged, self.state.global_step)

    def _prepare_inputs(self, inputs: Any) -> Any:
        asked, self._awaits_inputs = self._awaits_inputs, False
        inputs = super()._prepare_inputs(inputs)
        if asked:
            # What a loss is made of: with TRL's trainers of policies that is what was generated, and its rewards.
            self._show_batch(inputs)
        return inputs

    def _show_batch(self, inputs: Any) -> None:
        self._shown_inputs = True
        processing_class = getattr(self, "processing_class", None)
        clipper = self._ready_clipper()
        self._telling.note(clipper.step)
        clipper.watch(inputs, self._samples.next(), processing_class=processing_class)

    def get_train_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        dataloader = super().get_train_dataloader(*args, **kwargs)
        if hasattr(self, "_samples"):  # not in the base's own `__init__`
            left_out = of_first_rank(lambda: read_skip_list(self._run_folder())).samples
            if left_out:
                leave_out_samples(dataloader, left_out)
            self._samples.follow(dataloader)
            self._steps_per_epoch = steps_per_epoch(dataloader, self.args.gradient_accumulation_steps)
        return dataloader

    def _clip_grad_norm(self, model: torch.nn.Module) -> Tensor:
        if self._rewinding.leaves_out():
            return self._rewinding.pass_over()
        clipper = self._ready_clipper()
        loss = self._losses.take()
        if loss is None:
            clipper.alerts.warn_once(
                "the loss of a step is not known: a `training_step` did not call `super()`, or was put in its place. It is not recorded."
            )
        if self.args.max_grad_norm != self._max_grad_norm:
            self._follow_max_grad_norm(clipper)
        if self.args.should_save:
            self._early.look(clipper)
        return clipper.clip_(model.parameters(), loss=loss, measure=self._logs_after_this_step() or None)

    def _follow_max_grad_norm(self, clipper: AdaptiveClipper) -> None:
        """A callback has set another `max_grad_norm`: from this step on it is the static threshold."""
        before, self._max_grad_norm = self._max_grad_norm, self.args.max_grad_norm
        if self._given_config.static_threshold is None:
            clipper.set_static_threshold(float(self._max_grad_norm))
            said = "it is the static threshold from here on, and the ledger holds it beside each step"
            limit = clipper.config.max_threshold
            if not clipper.held_back and limit is not None and limit < float(self._max_grad_norm):  # else it tells
                said += f"; no threshold is above `max_threshold`, {limit:g}"
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

    def _logs_after_this_step(self) -> bool:
        step = self.state.global_step + 1
        if step == 1 and self.args.logging_first_step:
            return True
        every = self.state.logging_steps
        return self.args.logging_strategy == "steps" and every > 0 and step % every == 0

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._logs_own_line = self.control.should_log and self.state.global_step > self._globalstep_last_logged
        if self._logs_own_line:
            self._losses.spread(
                kwargs["tr_loss"] if "tr_loss" in kwargs else args[0],
                self.state.global_step - self._globalstep_last_logged,
            )
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
                self._early.save(self.clipper, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._load_clip_state(checkpoint)

    def _load_clip_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        self._resumed = checkpoint
        try:
            loaded = self._made_clipper().load_state(checkpoint)
        except StateError as error:
            if self._given_config.static_threshold is None and "`static_threshold`" in str(error):
                raise StateError(
                    str(error).replace("`static_threshold` (in a Trainer `max_grad_norm`)", "`max_grad_norm`")
                ) from error
            raise
        if loaded and self._given_config.static_threshold is None:
            # A callback may have set another one before the checkpoint, and need not set it again.
            self._max_grad_norm = self._ready_clipper().static_threshold

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The usual card, with a section on what clipping did in this run (of the ledger, so there is none without one)."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        try:
            if self.clipper is not None:
                self.clipper.flush()
            add_section(
                Path(self.args.output_dir or ".") / "README.md",
                Path(self.clip_config.ledger or ""),
                learning_rate=self.args.learning_rate,
            )
        except Exception as error:  # what only records ends nothing
            logger.warning("The model card got no section on clipping (%s: %s).", type(error).__name__, error)


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
