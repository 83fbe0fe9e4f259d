"""`hf-adaclip compare --arms ... -- script.py ...`: arms and seeds of any training script, and the tuning of its baseline."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hf_adaclip.compare.arms import DEFAULT_LEARNING_RATE, PACE, STOCK, Arm
from hf_adaclip.compare.compare import COMPARISON_FILE
from hf_adaclip.compare.present import MAX_TITLE
from hf_adaclip.compare.runs import ScriptRun, run_scripts
from hf_adaclip.compare.statistics import median
from hf_adaclip.compare.summary import Judged, summarise
from hf_adaclip.compare.tuning import TUNING_SEEDS, early
from hf_adaclip.controllers import CONTROLLERS
from hf_adaclip.errors import ConfigError
from hf_adaclip.hints import near_controller
from hf_adaclip.ledger.schema import plain
from hf_adaclip.telemetry.point import Target

TUNED: Final = "tuned"
SUFFIX: Final = f"-{TUNED}"
TUNED_FILE: Final = "script_tuned.json"
RATE_FACTORS: Final = (0.5, 1.0, 2.0, 4.0, 8.0)

KNOWN: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    STOCK: ("stock Trainer, the flags as they were given", ("--clip", "stock")),
    "none": ("stock Trainer without clipping", ("--clip", "none")),
    "stable_adamw": ("stock Trainer with optim=stable_adamw", ("--clip", "stock", "--optim", "stable_adamw")),
    "adaptive-pace": (f"adaptive clipping with max_pace {PACE:g}", ("--clip", "adaptive", "--max_pace", f"{PACE:g}")),
    **{name: (f"{kind.idea} ({kind.source})", ("--clip", name)) for name, kind in CONTROLLERS.items()},
}


@dataclass(frozen=True)
class ScriptStudy:
    """What is compared.

    Attributes:
        output: Folder for everything.
        script: The script and the user's flags.
        arms: Names out of `KNOWN` or `extra`; `tuned` is the stock arm with the rate, threshold and warm-up that are best for it, and
            `NAME-tuned` the same for another arm, with the same number of runs.
        extra: Arms of the user's own, by name: flags.
        seeds: Seeds per arm.
        jobs: Runs at a time.
        launcher: What stands before the script.
        metric: What the target is of.
        greater: Whether more of it is better.
        target: The target; None lets the stock arm set it on other seeds.
        quality: Metric shown as final quality; None for that of the target.
        rates: Learning rates of the tuning; empty for the script's own times 0.5 to 8.
        command: The command line, for the record.
        quiet: No progress bar.
        warm: See `run_scripts`.
    """

    output: Path
    script: tuple[str, ...]
    arms: tuple[str, ...]
    extra: dict[str, tuple[str, ...]]
    seeds: int
    jobs: int
    launcher: tuple[str, ...]
    metric: str = "eval_loss"
    greater: bool = False
    target: float | None = None
    quality: str | None = None
    rates: tuple[float, ...] = ()
    command: str = ""
    quiet: bool = False
    warm: bool = False

    @property
    def task(self) -> str:
        """Name of the task: that of the script."""
        return Path(self.script[0]).stem


def compare_script(study: ScriptStudy) -> dict[str, Any]:
    """Run the comparison, or what is missing of it, and write `comparison.json`.

    Raises:
        ConfigError: An arm is unknown, the script is not there, or the target cannot be set.
    """
    _check(study)
    tuned = {arm: _tune(study, arm) for arm in study.arms if arm == TUNED or arm.endswith(SUFFIX)}
    target = study.target if study.target is not None else _set_target(study, tuned.get(TUNED))
    names = [STOCK, *[a for a in study.arms if a != STOCK]]
    runs = [
        _run(study, arm, tuned.get(arm, flags_of(study, arm)), seed) for seed in range(study.seeds) for arm in names
    ]
    results = run_scripts(runs, study.output, jobs=study.jobs, quiet=study.quiet, warm=study.warm)

    quality = study.quality or study.metric
    judged = Judged(
        name=study.task,
        title=_short_title(study.script),
        quality=quality.removeprefix("eval_"),
        quality_greater=study.greater,
        quality_of=lambda metrics: metrics.get(quality),
        target=Target(study.metric, target, study.greater),
        baseline=_baseline(study, tuned),
    )
    arms = [Arm(name, _title(study, name, tuned.get(name)), None) for name in names]
    comparison = summarise([judged], arms, study.seeds, results, study.command, study.jobs)
    comparison["script"] = list(study.script)
    (study.output / COMPARISON_FILE).write_text(json.dumps(plain(comparison), indent=1) + "\n", encoding="utf-8")
    return comparison


def _check(study: ScriptStudy) -> None:
    problems = []
    if not Path(study.script[0]).is_file():
        problems.append(f"`script` must be a file, but {study.script[0]!r} is none.")
    for arm in study.arms:
        name = STOCK if arm == TUNED else arm.removesuffix(SUFFIX)
        if name not in KNOWN and name not in study.extra:
            problems.append(
                f"`--arms` must be among {', '.join([*KNOWN, TUNED, *study.extra])}, or one of these with {SUFFIX!r}, but {arm!r} is not."
                f"{near_controller(arm, [*KNOWN, TUNED, *study.extra])} "
                "`--arm 'NAME=FLAGS'` makes one of your own."
            )
    if problems:
        raise ConfigError(problems)


def flags_of(study: ScriptStudy, arm: str) -> tuple[str, ...]:
    """Flags of an arm, before any tuning."""
    name = STOCK if arm == TUNED else arm.removesuffix(SUFFIX)
    return study.extra[name] if name in study.extra else KNOWN[name][1]


def _run(study: ScriptStudy, arm: str, flags: tuple[str, ...], seed: int) -> ScriptRun:
    return ScriptRun(study.task, arm, seed, study.launcher, study.script, flags)


def _given(study: ScriptStudy, flag: str, default: float) -> float:
    """The number that the user's flags give."""
    for position, text in enumerate(study.script):
        if text == flag and position + 1 < len(study.script):
            return float(study.script[position + 1])
        if text.startswith(f"{flag}="):
            return float(text.split("=", 1)[1])
    return default


def _tune(study: ScriptStudy, arm: str) -> tuple[str, ...]:
    """Flags of an arm after a search coordinate by coordinate: learning rate, then threshold, then warm-up; on other seeds."""
    rate = _given(study, "--learning_rate", DEFAULT_LEARNING_RATE)
    coordinates: list[tuple[str, Sequence[float]]] = [
        ("--learning_rate", study.rates or [rate * factor for factor in RATE_FACTORS]),
        ("--max_grad_norm", (0.1, 0.3, 1.0, 3.0)),
        ("--warmup_steps", (0.0, 0.1, 0.3)),
    ]
    chosen = {
        "--max_grad_norm": _given(study, "--max_grad_norm", 1.0),
        "--warmup_steps": _given(study, "--warmup_steps", 0.0),
    }
    tried: list[dict[str, Any]] = []
    for flag, values in coordinates:
        settings = [{**chosen, flag: value} for value in values]
        finals = dict(zip(values, sweep(study, arm, settings), strict=True))
        tried += [{**s, "final": finals[s[flag]]} for s in settings]
        chosen[flag] = min(values, key=lambda v: finals[v])
    if not math.isfinite(min(t["final"] for t in tried)):
        raise ConfigError(f"`{arm}` must train at one of the settings tried, but failed at all of them.")
    path = study.output / TUNED_FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known[arm] = {"seeds": list(TUNING_SEEDS), "chosen": chosen, "tried": tried}
    path.write_text(json.dumps(plain(known), indent=1) + "\n", encoding="utf-8")
    return (*flags_of(study, arm), *as_flags(chosen))


def sweep(study: ScriptStudy, arm: str, settings: Sequence[dict[str, float]]) -> list[float]:
    """Train an arm at each of some settings, on the seeds of the tuning.

    Args:
        study: The script and how it is run.
        arm: Name of the arm, or `tuned` for the stock arm.
        settings: Values by flag. `_tune` makes its runs by this too, so a setting it has tried is not run again.

    Returns:
        Per setting, the median over seeds of the final value of the metric (its negative if more is better); infinite where a run failed.
    """
    runs = []
    for chosen in settings:
        name = f"tuning/{arm}/" + ",".join(f"{k.lstrip('-')}={v:g}" for k, v in sorted(chosen.items()))
        flags = (*flags_of(study, arm), *as_flags(chosen))
        runs += [_run(study, name, flags, seed) for seed in TUNING_SEEDS]
    results = run_scripts(runs, study.output, jobs=study.jobs, quiet=study.quiet, warm=study.warm)
    finals = [_final(study, result) for result in results]
    size = len(TUNING_SEEDS)
    return [median(finals[i * size : (i + 1) * size]) for i in range(len(settings))]


def as_flags(settings: dict[str, float]) -> tuple[str, ...]:
    """Values by flag, as they stand on a command line."""
    return tuple(text for flag, value in settings.items() for text in (flag, f"{value:g}"))


def _final(study: ScriptStudy, result: dict[str, Any]) -> float:
    """Final value of the metric, smaller is better; infinite for a run that failed."""
    points = result.get("points", [])
    value = float(points[-1]["metrics"].get(study.metric, math.nan)) if points else math.nan
    value = -value if study.greater else value
    return math.inf if math.isnan(value) else value


def _set_target(study: ScriptStudy, tuned: tuple[str, ...] | None) -> float:
    """What the stock arm (the tuned one, if there is one) reaches within 80 % of its evaluations, in every run on other seeds."""
    flags = tuned or flags_of(study, STOCK)
    runs = [_run(study, f"target/{TUNED if tuned else STOCK}", flags, seed) for seed in TUNING_SEEDS]
    sign = -1.0 if study.greater else 1.0
    reached = []
    for result in run_scripts(runs, study.output, jobs=study.jobs, quiet=study.quiet, warm=study.warm):
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


def _title(study: ScriptStudy, arm: str, tuned: tuple[str, ...] | None) -> str:
    name = STOCK if arm == TUNED else arm.removesuffix(SUFFIX)
    if tuned is not None:
        return f"{name}, tuned: {' '.join(tuned)}"
    return KNOWN[name][0] if name in KNOWN else " ".join(study.extra[name])


_NAMING: Final = ("--task_name", "--dataset_name", "--dataset_config_name", "--model_name_or_path", "--model_type")


def _short_title(script: Sequence[str]) -> str:
    """The script and what it trains on what, without paths: `run_glue: rte, bert-base-uncased`."""
    named = []
    for position, text in enumerate(script[1:], start=1):
        flag, equals, value = text.partition("=")
        if flag in _NAMING:
            value = value if equals else (script[position + 1] if position + 1 < len(script) else "")
            named += [Path(value).name] if value else []
    stem = Path(script[0]).stem
    title = f"{stem}: {', '.join(dict.fromkeys(named))}" if named else stem
    return title if len(title) <= MAX_TITLE else stem[:MAX_TITLE]


def _baseline(study: ScriptStudy, tuned: dict[str, tuple[str, ...]]) -> str:
    where = (
        "given"
        if study.target is not None
        else "set on other seeds by the " + ("tuned stock arm" if TUNED in tuned else "stock arm")
    )
    text = f"Target {where}. The arm `stock` is the script's flags as they stand."
    if tuned:
        text += (
            " Tuned coordinate by coordinate (learning rate, max_grad_norm, warm-up; 12 settings on two other seeds): "
            + "; ".join(f"`{arm}` = {' '.join(flags)}" for arm, flags in tuned.items())
            + "."
        )
    return text
