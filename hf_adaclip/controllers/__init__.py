"""Controllers: the maths of deciding, pure and on the device. `CONTROLLERS` is the registry.

A new controller is one file here, its settings included, one line below, a slow reference in tests/reference/ and a declaration in
tests/cases.py. Config, flags, ledger and checkpoints follow from these.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from hf_adaclip.controllers.adaptive import AdaptiveController
from hf_adaclip.controllers.base import Controller, Decision, Observation, Reason
from hf_adaclip.controllers.ema_ratio import EmaRatioController
from hf_adaclip.controllers.log_zscore import LogZScoreController
from hf_adaclip.controllers.mean_sd import MeanSdController
from hf_adaclip.controllers.median import MedianController
from hf_adaclip.controllers.percentile import PercentileController
from hf_adaclip.controllers.quantile import QuantileController
from hf_adaclip.controllers.second_moment import SecondMomentController
from hf_adaclip.controllers.static import StaticController
from hf_adaclip.controllers.weight_ratio import WeightRatioController
from hf_adaclip.controllers.zscore import ZScoreController

if TYPE_CHECKING:
    from hf_adaclip.controllers.wrappers.by_group import Part

Parts: TypeAlias = Sequence[tuple[str | None, int]]

CONTROLLERS: dict[str, type[Controller[Any]]] = {
    "adaptive": AdaptiveController,
    "static": StaticController,
    "percentile": PercentileController,
    "zscore": ZScoreController,
    "ema_ratio": EmaRatioController,
    "log_zscore": LogZScoreController,
    "mean_sd": MeanSdController,
    "median": MedianController,
    "quantile": QuantileController,
    "weight_ratio": WeightRatioController,
    "second_moment": SecondMomentController,
}

_LIMITS = (
    "freeze_after",
    "min_threshold",
    "max_threshold",
    "max_widening_step",
    "max_widening_100",
    "max_skipped",
)


def name_of(controller: Controller[Any]) -> str | None:
    """What a controller is called in the registry; None where its class is not in it."""
    return next((name for name, kind in CONTROLLERS.items() if kind is type(controller)), None)


class Settings(Protocol):
    """What is looked at of an `AdaptiveClipConfig` here."""

    @property
    def settings(self) -> Controller[Any]: ...
    @property
    def max_pace(self) -> float: ...
    @property
    def static_threshold(self) -> float | None: ...
    @property
    def on_spike(self) -> str: ...
    @property
    def on_trouble(self) -> str: ...
    @property
    def one_step_late(self) -> bool: ...
    @property
    def divergence_spreads(self) -> float: ...
    @property
    def divergence_steps(self) -> int: ...
    @property
    def parameter_rules(self) -> dict[str, Any] | str | None: ...
    def for_pattern(self, pattern: str) -> "Settings | None": ...


def build_controller(config: Settings, parts: Parts = ()) -> Controller[Any]:
    """The controller that a config describes, under the limits that it sets; leaving steps out or one step late if it says so.

    Args:
        config: An `AdaptiveClipConfig`.
        parts: Where `parameter_rules` hold, how many norms come from which pattern (None: from none), in their order. Without it the
            rules are left aside: one norm has no name.
    """
    # What stands around a controller is imported where it is asked for: most runs need none of it, and all pay for their imports.
    if config.parameter_rules and parts:
        from hf_adaclip.controllers.wrappers.by_group import MixedController

        return MixedController(tuple(_part(config, *part) for part in parts), max_pace=config.max_pace)
    governed = _governed(config)
    if leaves_out(config):
        from hf_adaclip.controllers.wrappers.skip import SkippingController

        return SkippingController(governed)
    if config.one_step_late:
        from hf_adaclip.controllers.wrappers.delayed import LateController

        return LateController(governed)
    return governed


def _part(config: Settings, pattern: str | None, size: int) -> "Part":
    own = config if pattern is None else config.for_pattern(pattern)
    from hf_adaclip.controllers.wrappers.by_group import Part

    if own is None:
        return Part(size, None)
    return Part(size, _governed(own), None if pattern is None else own.static_threshold)


def leaves_out(config: Settings) -> bool:
    """Whether a step that would be cut is left out instead."""
    return config.settings.skips if config.on_spike == "auto" else config.on_spike == "skip"


def _governed(config: Settings) -> Controller[Any]:
    inner = config.settings
    limits = {name: getattr(config, name) for name in _LIMITS}
    free = all(v is None for v in limits.values())
    if free and config.divergence_spreads == 0:
        return inner
    from hf_adaclip.controllers.wrappers.limits import GovernedController

    return GovernedController(
        inner=inner,
        divergence_spreads=config.divergence_spreads,
        divergence_steps=config.divergence_steps,
        fallback=config.on_trouble == "fallback",
        **limits,
    )


__all__ = [
    "CONTROLLERS",
    "Controller",
    "Decision",
    "Observation",
    "Reason",
    "build_controller",
    "leaves_out",
    "name_of",
]
