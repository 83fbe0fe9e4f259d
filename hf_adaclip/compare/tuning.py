"""What is fixed before the arms are compared, on seeds that no comparison uses: an arm's best setting, and the target."""

import json
import math
from collections.abc import Sequence
from typing import Any, Final

from hf_adaclip.compare.arms import DEFAULT_LEARNING_RATE, STOCK, TUNED, Study
from hf_adaclip.compare.runs import run_scripts
from hf_adaclip.compare.statistics import median
from hf_adaclip.errors import ConfigError
from hf_adaclip.ledger.schema import plain

TUNING_SEEDS: Final = (100, 101)
"""Never used by a comparison, so that the target is not set on the runs that it judges."""

TARGET_SHARE: Final = 0.8
"""The target is what the tuned stock arm reaches, in every tuning run, within this share of its steps."""

TUNED_FILE: Final = "script_tuned.json"
RATE_FACTORS: Final = (0.5, 1.0, 2.0, 4.0, 8.0)

# Per flag: the value that a script has where its flags say nothing, and the values that are tried.
_GRID: Final[dict[str, tuple[float, tuple[float, ...]]]] = {
    "--max_grad_norm": (1.0, (0.1, 0.3, 1.0, 3.0)),
    "--warmup_steps": (0.0, (0.0, 0.1, 0.3)),
    "--adam_beta2": (0.999, (0.95, 0.99, 0.999)),
}


def tuning_runs(coordinates: Sequence[str], rates: int = len(RATE_FACTORS)) -> int:
    """How many runs the tuning of one arm takes at most: what is chosen so far is not run again.

    Args:
        coordinates: Flags that are searched.
        rates: How many learning rates are tried.
    """
    settings = 1 + sum((len(_GRID[flag][1]) if flag in _GRID else rates) - 1 for flag in coordinates)
    return settings * len(TUNING_SEEDS)


def early(values: Sequence[float]) -> Sequence[float]:
    """The evaluations of a run within `TARGET_SHARE` of its steps; at least one, if there is any."""
    return values[: max(1, math.floor(len(values) * TARGET_SHARE))]


def tune(study: Study, arm: str) -> dict[str, Any]:
    """Search the best setting of an arm, coordinate by coordinate, and write what was tried to `script_tuned.json`.

    Args:
        study: The script; `study.coordinates` says which flags are searched, in which order.
        arm: `tuned` for the stock arm, or `NAME-tuned`.

    Returns:
        `seeds`, `chosen` (values by flag), and `tried`: every setting with its `final`.

    Raises:
        ConfigError: Every run failed or diverged.
    """
    chosen = {flag: study.given(flag, _GRID[flag][0]) for flag in study.coordinates if flag in _GRID}
    tried: list[dict[str, Any]] = []
    for flag in study.coordinates:
        values = _GRID[flag][1] if flag in _GRID else _rates(study)
        settings = [{**chosen, flag: value} for value in values]
        finals = dict(zip(values, sweep(study, arm, settings), strict=True))
        tried += [{**s, "final": finals[s[flag]]} for s in settings]
        chosen[flag] = min(values, key=lambda v: finals[v])
    if not math.isfinite(min(t["final"] for t in tried)):
        raise ConfigError(f"`{arm}` must train at one of the settings tried, but failed at all of them.")
    found = {"seeds": list(TUNING_SEEDS), "chosen": chosen, "tried": tried}
    path = study.output / (f"{study.name}.{TUNED_FILE}" if study.name else TUNED_FILE)
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(plain({**known, arm: found}), indent=1) + "\n", encoding="utf-8")
    return found


def sweep(study: Study, arm: str, settings: Sequence[dict[str, float]]) -> list[float]:
    """Train an arm at each of some settings, on the seeds of the tuning.

    Args:
        study: The script and how it is run.
        arm: Name of the arm, or `tuned` for the stock arm.
        settings: Values by flag. `tune` makes its runs by this too, so a setting it has tried is not run again.

    Returns:
        Per setting, the median over seeds of the final value of the metric (its negative if more is better); infinite where a run failed.
    """
    runs = []
    for chosen in settings:
        name = f"tuning/{arm}/{setting_name(chosen)}"
        flags = (*study.flags_of(arm), *as_flags(chosen))
        runs += [study.run(name, flags, seed) for seed in TUNING_SEEDS]
    finals = [_final(study, result) for result in run_scripts(runs, study.output, **study.pooling)]
    size = len(TUNING_SEEDS)
    return [median(finals[i * size : (i + 1) * size]) for i in range(len(settings))]


def setting_name(settings: dict[str, float]) -> str:
    """Values by flag, as part of the name of a run."""
    return ",".join(f"{flag.lstrip('-')}={value:g}" for flag, value in sorted(settings.items()))


def set_target(study: Study, tuned: tuple[str, ...] | None) -> float:
    """What the stock arm reaches within 80 % of its evaluations, in every run on other seeds.

    Args:
        study: The script and how it is run.
        tuned: Flags of the tuned stock arm; None for the stock arm as it comes.

    Raises:
        ConfigError: A run failed, or has no such metric.
    """
    runs = [
        study.run(f"target/{TUNED if tuned else STOCK}", tuned or study.flags_of(STOCK), seed) for seed in TUNING_SEEDS
    ]
    sign = -1.0 if study.greater else 1.0
    reached = []
    for result in run_scripts(runs, study.output, **study.pooling):
        if "error" in result:
            raise ConfigError(
                f"`--target` must be given, because the stock arm failed when it was to set one: {result['error']}"
            )
        values = [sign * float(p["metrics"].get(study.metric, math.nan)) for p in result["points"]]
        within = [v for v in early(values) if not math.isnan(v)]
        if not within:
            names = ", ".join(sorted(result["points"][-1]["metrics"]))
            raise ConfigError(f"`--target-metric` must be one of {names}, but is {study.metric!r} instead.")
        reached.append(min(within))
    return round(sign * max(reached), 6)


def as_flags(settings: dict[str, float]) -> tuple[str, ...]:
    """Values by flag, as they stand on a command line."""
    return tuple(text for flag, value in settings.items() for text in (flag, f"{value:g}"))


def _rates(study: Study) -> Sequence[float]:
    rate = study.given("--learning_rate", DEFAULT_LEARNING_RATE)
    return study.rates or [rate * factor for factor in RATE_FACTORS]


def _final(study: Study, result: dict[str, Any]) -> float:
    """Final value of the metric, smaller is better; infinite for a run that failed."""
    points = result.get("points", [])
    value = float(points[-1]["metrics"].get(study.metric, math.nan)) if points else math.nan
    value = -value if study.greater else value
    return math.inf if math.isnan(value) else value
