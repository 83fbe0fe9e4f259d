"""Perplexity from the losses of batches and how many tokens each was averaged over."""

import math
from typing import Any

import datasets
import evaluate

_DESCRIPTION = "exp of the mean loss per token."


class Perplexity(evaluate.Metric):  # type: ignore[misc]
    """Perplexity from the losses of batches and how many tokens each was averaged over."""

    def _info(self) -> Any:
        features = datasets.Features({"losses": datasets.Value("float64"), "tokens": datasets.Value("int64")})
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description="", features=features)

    def _compute(self, losses: Any, tokens: Any) -> dict[str, float]:
        total = sum(tokens)
        mean = math.fsum(loss * count for loss, count in zip(losses, tokens, strict=True)) / total
        return {"loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf}
