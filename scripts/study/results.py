"""What the raw results of the study say: targets, costs, paired ratios, differences at the end, ranges of learning rates.

Everything is computed from model_cards/study/*.jsonl, which `study.run` writes, so whoever has these files gets the same numbers.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_adaclip.compare.arms import STOCK
from hf_adaclip.compare.statistics import BOOTSTRAP_SAMPLES, PairedRatio, paired_ratio
from hf_adaclip.compare.tuning import TUNING_SEEDS, early
from scripts.study.arms import UNTUNED
from scripts.study.records import STUDY_NUMBER, foreign, recorded_lines
from scripts.study.tasks import FIRST, RETIRED, TASKS, StudyTask
from scripts.study.tasks_cuda import CUDA_TASKS

STUDY = Path(__file__).parents[2] / "model_cards" / "study"
STUDY_ANEW = STUDY.with_name("study-anew")
STEP, SECONDS, LOSS, QUALITY = range(4)
"""Where in a point of the raw results things are."""
RANGE_BELOW, RANGE_ABOVE = 3, 1
"""Octaves by which the range of learning rates goes beyond the rates of the tuning."""
NEAR_BEST = 1.05
"""Learning rates count to the stable range of an arm where it ends within this factor of its own best loss."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Range:
    """Over which learning rates an arm works.

    Attributes:
        finals: Final eval loss by learning rate, median over the seeds of the tuning; infinite where a run failed.
        octaves: Of the unbroken rates around the best one that end within 5 % of it.
        open_below, open_above: Whether that reaches the end of the grid, so that it may go on beyond.
    """

    finals: dict[float, float]
    octaves: float
    open_below: bool
    open_above: bool

    @property
    def is_open(self) -> bool:
        """Whether it may be longer than the grid shows."""
        return self.open_below or self.open_above


class TaskResults:
    """The runs of one task.

    Args:
        task: The task.
        lines: Raw results, see `study.records.record`.
        foreign: How many of them another revision or other settings than those of today made, by what it was.
    """

    def __init__(
        self, task: StudyTask, lines: Sequence[dict[str, Any]], foreign: Mapping[str, int] | None = None
    ) -> None:
        self.task = task
        self.foreign = dict(foreign or {})
        self.runs = {(line["arm"], line["seed"]): line for line in lines}
        self.arms = list(dict.fromkeys(line["arm"] for line in lines if "/" not in line["arm"]))

    def seeds(self, arm: str) -> list[int]:
        """Seeds of an arm."""
        return sorted(seed for name, seed in self.runs if name == arm)

    def target(self, baseline: str) -> float | None:
        """Eval loss that the baseline reaches within 80 % of its evaluations in every run on the tuning's seeds; None: not run yet."""
        keys = [(f"target/{baseline}", seed) for seed in TUNING_SEEDS]
        runs = [self.runs[key] for key in keys if key in self.runs and not self.runs[key]["error"]]
        if len(runs) < len(keys):
            return None
        return round(max(min(early(losses(run))) for run in runs), 6)

    def costs(self, arm: str, target: float, column: int = STEP) -> list[float]:
        """Steps or seconds to the target, seed by seed; infinite where it was never reached."""
        return [_cost(self.runs[arm, seed], target, column) for seed in self.seeds(arm)]

    def ratio(self, arm: str, baseline: str, target: float, column: int = STEP) -> PairedRatio:
        """Costs of an arm over those of a baseline, paired by seed; seconds only of runs that were measured alike.

        Raises:
            ValueError: There is no such pair.
        """
        pairs = [(a, b) for a, b in self.pairs(arm, baseline) if column != SECONDS or load(a) == load(b)]
        return paired_ratio([_cost(a, target, column) for a, _ in pairs], [_cost(b, target, column) for _, b in pairs])

    def finals(self, arm: str, column: int = LOSS) -> list[float]:
        """Final loss (or quality) of an arm, seed by seed; the worst there is where a run failed."""
        perplexity = column == QUALITY and self.task.quality == "eval_perplexity"
        column = LOSS if perplexity else column
        values = [_final(self.runs[arm, seed], column) for seed in self.seeds(arm)]
        return [math.exp(v) if v < 700 else math.inf for v in values] if perplexity else values

    def difference(self, arm: str, baseline: str) -> Interval:
        """Final loss of an arm less that of a baseline, paired by seed; below 0 is better."""
        finals = [(_final(a, LOSS), _final(b, LOSS)) for a, b in self.pairs(arm, baseline)]
        return interval([0.0 if math.isinf(a) and math.isinf(b) else a - b for a, b in finals])

    def alarms(self, arm: str) -> tuple[int, int] | None:
        """Steps after the warm-up that were cut shorter than the static threshold would, and all of them; None where no ledger has any."""
        counts = [self.runs[arm, seed].get("alarms") for seed in self.seeds(arm)]
        known = [c for c in counts if c is not None]
        steps = sum(c[1] for c in known)
        return (sum(c[0] for c in known), steps) if steps else None

    def range_of(self, arm: str, reference: float | None = None) -> Range | None:
        """Stable range of an arm at max_grad_norm 1 without warm-up of the schedule; None: not run at all of its rates.

        Args:
            arm: The arm.
            reference: The loss to end within 5 % of, if not its own best one.
        """
        name = "tuned" if arm == "stock" else f"{arm}-tuned"
        finals: dict[float, list[float]] = {}
        for (label, _), run in self.runs.items():
            settings = _settings(label, name)
            if settings is not None and _is_untuned(settings):
                finals.setdefault(settings["learning_rate"], []).append(_final(run, LOSS))
        if any(len(finals.get(rate, ())) < len(TUNING_SEEDS) for rate in rates_of_range(self.task)):
            return None
        return stable_range({rate: float(np.median(values)) for rate, values in finals.items()}, reference)

    def lowest(self, arm: str, seed: int) -> float | None:
        """Lowest eval loss of a run; None where it has none."""
        run = self.runs[arm, seed]
        return None if run["error"] or not run["points"] else min(losses(run))

    def tuning_runs(self, arm: str) -> int:
        """How many runs the tuning of an arm took; those of the range of learning rates that it did not share are left out."""
        found = 0
        for label, _ in self.runs:
            settings = _settings(label, arm)
            found += settings is not None and settings["learning_rate"] in self.task.rates
        return found

    def step_ratio(self, arm: str, baseline: str = STOCK) -> float | None:
        """Seconds of training per step over those of a baseline: medians of runs that were measured alike; None where none were."""
        ours, theirs = self._step_seconds(arm), self._step_seconds(baseline)
        for measured in ours:
            if measured in theirs:
                return float(np.median(ours[measured]) / np.median(theirs[measured]))
        return None

    def loads(self) -> set[tuple[str | None, int | None]]:
        """How the seconds of its runs were measured."""
        return {load(run) for run in self.runs.values() if run["points"]}

    def _step_seconds(self, arm: str) -> dict[tuple[str | None, int | None], list[float]]:
        found: dict[tuple[str | None, int | None], list[float]] = {}
        for (name, _), run in self.runs.items():
            if name == arm and run["points"] and run["points"][-1][SECONDS] is not None:
                found.setdefault(load(run), []).append(run["points"][-1][SECONDS] / run["points"][-1][STEP])
        return found

    def pairs(self, arm: str, baseline: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Runs of an arm and of a baseline on the same seed."""
        return [(self.runs[arm, s], self.runs[baseline, s]) for s in self.seeds(arm) if (baseline, s) in self.runs]


def load_study(folder: Path = STUDY) -> list[TaskResults]:
    """All tasks whose stock arm has been run, in the order of `TASKS`; runs of another revision or other settings are counted, and kept."""
    found = []
    for task in (*TASKS.values(), *CUDA_TASKS.values()):
        lines = [line for line in recorded_lines(folder, task) if line.get("study") == STUDY_NUMBER]
        reasons = Counter(reason for line in lines if (reason := foreign(task, line)) is not None)
        found.append(TaskResults(task, lines, reasons))
    return [results for results in found if STOCK in results.arms]


def load_first(folder: Path = STUDY) -> list[TaskResults]:
    """The tasks of the first study, as they were recorded."""
    tasks = [replace(TASKS.get(name) or RETIRED[name], rates=rates) for name, rates in FIRST.items()]
    found = [TaskResults(t, [x for x in recorded_lines(folder, t) if "study" not in x]) for t in tasks]
    return [results for results in found if STOCK in results.arms]


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean and 95 % percentile bootstrap interval over seeds; all infinite if one value is, and above all if one is infinitely worse."""
    numbers = np.array(values)
    if not np.isfinite(numbers).all():
        worst = math.inf if (numbers == math.inf).any() else -math.inf
        return Interval(worst, worst, worst)
    picks = np.random.default_rng(seed).integers(0, len(numbers), size=(BOOTSTRAP_SAMPLES, len(numbers)))
    low, high = np.quantile(numbers[picks].mean(axis=1), [0.025, 0.975])
    return Interval(float(numbers.mean()), float(low), float(high))


def rates_of_range(task: StudyTask) -> list[float]:
    """Learning rates an octave apart, around those of the tuning."""
    below = [task.rates[0] / 2**n for n in range(RANGE_BELOW, 0, -1)]
    return [*below, *task.rates, *(task.rates[-1] * 2**n for n in range(1, RANGE_ABOVE + 1))]


def stable_range(finals: dict[float, float], reference: float | None = None) -> Range:
    """The unbroken stretch of learning rates around the best one whose final loss is within 5 % of the best, or of a reference."""
    rates = sorted(finals)
    best = min(rates, key=lambda rate: finals[rate])
    bound = (finals[best] if reference is None else reference) * NEAR_BEST
    if math.isinf(finals[best]) or finals[best] > bound:
        return Range(finals, 0.0, False, False)
    good = [finals[rate] <= bound for rate in rates]
    low = high = rates.index(best)
    while low > 0 and good[low - 1]:
        low -= 1
    while high + 1 < len(rates) and good[high + 1]:
        high += 1
    octaves = math.log2(rates[high] / rates[low])
    return Range({r: finals[r] for r in rates}, octaves, low == 0, high == len(rates) - 1)


def _settings(label: str, arm: str) -> dict[str, float] | None:
    prefix = f"tuning/{arm}/"
    if not label.startswith(prefix):
        return None
    return {key: float(value) for key, value in (part.split("=") for part in label.removeprefix(prefix).split(","))}


def _is_untuned(settings: dict[str, float]) -> bool:
    return all(settings.get(flag.lstrip("-"), value) == value for flag, value in UNTUNED.items())


def losses(run: dict[str, Any]) -> list[float]:
    """Eval losses of a run; a loss that is no number counts as infinite."""
    return [
        math.inf if point[LOSS] is None or math.isnan(float(point[LOSS])) else float(point[LOSS])
        for point in run["points"]
    ]


def load(run: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """Under which the seconds of a run were measured: by which clock, and how many runs there were at a time."""
    return run.get("clock"), run.get("jobs")


def same_points(run: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs have the same evaluations, as far as they were recorded: six digits. Times may differ."""
    ours, theirs = ([[p[STEP], *p[LOSS:]] for p in r["points"]] for r in (run, other))
    return not run["error"] and not other["error"] and ours == theirs


def _cost(run: dict[str, Any], target: float, column: int) -> float:
    for point, loss in zip(run["points"], losses(run), strict=True):
        if loss <= target:
            return float(point[column])
    return math.inf


def _final(run: dict[str, Any], column: int) -> float:
    if run["error"] or not run["points"]:
        return math.inf if column == LOSS else -math.inf
    if column == LOSS:
        return losses(run)[-1]
    return float(run["points"][-1][column])
