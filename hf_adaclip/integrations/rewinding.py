"""Going back within a Trainer's loop, and leaving out steps of it: the loop itself goes on as it would.

Number of the step, schedule, progress and log stay what they are. What of the steps that were undone would go on deciding is put back or
set aside: the best metric and its checkpoint, the counters of callbacks, and the checkpoints that were written.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from hf_adaclip.errors import UnsupportedSetupError
from hf_adaclip.gradients.optimizers import unwrap_optimizer
from hf_adaclip.incidents.leaving import Leaving
from hf_adaclip.incidents.snapshot import check_optimizer, spread_out
from hf_adaclip.integrations.checkpoints import BEST, older_checkpoint, put_back_best
from hf_adaclip.run.checkpoint import CHECKPOINT
from hf_adaclip.run.points import Rewound
from hf_adaclip.support import distributed_type

if TYPE_CHECKING:
    from hf_adaclip.integrations.transformers import AdaptiveClipMixin

logger = logging.getLogger(__name__)

_OF_POLICIES: Final = ("GRPOTrainer", "RLOOTrainer")
"""Trainers of TRL that train for several steps on what was written before (looked up in 1.16)."""
UNDONE: Final = "undone-"
"""Before the names of checkpoints that were undone: nobody takes them for the last one, and nobody deletes them."""


class Rewinding(TrainerCallback):
    """Looks after every step of one Trainer; it comes after `SeamWatch`, which knows where the run begins.

    Args:
        trainer: Whose steps they are.

    Raises:
        UnsupportedSetupError: `on_trouble` is 'rewind', and what is known by now cannot be put back.
    """

    def __init__(self, trainer: "AdaptiveClipMixin") -> None:
        self._trainer = trainer
        self._leaving: Leaving | None = None
        self._begun = False
        if trainer.clip_config.on_trouble == "rewind":
            _check_at_construction(trainer)

    # -- the loop ------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        clipper, offset = trainer._ready_clipper(), trainer._watch.offset
        self._leaving, self._begun = clipper.leaving(offset), False
        if clipper.rewinder is not None:
            clipper.rewinder.stop = trainer._end_on_trouble
            clipper.rewinder.elsewhere = lambda step: older_checkpoint(trainer, step)
            clipper.rewinder.keepers.append(self._keep)
        if not state.global_step:  # a run that is gone on with gets its random numbers later
            self._begin()
            self._leaving.made(clipper.step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin()
        last = state.global_step >= state.max_steps > 0
        try:
            self._trainer._ready_clipper().snapshot(last=last)
        finally:
            rewound = self._trainer._ready_clipper().rewound
            if rewound is not None:
                self._tell(rewound, state)

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            rewinder = self._trainer._ready_clipper().rewinder
            if rewinder is not None:
                rewinder.begin()

    # -- steps that are left out -----------------------------------------------------------------------------------

    def leaves_out(self) -> bool:
        """Whether the present step is left out."""
        clipper = self._trainer.clipper
        if self._leaving is None or clipper is None or not self._leaving.names(clipper.step):
            return False
        self._leaving.begin(clipper.step)
        return True

    def pass_over(self) -> Tensor:
        """Count the present step, and make the optimizer's next call of `step` one that does nothing. Returns the norm that there is: 0."""
        trainer = self._trainer
        trainer._ready_clipper().leaves_out()
        trainer._losses.leave_out()
        optimizer: Any = trainer.optimizer
        own = vars(optimizer).get("step")

        def step(*args: Any, **kwargs: Any) -> None:
            if own is None:
                del optimizer.step
            else:
                optimizer.step = own

        if hasattr(own, "_wrapped_by_lr_sched"):
            optimizer._opt_called = True  # what a scheduler warns without
        optimizer.step = step
        return torch.zeros((), dtype=torch.float32, device=trainer.args.device)

    # -- what goes back with the weights -----------------------------------------------------------------------------

    def _keep(self) -> Callable[[], None]:
        trainer = self._trainer
        best = {name: getattr(trainer.state, name, None) for name in BEST}
        callbacks = [
            (c, dict(c.state().get("attributes", {})))
            for c in trainer.callback_handler.callbacks
            if isinstance(c, ExportableState)
        ]
        scheduler: Any = trainer.lr_scheduler
        # The only schedule that goes by evaluations, some of which are undone.
        plateau = dict(scheduler.state_dict()) if isinstance(scheduler, ReduceLROnPlateau) else None
        rates: list[Any] = (
            [group["lr"] for group in unwrap_optimizer(trainer.optimizer).param_groups] if plateau else []
        )

        def put_back() -> None:
            put_back_best(trainer, best, callbacks)
            if plateau is not None:
                scheduler.load_state_dict(dict(plateau))
                for group, rate in zip(unwrap_optimizer(trainer.optimizer).param_groups, rates, strict=True):
                    group["lr"] = rate

        return put_back

    def _tell(self, rewound: Rewound, state: Any) -> None:
        """Set aside what was written in the meantime, and note it in `trainer_state.json`."""
        trainer = self._trainer
        offset = trainer._watch.offset
        first, last = rewound.first + offset, rewound.last + offset
        if trainer.args.should_save:
            set_aside(trainer._run_folder(), first, last)
        best = state.best_model_checkpoint
        if best is not None and not Path(best).is_dir():
            logger.warning(
                "Adaptive clipping: %s was the best before step %d, and has been deleted for one that was undone: the next evaluation is "
                "the best again.",
                *(best, first),
            )
            for name in BEST:
                setattr(state, name, None)
        state.log_history.append(
            {
                "clip/rewound_to": first,
                "clip/left_out": last - first + 1,
                "clip/reason": rewound.reason,
                "epoch": state.epoch,
                "step": state.global_step,
            }
        )


def _check_at_construction(trainer: Any) -> None:
    """Whether what is known before training can be put back.

    Raises:
        UnsupportedSetupError: It cannot.
    """
    if distributed_type(trainer.accelerator) == "FSDP":
        raise spread_out()
    if any(k.__name__ in _OF_POLICIES and k.__module__.startswith("trl.") for k in type(trainer).__mro__):
        raise UnsupportedSetupError(
            f"`on_trouble` must not be 'rewind' with {type(trainer).__name__}, but is: it trains for several steps on what an older policy "
            "has written, which would be left over. Set 'stop' or 'continue'."
        )
    if trainer.optimizer is not None:
        check_optimizer(unwrap_optimizer(trainer.optimizer))


def set_aside(folder: Path, first: int, last: int) -> None:
    """Rename checkpoints whose weights were undone.

    Args:
        folder: Of the run.
        first, last: Steps that were undone, counted from 0.
    """
    for path in folder.glob("checkpoint-*"):
        found = CHECKPOINT.fullmatch(path.name)
        if found is None or not first < int(found.group(1)) <= last:
            continue
        names = (f"{UNDONE}{path.name}" + (f"-{again}" if again > 1 else "") for again in range(1, 10_000))
        try:
            path.rename(next(folder / name for name in names if not (folder / name).exists()))
        except (OSError, StopIteration) as error:
            logger.warning("Adaptive clipping: %s was undone, but could not be renamed (%s).", path, error)
