"""What the clipper needs of an `accelerate.Accelerator`, without importing Accelerate."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_adaclip.errors import ClippingDefeatedError, ConfigError, StateError
from hf_adaclip.gradients.step_watch import StepWatch
from hf_adaclip.reliance import is_of, require
from hf_adaclip.run.ranks import RankCheck
from hf_adaclip.support import check_accelerator, distributed_type


class AcceleratorPort:
    """The few things about an accelerator that clipping depends on.

    Args:
        accelerator: An `accelerate.Accelerator`.

    Raises:
        UnsupportedSetupError: Its distributed setup is not supported, or it lacks what is relied on.
    """

    ranks_known = True

    def __init__(self, accelerator: Any) -> None:
        self.how = check_accelerator(accelerator)
        self._accelerator = accelerator
        if is_of("accelerate", accelerator):  # of a stand-in nothing of the kind is asked
            require(accelerator, "_optimizers")
            require(accelerator, "_models")
        if self.has_scaler and is_of("torch", accelerator.scaler):
            require(accelerator.scaler, "_scale")
        self._replacement: Callable[..., Tensor] | None = None
        # The stock method, kept even while `replace_clipping` has swapped it.
        self.stock_clip: Callable[..., Tensor] = accelerator.clip_grad_norm_

    @property
    def syncs_now(self) -> bool:
        """Whether this backward pass completes an accumulated gradient."""
        return bool(self._accelerator.sync_gradients)

    @property
    def steps_in_engine(self) -> bool:
        """Whether `backward` runs the whole step inside an engine (DeepSpeed)."""
        return distributed_type(self._accelerator) == "DEEPSPEED"

    def engine(self) -> Any:
        """The DeepSpeed engine.

        Raises:
            StateError: The accelerator has prepared no model yet.
        """
        wrapped = getattr(self._accelerator, "deepspeed_engine_wrapped", None)
        if wrapped is None:
            raise StateError(
                "`accelerator.prepare(...)` must be called before `clip_`, but no engine is there instead."
            )
        return wrapped.engine

    def rank_check(self) -> RankCheck | None:
        """Where several ranks see the same gradients (DDP), or shards of them (FSDP2)."""
        alike = distributed_type(self._accelerator) in ("MULTI_CPU", "MULTI_GPU", "FSDP")
        known = torch.distributed.is_available() and torch.distributed.is_initialized()
        return RankCheck() if alike and known else None

    @property
    def has_scaler(self) -> bool:
        """Whether float16 gradients are scaled (Accelerate makes a GradScaler only then)."""
        return self._accelerator.mixed_precision == "fp16" and getattr(self._accelerator, "scaler", None) is not None

    @property
    def loss_scale(self) -> Tensor | None:
        """The current loss scale, still on the device; reading it through `get_scale` would wait for it."""
        scaler = getattr(self._accelerator, "scaler", None)
        scale = getattr(scaler, "_scale", None)
        return scale if isinstance(scale, torch.Tensor) else None

    def only_optimizer(self) -> Sequence[Any]:
        """The optimizer that was prepared, if it is exactly one: with several, only the user knows which steps on what."""
        prepared = list(getattr(self._accelerator, "_optimizers", ()))
        return prepared if len(prepared) == 1 else ()

    @property
    def models(self) -> list[Any]:
        """The models that were prepared."""
        return list(getattr(self._accelerator, "_models", ()))

    def unscale(self, optimizers: Sequence[Any]) -> None:
        """Divide the loss scale out of the gradients of these optimizers, of all when there are none named.

        Does nothing in other precisions. A second call in one step is an error of GradScaler, hence only what is ours.
        """
        self._accelerator.unscale_gradients(list(optimizers) or None)

    @property
    def _writes_checkpoints(self) -> bool:
        configuration = getattr(self._accelerator, "project_configuration", None)
        if getattr(configuration, "save_on_each_node", False):
            return bool(self._accelerator.is_local_main_process)
        return bool(self._accelerator.is_main_process)

    def on_checkpoint(
        self, flush: Callable[[], None], save: Callable[[str], None], load: Callable[[str], None]
    ) -> "tuple[Slot, list[Any]]":
        """Call back with the folder when the accelerator saves or loads its state.

        Returns:
            The place of this clipper among those of the accelerator, and handles to `remove()`.

        `register_for_checkpointing` would pickle the state, and would make Accelerate refuse every checkpoint that was written
        before the clipper was added: it compares the number of registered objects.
        """

        def before_save(models: Any, weights: Any, folder: str) -> None:
            flush()  # on every rank: if it has to stop the run, all of them stop
            if self._writes_checkpoints:
                save(folder)

        def before_load(models: Any, folder: str) -> None:
            load(folder)

        slot = Slot(self._accelerator)
        return slot, [
            self._accelerator.register_save_state_pre_hook(before_save),
            self._accelerator.register_load_state_pre_hook(before_load),
            slot,
        ]

    def check_replaced(self) -> None:
        """Whether what `replace_clipping` put in place is still there.

        Raises:
            ClippingDefeatedError: Somebody has replaced it.
        """
        if self._replacement is not None and self._accelerator.clip_grad_norm_ is not self._replacement:
            raise ClippingDefeatedError(
                "`accelerator.clip_grad_norm_` must be the one that `install` put in place, but somebody has replaced it. "
                "Install last."
            )

    @contextlib.contextmanager
    def replace_clipping(
        self,
        clip: Callable[[Any], Tensor],
        take_threshold: Callable[[float], None],
        warn: Callable[[str], None],
    ) -> Iterator[None]:
        """Swap the accelerator's `clip_grad_norm_` while the context is open.

        Args:
            clip: Called with the parameters in its place. A call with `max_norm=inf`, which only asks for the norm, still goes to the
                stock method.
            take_threshold: Told the script's `max_norm` before that.
            warn: Told once when optimizers step and nobody clips, and at the end if some steps were not clipped.

        Raises:
            ConfigError: In a later call, for a norm other than L2, or a `max_norm` that is not above 0.
        """

        def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2.0) -> Tensor:
            if float(norm_type) != 2.0:
                raise ConfigError(f"`norm_type` must be 2 under hf_adaclip, but is {norm_type} instead.")
            threshold = float(max_norm)
            if threshold == math.inf:
                return self.stock_clip(parameters, max_norm, norm_type)
            if not threshold > 0:
                raise ConfigError(
                    f"`max_norm` must be above 0 under hf_adaclip, but is {max_norm}: it is the threshold while the controller warms up. "
                    "Give `clip_grad_norm_` the threshold of the script, such as 1.0, or float('inf') to ask for the norm only."
                )
            watch.clipped()
            take_threshold(threshold)
            return clip(parameters)

        before = self._accelerator.__dict__.get("clip_grad_norm_")
        self._accelerator.clip_grad_norm_ = self._replacement = clip_grad_norm_
        watch = StepWatch(lambda: getattr(self._accelerator, "_optimizers", ()), warn)
        try:
            yield
        finally:
            watch.end()
            self._replacement = None
            if before is None:
                del self._accelerator.clip_grad_norm_
            else:
                self._accelerator.clip_grad_norm_ = before


class Slot:
    """A place among the clippers of one accelerator: with several, each has a state file of its own."""

    def __init__(self, accelerator: Any) -> None:
        self._all: list[Slot] = vars(accelerator).setdefault("_hf_adaclip_slots", [])
        self._all.append(self)
        self._number: int | None = None

    @property
    def number(self) -> int:
        """Counted from 0 in the order in which the clippers were made.

        Given when it is first asked for, and then to all that are still there: a clipper that another one has replaced by then, as in a
        notebook's cell that is run again, takes no number.
        """
        for slot in self._all if self in self._all else [*self._all, self]:  # saved again after `close`
            if slot._number is None:
                taken = {other._number for other in self._all}
                slot._number = next(i for i in range(len(self._all) + 1) if i not in taken)
        assert self._number is not None
        return self._number

    def remove(self) -> None:
        if self in self._all:
            self._all.remove(self)
