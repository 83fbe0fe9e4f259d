"""The seam of `transformers.Trainer`: whether it is there, whether it is ours, and for which `max_grad_norm` it is called."""

import logging
from collections.abc import Mapping
from typing import Any, Final

from transformers import Trainer

from hf_adaclip.config import AdaptiveClipConfig, as_number
from hf_adaclip.errors import ConfigError
from hf_adaclip.hints import misplaced
from hf_adaclip.reliance import require, require_mention

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
    """Whether this transformers has what clipping hangs on.

    Raises:
        UnsupportedSetupError: Something is missing.
    """
    for name in (*_SEAMS, "_get_output_dir", "_load_from_checkpoint", "_load_rng_state"):
        require(Trainer, name)
    # Comes into being as training begins.
    require_mention((f for f in vars(Trainer).values() if callable(f)), "_globalstep_last_logged")


def check_bases(kind: type, mixin: type) -> None:
    """Whether there is a Trainer to mix into.

    Raises:
        ConfigError: There is none.
    """
    if not issubclass(kind, Trainer):
        raise ConfigError(
            f"`{mixin.__name__}` must stand before a Trainer among the bases of {kind.__name__}, but there is no Trainer among them. Write "
            f"`class {kind.__name__}({mixin.__name__}, Trainer)`."
        )


def misnamed_clip(error: str, given: Mapping[str, Any]) -> ConfigError | None:
    """What to say where a Trainer does not know an argument that was meant for the clipping; None where it was not.

    Args:
        error: Python's message.
        given: The arguments by name.
    """
    name = next((key for key in given if f"unexpected keyword argument '{key}'" in error), None)
    if name is None:
        return None
    value, hint = given[name], misplaced(name, ("clip",), AdaptiveClipConfig.names())
    if isinstance(value, AdaptiveClipConfig) or "clip" in name.lower():
        hint = hint or " Did you mean `clip`?"
    return ConfigError(f"`{name}` must be an argument of the Trainer, but is unknown instead.{hint}") if hint else None


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
    if isinstance(value, bool) or (value is not None and not isinstance(as_number(value), float)):
        raise ConfigError(
            f"`max_grad_norm` must be a number, but is {value!r} instead: pass 1.0, or `inf` for a threshold that never acts. "
            "'auto' belongs into a DeepSpeed JSON, which takes the Trainer's number for it."
        )
    if value is None or not value > 0:
        raise ConfigError(
            f"`max_grad_norm` must be above 0 under adaptive clipping, but is {value} instead: transformers would never call the "
            "clipping seam. It is the threshold of the warm-up, and the ceiling where it cut most of that: keep the default 1.0, or "
            "set `inf`, which never acts."
        )
