"""hf_adaclip: adaptive gradient clipping for `transformers.Trainer`, Accelerate and plain PyTorch loops."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_adaclip.clipper import AdaptiveClipper
from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import CONTROLLERS, Reason
from hf_adaclip.errors import (
    ClippingDefeatedError,
    ConfigError,
    HfAdaclipError,
    LedgerError,
    NonFiniteGradientError,
    RankDisagreementError,
    StateError,
    TrainingTroubleError,
    UnsupportedSetupError,
)
from hf_adaclip.run.events import ClipEvent
from hf_adaclip.run.run_plan import RunPlan

if TYPE_CHECKING:
    from hf_adaclip.integrations.attaching import attach
    from hf_adaclip.integrations.convergence_callback import ConvergenceCallback
    from hf_adaclip.integrations.script_args import ClipArguments, make_trainer
    from hf_adaclip.integrations.transformers import AdaptiveClipMixin, AdaptiveClipTrainer

__version__ = "0.1.0"

# Importing transformers takes seconds; a plain PyTorch loop never needs it (PEP 562).
_LAZY = {
    "AdaptiveClipMixin": "hf_adaclip.integrations.transformers",
    "AdaptiveClipTrainer": "hf_adaclip.integrations.transformers",
    "ConvergenceCallback": "hf_adaclip.integrations.convergence_callback",
    "ClipArguments": "hf_adaclip.integrations.script_args",
    "attach": "hf_adaclip.integrations.attaching",
    "make_trainer": "hf_adaclip.integrations.script_args",
}

# Controllers by short names: `ZScore(width=3)` is `ZScoreController`.
_SHORT = {kind.__name__.removesuffix("Controller"): kind for kind in CONTROLLERS.values()}

__all__ = [
    "CONTROLLERS",
    "AdaptiveClipConfig",
    "AdaptiveClipMixin",
    "AdaptiveClipTrainer",
    "AdaptiveClipper",
    "ClipArguments",
    "ClipEvent",
    "ClippingDefeatedError",
    "ConfigError",
    "ConvergenceCallback",
    "HfAdaclipError",
    "LedgerError",
    "NonFiniteGradientError",
    "RankDisagreementError",
    "Reason",
    "RunPlan",
    "StateError",
    "TrainingTroubleError",
    "UnsupportedSetupError",
    "attach",
    "make_trainer",
    *_SHORT,
]


def __getattr__(name: str) -> Any:
    if name in _SHORT:
        return _SHORT[name]
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
