"""Controllers: the maths of deciding, pure and on the device. `CONTROLLERS` is the registry.

A new controller is one file here, one line below, a slow reference in tests/reference/ and a declaration in tests/cases.py.
"""

from typing import Any

from hf_adaclip.controllers.adaptive import AdaptiveController
from hf_adaclip.controllers.base import Controller, Decision, Observation, Reason
from hf_adaclip.controllers.percentile import PercentileController
from hf_adaclip.controllers.static import StaticController
from hf_adaclip.controllers.zscore import ZScoreController

CONTROLLERS: dict[str, type[Controller[Any]]] = {
    "adaptive": AdaptiveController,
    "static": StaticController,
    "percentile": PercentileController,
    "zscore": ZScoreController,
}

__all__ = ["CONTROLLERS", "Controller", "Decision", "Observation", "Reason"]
