"""One declaration per controller: what the shared tests run it with and hold it to."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.reference.adaptive import AdaptiveReference
from tests.reference.percentile import PercentileReference
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
    # ZClip adds 1e-6 to the standard deviation, so it is scale-free only up to that.
    Case("zscore", ZScoreReference, rtol=2e-3, scale_free=False),
    Case("adaptive", AdaptiveReference),
    Case("adaptive", AdaptiveReference, {"max_pace": 4.0}),
    Case("adaptive", AdaptiveReference, {"accept_after": 3, "max_edge": 1.5, "max_near": 1.0}),
]
