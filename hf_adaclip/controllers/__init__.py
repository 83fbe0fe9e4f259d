"""Controllers: the maths of deciding, pure and on the device. `CONTROLLERS` is the registry.

A new controller is one file here, one line below, a slow reference in tests/reference/ and a declaration in tests/cases.py.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

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


def build_controller(config: Any, parts: Parts = ()) -> Controller[Any]:
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


def _part(config: Any, pattern: str | None, size: int) -> "Part":
    own = config if pattern is None else config.for_pattern(pattern)
    from hf_adaclip.controllers.wrappers.by_group import Part

    if own is None:
        return Part(size, None)
    return Part(size, _governed(own), None if pattern is None else own.static_threshold)


def leaves_out(config: Any) -> bool:
    """Whether a step that would be cut is left out instead."""
    skips = CONTROLLERS[config.controller].skips
    return skips if config.on_spike == "auto" else config.on_spike == "skip"


def _governed(config: Any) -> Controller[Any]:
    inner = CONTROLLERS[config.controller].from_config(config)
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


__all__ = ["CONTROLLERS", "Controller", "Decision", "Observation", "Reason", "build_controller", "leaves_out"]
