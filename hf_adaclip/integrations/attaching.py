"""What `attach` finds on a Trainer that has a life of its own already: methods put on the object, and a run that is just beginning."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

from transformers import Trainer


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
    frame: FrameType | None = sys._getframe(1)
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
