"""The seam of `transformers.Trainer`: whether it is there, whether it is ours, and for which `max_grad_norm` it is called."""

import logging
import math
import numbers
from typing import Any, Final

import transformers
from transformers import Trainer

from hf_adaclip.errors import ConfigError, UnsupportedSetupError

logger = logging.getLogger(__name__)

_SEAMS: Final = (
    "_clip_grad_norm",
    "_inner_training_loop",
    "_maybe_log_save_evaluate",
    "_save_optimizer_and_scheduler",
    "_load_optimizer_and_scheduler",
)
"""Methods of the Trainer that have to be there, and to be ours: a new name of one of them would be a feature that silently is none."""


def check_seam() -> None:
    """Whether this transformers has the methods that clipping hangs on.

    Raises:
        UnsupportedSetupError: One is missing.
    """
    missing = [name for name in _SEAMS if not callable(getattr(Trainer, name, None))]
    if missing:
        raise UnsupportedSetupError(
            f"`transformers` must have Trainer.{missing[0]} (5.3 or later), but is {transformers.__version__} instead. "
            "Upgrade it, or use AdaptiveClipper in a loop of your own."
        )


def check_instance(trainer: Trainer) -> None:
    """Before adaptive clipping is attached: a method that was put on the object before would go past it.

    Raises:
        ConfigError: There is one.
    """
    replaced = [name for name in _SEAMS if name in vars(trainer)]
    if replaced:
        raise ConfigError(
            f"`trainer.{replaced[0]}` must be the method of its class, but somebody has replaced it on the object: clipping would not be "
            "reached. Override it in a subclass that calls `super()`, and attach to that."
        )


def warn_of_own_clipping(kind: type, mixin: type) -> None:
    """A class below the mixin that clips in its own way is no longer asked: the mixin takes the place of the method."""
    below = kind.__mro__[kind.__mro__.index(mixin) + 1 :]
    own = next(k for k in below if "_clip_grad_norm" in vars(k))
    if own is not Trainer:
        logger.warning(
            "%s._clip_grad_norm is no longer called: adaptive clipping takes its place. Leave parameters out by `parameter_rules`.",
            own.__name__,
        )


def check_max_grad_norm(value: Any) -> None:
    """Whether transformers calls the seam for this value, at construction and in every step.

    Raises:
        ConfigError: It does not, or the value is no threshold.
    """
    if not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
        raise ConfigError(
            f"`max_grad_norm` must be above 0 and finite under adaptive clipping, but is {value!r} instead: at 0 transformers never calls "
            "the clipping seam. It is the threshold of the warm-up, and the ceiling where it cut most of that: keep the default 1.0, or "
            "set one that never acts, such as 1e9."
        )
