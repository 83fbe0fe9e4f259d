"""One declaration per controller: what the shared tests run it with and hold it to."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.reference.adaptive import AdaptiveReference
from tests.reference.ema_ratio import EmaRatioReference
from tests.reference.log_zscore import LogZScoreReference
from tests.reference.mean_sd import MeanSdReference
from tests.reference.median import MedianReference
from tests.reference.percentile import PercentileReference
from tests.reference.quantile import QuantileReference
from tests.reference.static import StaticReference
from tests.reference.zscore import ZScoreReference


@dataclass(frozen=True)
class Case:
    """How a controller is tested.

    Attributes:
        name: Its name in the registry.
        reference: Builds the slow implementation from the same settings.
        settings: Fields of the config that differ from the defaults.
        rtol: Allowed relative difference to the reference (float32 against float64).
        scale_free: Norms times a power of two give thresholds times the same, once warm.
    """

    name: str
    reference: Callable[..., Any]
    settings: dict[str, Any] = field(default_factory=dict)
    rtol: float = 1e-4
    scale_free: bool = True

    @property
    def id(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.settings.items())])


CASES = [
    Case("static", StaticReference, scale_free=False),
    Case("percentile", PercentileReference),
    Case("percentile", PercentileReference, {"percentile": 90.0, "history": 50}),
    Case(
        "percentile",
        PercentileReference,
        {"percentile": 95.0, "history": 50, "percentile_capped": True},
        scale_free=False,
    ),
    Case("median", MedianReference),
    Case("mean_sd", MeanSdReference),
    Case("mean_sd", MeanSdReference, {"sd_window": 37, "sd_width": 3.0}),
    # The running minimum of the warm-up is of norms that the static threshold has cut.
    Case("ema_ratio", EmaRatioReference, scale_free=False),
    # Ours has (2 + x) / (2 - x) for exp(x), which differs by 1e-5 a step where the bound is exceeded.
    Case("quantile", QuantileReference, rtol=5e-3),
    Case("log_zscore", LogZScoreReference, rtol=5e-4, scale_free=False),
    # ZClip adds 1e-6 to the standard deviation, so it is scale-free only up to that.
    Case("zscore", ZScoreReference, rtol=2e-3, scale_free=False),
    # Half of the stream's norms are above the static threshold of the tests: with the default the ceiling is held, and does not scale.
    Case("adaptive", AdaptiveReference, scale_free=False),
    Case("adaptive", AdaptiveReference, {"ceiling_share": 1.0}),
    Case("adaptive", AdaptiveReference, {"max_pace": 4.0, "ceiling_share": 1.0}),
    Case("adaptive", AdaptiveReference, {"accept_after": 3, "max_edge": 1.5, "max_near": 1.0, "ceiling_share": 1.0}),
]
