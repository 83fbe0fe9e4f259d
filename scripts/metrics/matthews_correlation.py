"""Matthews correlation: 1 for perfect, 0 for no better than chance."""

from typing import Any

import datasets
import evaluate
from sklearn.metrics import matthews_corrcoef

_DESCRIPTION = "Correlation of predicted and true classes."


class MatthewsCorrelation(evaluate.Metric):  # type: ignore[misc]
    """Matthews correlation: 1 for perfect, 0 for no better than chance."""

    def _info(self) -> Any:
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description="", features=features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
