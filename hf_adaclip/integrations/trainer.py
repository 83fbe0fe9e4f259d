"""`AdaptiveClipTrainer`, `AdaptiveClipMixin` and `attach`: the clipper in the seam of `transformers.Trainer`.

The seam is `Trainer._clip_grad_norm(model)`, called once per optimizer step after accumulation, in transformers 5.3 and later. What it
returns is the `grad_norm` that the Trainer logs.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from huggingface_hub import ModelCard
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.utils.import_utils import is_sagemaker_mp_enabled

from hf_adaclip.audit.run_report import clipping_section, load_run
from hf_adaclip.audit.tail import find_tail
from hf_adaclip.clipper import AdaptiveClipper
from hf_adaclip.config import AdaptiveClipConfig, ClipArgument
from hf_adaclip.convergence.callback import ConvergenceCallback
from hf_adaclip.errors import ClippingDefeatedError, ConfigError, TrainingTroubleError, UnsupportedSetupError
from hf_adaclip.events import ClipEvent
from hf_adaclip.statistics import for_reporters
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

    def __init__(self, *args: Any, clip: ClipArgument = "adaptive", **kwargs: Any) -> None:
        config = AdaptiveClipConfig.resolve(clip)
        super().__init__(*args, **kwargs)
        self._set_up_clipping(config)

    def _set_up_clipping(self, config: AdaptiveClipConfig) -> None:
        _check_seam()
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
        self._last_loss: Tensor | None = None
        self._planned_steps = 0
        if config.nan_filter_on_device:
            self.args.logging_nan_inf_filter = False
        self.add_callback(ConvergenceCallback(self.args.output_dir))
        self.add_callback(_StartCallback(self))

    def _complete_config(self, trial: Any) -> AdaptiveClipConfig:
        """The config with what the Trainer knows filled in. Anew for every run: a search changes `args` between its trials."""
        _check_max_grad_norm(self.args.max_grad_norm)
        config = self._given_config
        if config.ledger == "auto":
            folder = self.args.output_dir if trial is None else self._get_output_dir(trial)
            config = config.replace(ledger=str(Path(folder or ".") / LEDGER_FILE))
        if distributed_type(self.accelerator) == "DEEPSPEED":
            config = config.replace(
                one_step_late=True
            )  # what is not possible there is refused here, not at the first step
        if config.static_threshold is None:
            config = config.replace(static_threshold=float(self.args.max_grad_norm))
        return config

    # -- the run -------------------------------------------------------------------------------------------------

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Every call is a run of its own: a second `train()`, another trial, or a retry with a smaller batch starts afresh.
        self.clipper = self._step_loss = self._last_loss = None
        self.clip_config = self._complete_config(kwargs.get("trial"))
        try:
            output = super()._inner_training_loop(*args, **kwargs)
        except BaseException:
            self._end_clipping(clean=False)
            raise
        self._end_clipping(clean=True)
        return output

    def _end_clipping(self, *, clean: bool) -> None:
        # The clipper stays: its statistics and its config are what people look at after training.
        if self.clipper is not None:
            self.clipper.close(clean=clean)

    def _config_of_run(self) -> AdaptiveClipConfig:
        hook = "on_pre_optimizer_step"
        lookers = [
            c
            for c in self.callback_handler.callbacks
            if getattr(type(c), hook, None) is not getattr(TrainerCallback, hook)
        ]
        # Such a callback may look at the gradients, and is to see them clipped.
        config = self.clip_config
        if config.pace_start is None and self._planned_steps:
            config = config.replace(
                pace_start=pace_start(self._planned_steps, self.args.get_warmup_steps(self._planned_steps))
            )
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
            logger.info("Adaptive clipping:\n%s", self.clipper.explain())
        return self.clipper

    # -- the step ------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        # The losses of the micro-batches of one step add up to the step's loss, as in the Trainer's own running sum.
        self._step_loss = loss.detach() if self._step_loss is None else self._step_loss + loss.detach()
        if self.clip_config.nan_filter_on_device:
            last = torch.zeros_like(loss) if self._last_loss is None else self._last_loss
            self._last_loss = loss = torch.where(torch.isfinite(loss), loss, last)
        return loss

    def _clip_grad_norm(self, model: torch.nn.Module) -> Tensor:
        loss, self._step_loss = self._step_loss, None
        return self._ready_clipper().clip_(model.parameters(), loss=loss, measure=self._logs_after_this_step() or None)

    def _check_that_it_acts(self) -> None:
        if self.clipper is None or not self.clipper.step:
            raise ClippingDefeatedError(
                f"`Trainer._clip_grad_norm` must be called in every optimizer step, but {type(self).__name__} has made one without it: "
                "something has replaced the method or the training loop. Let the mixin stand first among the bases, and attach last."
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

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if self.clipper is not None and "loss" in logs:
            logs = {**logs, **for_reporters(self.clipper.metrics(), self.callback_handler.callbacks)}
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
        if checkpoint is not None and not self._ready_clipper().load_state(checkpoint):
            logger.warning(
                "%s has no state of hf_adaclip (a checkpoint of the stock Trainer?): the controller starts afresh.",
                checkpoint,
            )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The usual card, with a section on what clipping did in this run (of the ledger, so there is none without one)."""
        super().create_model_card(*args, **kwargs)
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


class _StartCallback(TrainerCallback):
    """At the start of a run: that clipping works here, and that it is reached."""

    def __init__(self, trainer: AdaptiveClipMixin) -> None:
        self._trainer = trainer
        self._acts = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._acts = False
        clipper = self._trainer._ready_clipper()
        if self._trainer.clip_config.self_test:
            clipper.self_test(model.parameters())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._acts and self._trainer.clip_config.self_test:
            self._trainer._check_that_it_acts()
            self._acts = True


class AdaptiveClipTrainer(AdaptiveClipMixin, Trainer):
    """`transformers.Trainer` with adaptive clipping: everything else is Trainer.

    Args:
        clip (`str`, `dict`, `Path` or `AdaptiveClipConfig`, *optional*, defaults to `"adaptive"`):
            Name of a controller, a config or its fields, or the path of a config's JSON.
        args, kwargs:
            What the Trainer takes.

    Writes `clip_ledger.jsonl` and `convergence.jsonl` into `args.output_dir`, `clip_state.safetensors` into every checkpoint, and logs
    `clip/threshold`, `clip/coefficient`, `clip/fraction`, `clip/norm_max`, `clip/spikes`, `clip/skipped`, `clip/pace`, `clip/phase` and
    more beside `grad_norm` (see `RunStatistics.metrics`).
    """


def attach(trainer: AnyTrainer, clip: ClipArgument = "adaptive") -> AnyTrainer:
    """Give adaptive clipping to a Trainer that somebody else built, before its `train()`. Returns the same object.

    Args:
        trainer: Any `transformers.Trainer`, of any subclass.
        clip: As for [`AdaptiveClipTrainer`].

    Raises:
        ConfigError: It has adaptive clipping already, or a setting is wrong.
        UnsupportedSetupError: transformers or the distributed setup is not supported.
    """
    if not isinstance(trainer, Trainer):
        raise ConfigError(f"`trainer` must be a transformers.Trainer, but is {type(trainer).__name__} instead.")
    if isinstance(trainer, AdaptiveClipMixin):
        raise ConfigError("`trainer` must not have adaptive clipping yet, but it has: attach once, before `train()`.")
    config = AdaptiveClipConfig.resolve(clip)
    kind, before = type(trainer), dict(trainer.__dict__)
    # A subclass made on the spot, so that `super()` finds the methods of whatever Trainer this is.
    trainer.__class__ = type(
        f"AdaptiveClip{kind.__name__}", (AdaptiveClipMixin, kind), {"__module__": kind.__module__}
    )
    try:
        AdaptiveClipMixin._set_up_clipping(trainer, config)  # type: ignore[arg-type]
    except Exception:
        trainer.__class__ = kind
        trainer.__dict__.clear()
        trainer.__dict__.update(before)
        raise
    return trainer


def pace_start(steps: int, warmup_steps: float) -> int:
    """Steps of the pace's start in a run of so many: a schedule that warms up has a start of its own, and two of them are too slow."""
    return max(1, round(PACE_START_SHARE * steps - warmup_steps))


def _check_seam() -> None:
    if not callable(getattr(Trainer, "_clip_grad_norm", None)):
        raise UnsupportedSetupError(
            f"`transformers` must have Trainer._clip_grad_norm (5.3 or later), but is {transformers.__version__} instead. "
            "Upgrade it, or use AdaptiveClipper in a loop of your own."
        )


def _check_max_grad_norm(value: float | None) -> None:
    if value is None or not value > 0:
        raise ConfigError(
            f"`max_grad_norm` must be above 0 under adaptive clipping, but is {value} instead: transformers would never call the "
            "clipping seam. It is the threshold of the warm-up, and the ceiling where it cut most of that: keep the default 1.0, or "
            "set one that never acts, such as 1e9."
        )
