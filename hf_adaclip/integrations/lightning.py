"""Lightning: the callback `AdaptiveClip`, in code or by class path in the YAML of `LightningCLI`.

It acts in `on_before_optimizer_step`, where accumulation is done and 16-mixed is unscaled. In 32 and bf16 Lightning calls that hook from
the closure of `optimizer.step`, in 16-mixed before it; both ways are known to the guards of the optimizer.
"""

import importlib
import importlib.util
import logging
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor

from hf_adaclip.clipper import AdaptiveClipper
from hf_adaclip.config import AdaptiveClipConfig, ClipArgument
from hf_adaclip.errors import ConfigError, UnsupportedSetupError
from hf_adaclip.gradients.optimizers import unscales_by_itself
from hf_adaclip.gradients.transfer import HOST, moved
from hf_adaclip.ledger.schema import LEDGER_FILE
from hf_adaclip.reliance import is_of, require
from hf_adaclip.run.checkpoint import STATE_FILE
from hf_adaclip.run.run_plan import RunPlan

logger = logging.getLogger(__name__)

_NAMES: Final = ("lightning.pytorch", "pytorch_lightning")
REFUSED: Final = {
    "FSDPStrategy": "clipping by norm is not available there: a rank sees flat shards without boundaries between parameters",
    "DeepSpeedStrategy": "the engine clips inside its own step, after this hook",
    "ModelParallelStrategy": "tensor parallelism and FSDP2 through Lightning have not been run",
    "XLAStrategy": "gradients are not reduced when they are clipped",
    "SingleDeviceXLAStrategy": "gradients are not reduced when they are clipped",
}
"""Strategies that are refused, and why; any that is neither `SingleDeviceStrategy` nor `DDPStrategy` is refused as unknown."""


def _bases() -> tuple[type, ...]:
    """`Callback` of each of the two packages that Lightning is published as and that is in use, or else of the one that is there."""
    used = [name for name in _NAMES if name in sys.modules]
    there = [name for name in _NAMES if importlib.util.find_spec(name.partition(".")[0]) is not None]
    if not there:
        raise ModuleNotFoundError(
            "`lightning` must be installed for this callback: pip install 'hf_adaclip[lightning]'."
        )
    return tuple(importlib.import_module(name).Callback for name in used or there[:1])


class AdaptiveClip(*_bases()):  # type: ignore[misc]
    """Adaptive gradient clipping in a Lightning `Trainer`, with automatic or manual optimization, one clipper for each optimizer.

    Args:
        clip: A controller, `NAME:FIELD=VALUE,...`, an [`AdaptiveClipConfig`], or the path of its JSON.
        static_threshold: Threshold of the warm-up, in place of `gradient_clip_val`; unset, that of `clip`, or 1.0.

    Raises:
        ConfigError: A setting is wrong; when training is set up, `gradient_clip_val` is set beside it.
        UnsupportedSetupError: `on_trouble` is 'rewind'; or, when training is set up, the strategy, the precision or an optimizer is not
            supported.

    The ledger is `clip_ledger.jsonl` in the logger's folder, or else in `default_root_dir`; a second optimizer's is `clip_ledger_1.jsonl`.
    What is kept of steps that go wrong is in `incidents/` beside it. Logs `clip/threshold` and the other numbers every `log_every_n_steps`.
    The state is in every checkpoint.

    Example:
        >>> trainer = Trainer(callbacks=[AdaptiveClip("adaptive")])  # doctest: +SKIP
    """

    def __init__(self, clip: str | ClipArgument = "adaptive", static_threshold: float | None = None) -> None:
        super().__init__()
        config = AdaptiveClipConfig.resolve(clip)
        if config.on_trouble == "rewind":
            raise UnsupportedSetupError(
                "`on_trouble` must not be 'rewind' in Lightning, but is: its loop keeps counters and schedules that have not been tried "
                "with weights that are put back. Set 'stop', and go on from a checkpoint."
            )
        # Callbacks and the module's own hook look at the gradients between clipping and the step.
        config = config.replace(fold="never")
        self.config = config if static_threshold is None else config.replace(static_threshold=static_threshold)
        self.clippers: list[AdaptiveClipper] = []
        """One for each optimizer, in the order of `trainer.optimizers`; they stay after training, to be looked at."""
        self._optimizers: list[Any] = []
        self._loss: Tensor | None = None
        self._logged = 0
        self._loaded: dict[str, Tensor] = {}

    # -- the run -------------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        self.clippers, self._optimizers, self._loaded = [], [], {}
        self._loss, self._logged = None, 0
        if trainer.gradient_clip_val:
            raise ConfigError(
                f"`gradient_clip_val` must not be set beside AdaptiveClip, but is {trainer.gradient_clip_val} instead: it would clip "
                f"again. Leave it out; AdaptiveClip(static_threshold={trainer.gradient_clip_val}) is the threshold of the warm-up."
            )
        _check_strategy(trainer.strategy)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            clipper = self._clipper(trainer, pl_module, optimizer)
            if self.config.self_test:
                clipper.self_test()

    def _clipper(self, trainer: Any, pl_module: Any, optimizer: Any) -> AdaptiveClipper:
        for known, clipper in zip(self._optimizers, self.clippers, strict=True):
            if known is optimizer:
                return clipper
        scaler = _scaler(trainer)
        _check_optimizer(optimizer, scaler)
        number = len(self.clippers)
        config = self.config
        if config.ledger == "auto":
            folder = Path(trainer.log_dir or trainer.default_root_dir)
            config = config.replace(ledger=str(folder / _numbered(LEDGER_FILE, number)))
        with tempfile.TemporaryDirectory() as temporary:
            loaded = self._loaded.pop(str(number), None)
            if loaded is not None:
                (Path(temporary) / STATE_FILE).write_bytes(loaded.numpy().tobytes())
            epochs, epoch_steps = _epochs(trainer)
            clipper = AdaptiveClipper(
                config,
                accelerator=_stand_in(trainer, scaler),
                optimizer=optimizer,
                model=pl_module,
                is_main_process=trainer.is_global_zero,
                plan=RunPlan(epochs=epochs, epoch_steps=epoch_steps, checkpoint=None if loaded is None else temporary),
            )
            if loaded is not None:
                clipper.load_state(temporary)
        if clipper.held_back and trainer.is_global_zero and not number:
            logger.warning(clipper.held_back)
        self._optimizers.append(optimizer)
        self.clippers.append(clipper)
        return clipper

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        processing_class = getattr(pl_module, "tokenizer", getattr(pl_module, "processor", None))
        for clipper in self.clippers:
            clipper.watch(batch, processing_class=processing_class)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        scale = getattr(_scaler(trainer), "_scale", None)  # the loss comes scaled
        loss = loss.detach() if scale is None else loss.detach() / scale
        self._loss = loss if self._loss is None else self._loss + loss

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        loss, self._loss = self._loss, None
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        clipper = self._clipper(trainer, pl_module, optimizer)
        if all(p.grad is None for p in parameters):
            clipper.unwatch()
            return  # `training_step` returned None, and this step is none
        clipper.clip_(parameters, loss=loss)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self.clippers[0].step if self.clippers else 0
        every = trainer.log_every_n_steps
        if not every or step == self._logged or step % every:
            return
        self._logged = step
        metrics: dict[str, float] = {}
        for number, clipper in enumerate(self.clippers):
            for name, value in clipper.metrics().items():
                if not isinstance(value, str):
                    metrics[name if not number else name.replace("clip/", f"clip_{number}/")] = value
        for each in trainer.loggers:
            each.log_metrics(metrics, step=trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._close(clean=True)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close(clean=False)

    def _close(self, *, clean: bool) -> None:
        for clipper in self.clippers:
            clipper.close(clean=clean)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state files of all clippers as bytes, by number; empty before the first step."""
        state = {}
        for number, clipper in enumerate(self.clippers):
            with tempfile.TemporaryDirectory() as temporary:
                clipper.save_state(temporary)
                file = Path(temporary) / STATE_FILE
                if file.is_file():  # a tensor, because checkpoints are read with `weights_only`
                    state[str(number)] = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until the optimizers are there.

        Raises:
            StateError: When training starts: the state was written under other settings.
        """
        self._loaded = {str(number): moved(tensor, HOST) for number, tensor in state_dict.items()}


def clipper_for_fabric(
    fabric: Any, optimizer: Any, clip: str | ClipArgument = "adaptive", **options: Any
) -> AdaptiveClipper:
    """The clipper for a loop of Lightning Fabric: `clipper.clip_(model.parameters(), loss=loss)` after `fabric.backward(loss)`.

    Args:
        fabric: The `Fabric`. In 16-mixed it unscales for the clipper.
        optimizer: What `fabric.setup` has returned.
        clip: As for [`AdaptiveClip`].
        options: What else [`AdaptiveClipper`] takes, such as `ledger`.

    Raises:
        UnsupportedSetupError: The strategy, the precision or the optimizer is not supported.
    """
    _check_strategy(fabric.strategy)
    precision = fabric.strategy.precision
    scaler = getattr(precision, "scaler", None)
    inner = getattr(
        optimizer, "optimizer", optimizer
    )  # Fabric's wrapper is a copy that does not share what guards set
    _check_optimizer(inner, scaler)

    def unscale(optimizers: Any) -> None:
        precision.unscale_gradients(inner)

    stand_in = _stand_in(fabric, scaler, unscale=None if scaler is None else unscale)
    config = AdaptiveClipConfig.resolve(clip)
    return AdaptiveClipper(
        config, accelerator=stand_in, optimizer=inner, is_main_process=fabric.is_global_zero, **options
    )


def _stand_in(trainer: Any, scaler: Any, unscale: Callable[[Any], None] | None = None) -> SimpleNamespace:
    """What a clipper asks of an accelerator, answered for Lightning: the loss scale, and that gradients are whole and unscaled."""
    return SimpleNamespace(
        distributed_type="MULTI_GPU" if trainer.world_size > 1 else "NO",
        parallelism_config=None,
        sync_gradients=True,
        mixed_precision="no" if scaler is None else "fp16",
        scaler=scaler,
        clip_grad_norm_=torch.nn.utils.clip_grad_norm_,
        unscale_gradients=unscale or (lambda optimizers: None),
        # A checkpoint's state goes through the callback, or is the loop's own affair.
        register_save_state_pre_hook=lambda hook: SimpleNamespace(remove=lambda: None),
        register_load_state_pre_hook=lambda hook: SimpleNamespace(remove=lambda: None),
    )


def _epochs(trainer: Any) -> tuple[float | None, int | None]:
    """How often the data is gone through, and the steps of an epoch; None where nothing says so."""
    batches = trainer.num_training_batches / (trainer.accumulate_grad_batches or 1)
    per_epoch = math.ceil(batches) if 0 < batches < math.inf else None
    epochs, steps = trainer.max_epochs, trainer.max_steps
    planned = math.inf if epochs is None or epochs < 0 else float(epochs)
    if steps >= 0 and per_epoch is not None:
        # By hand, it counts the steps of all optimizers.
        counted = per_epoch * (1 if trainer.lightning_module.automatic_optimization else len(trainer.optimizers))
        planned = min(planned, steps / counted)
    return (planned if 0 < planned < math.inf else None), per_epoch


def _scaler(trainer: Any) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _numbered(name: str, number: int) -> str:
    return name if not number else name.replace(".", f"_{number}.", 1)


def _check_strategy(strategy: Any) -> None:
    kinds = [kind.__name__ for kind in type(strategy).__mro__]
    for name, why in REFUSED.items():
        if name in kinds:
            raise UnsupportedSetupError(
                f"`strategy` must be SingleDeviceStrategy or DDPStrategy under adaptive clipping, but is {name} instead: {why}. "
                "Leave the clipping to Lightning there (`gradient_clip_val`, where the strategy has it)."
            )
    if not {"SingleDeviceStrategy", "DDPStrategy"} & set(kinds):
        raise UnsupportedSetupError(
            f"`strategy` must be SingleDeviceStrategy or DDPStrategy under adaptive clipping, but is {kinds[0]} instead, which is unknown."
        )


def _check_optimizer(optimizer: Any, scaler: Any) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedSetupError(
            "`optimizer` must compute one gradient a step under adaptive clipping, but is LBFGS instead. Leave the callback out."
        )
    if is_of("torch", scaler):
        require(scaler, "_scale")
    if scaler is not None and unscales_by_itself(optimizer):
        raise UnsupportedSetupError(
            f"`optimizer` must not unscale by itself in 16-mixed, but is a fused {type(optimizer).__name__} instead: its gradients are "
            "still scaled when they are clipped. Make it with fused=False, or train in bf16-mixed."
        )
