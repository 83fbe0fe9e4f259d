"""Metric modules for `evaluate` that ship with the package, so that scripts measure without a hub.

    import evaluate
    from hf_adaclip.metrics import metric_path

    accuracy = evaluate.load(metric_path("accuracy"))

Each folder holds one module in the form that `evaluate` loads; what is computed is scikit-learn's and SciPy's, not ours.
"""

from pathlib import Path
from typing import Final

from hf_adaclip.errors import ConfigError

NAMES: Final = ("accuracy", "f1", "matthews_correlation", "pearson_spearman", "perplexity")

GLUE_METRICS: Final[dict[str, tuple[str, ...]]] = {
    "cola": ("matthews_correlation",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "stsb": ("pearson_spearman",),
    "qqp": ("accuracy", "f1"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}
"""What each task of GLUE is measured by (Wang et al. 2019, table 1)."""


def metric_path(name: str) -> str:
    """Path of a metric module, for `evaluate.load`.

    Raises:
        ConfigError: There is no such metric.
    """
    if name not in NAMES:
        raise ConfigError(f"`metric` must be one of {', '.join(NAMES)}, but is {name!r} instead.")
    return str(Path(__file__).parent / name / f"{name}.py")
