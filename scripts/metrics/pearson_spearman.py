"""Pearson's and Spearman's correlation of predicted and true scores; NaN where either is constant."""

from typing import Any

import datasets
import evaluate
from scipy.stats import pearsonr, spearmanr

_DESCRIPTION = "Linear and rank correlation."


class PearsonSpearman(evaluate.Metric):  # type: ignore[misc]
    """Pearson's and Spearman's correlation of predicted and true scores; NaN where either is constant."""

    def _info(self) -> Any:
        features = datasets.Features(
            {"predictions": datasets.Value("float32"), "references": datasets.Value("float32")}
        )
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description="", features=features)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        pearson = float(pearsonr(references, predictions).statistic)
        spearman = float(spearmanr(references, predictions).statistic)
        return {"pearson": pearson, "spearman": spearman, "combined": (pearson + spearman) / 2}
