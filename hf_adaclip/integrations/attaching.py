"""`attach`: adaptive clipping for a Trainer that has a life of its own already.

It may have methods put on the object, and be in a run that is just beginning.
"""

import logging
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple, TypeVar

from transformers import Trainer

from hf_adaclip.config import AdaptiveClipConfig, ClipArgument
from hf_adaclip.errors import ConfigError
from hf_adaclip.integrations.transformers import AdaptiveClipMixin
from hf_adaclip.reliance import require

logger = logging.getLogger(__name__)


AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


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
    callbacks, filters = trainer.callback_handler.callbacks, trainer.args.logging_nan_inf_filter
    heard = list(callbacks)
    # A subclass made on the spot, so that `super()` finds the methods of whatever Trainer this is.
    base = take_replaced(trainer, AdaptiveClipMixin)
    trainer.__class__ = type(
        f"AdaptiveClip{kind.__name__}", (AdaptiveClipMixin, base), {"__module__": kind.__module__}
    )
    try:
        AdaptiveClipMixin._set_up_clipping(trainer, config)  # type: ignore[arg-type]
        if begun is not None:
            AdaptiveClipMixin._join_run(trainer, *begun)  # type: ignore[arg-type]
    except Exception:
        trainer.__class__ = kind
        trainer.__dict__.clear()
        trainer.__dict__.update(before)
        callbacks[:] = heard
        trainer.args.logging_nan_inf_filter = filters
        raise
    return trainer


def _kind_of(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


class TrainBegin(NamedTuple):
    """A training loop that has come to `on_train_begin`.

    Attributes:
        checkpoint: Folder that the run goes on from, None for a new one.
        trial: Of a hyperparameter search.
    """

    checkpoint: str | None
    trial: Any


def find_train_begin(trainer: Trainer) -> TrainBegin | None:
    """The loop of this Trainer, if this is called from its `on_train_begin`; None from anywhere else.

    The Trainer keeps neither on itself: which event it is at, and which checkpoint it resumes from, only its frames know.
    """
    frame: FrameType | None = require(sys, "_getframe")(1)
    beginning = False
    while frame is not None:
        name, local = frame.f_code.co_name, frame.f_locals
        if name == "on_train_begin" and local.get("self") is trainer.callback_handler:
            beginning = True
        elif beginning and name == "_inner_training_loop" and "resume_from_checkpoint" in local:
            return TrainBegin(local["resume_from_checkpoint"], local.get("trial"))
        frame = frame.f_back
    return None


def take_replaced(trainer: Trainer, mixin: type) -> type[Trainer]:
    """Move methods that somebody has put on the object, and that the mixin overrides, into a class: there `super()` finds them.

    Args:
        trainer: Loses them from its `__dict__`, where they would hide those of any class.
        mixin: What is to stand above them.

    Returns:
        The Trainer's own class, or one made below it for these methods.
    """
    kind, own = type(trainer), vars(trainer)
    replaced = [name for name in vars(mixin) if name in own and callable(own[name])]
    if not replaced:
        return kind
    methods = {name: _as_method(own.pop(name)) for name in replaced}
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, **methods})


def _as_method(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return method
