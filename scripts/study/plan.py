"""What the study has to run, stage by stage, and how long that takes.

A stage is one thing that is done for one task: an arm as it comes, the tuning of one, its runs at what was found. After each the raw
results are recorded, and between two of them the budget may end the study.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from hf_adaclip.compare.arms import STOCK, TUNED
from hf_adaclip.compare.runs import RESULT_FILE
from hf_adaclip.compare.tuning import TUNING_SEEDS, tuning_runs
from scripts.study.arms import COORDINATES, CORE, CORE_WAVES, REST, REST_WAVES, SHORT, base_of, needs, short_steps
from scripts.study.records import recorded_lines
from scripts.study.results import rates_of_range
from scripts.study.tasks import StudyTask

Kind: TypeAlias = Literal["seeds", "target", "tuning", "range"]
Seconds: TypeAlias = Callable[[str, str], float]
"""Seconds per step, everything included, of a task and an arm."""
AT_ONCE = 2
"""Seeds that an arm gets before the next arm's turn."""


@dataclass(frozen=True)
class Stage:
    """One thing to do.

    Attributes:
        task, arm: For which task and arm.
        kind: Its runs on some seeds; those that set a target; its tuning; its range of learning rates.
        runs: How many there are.
        steps: Steps of each.
        wave: Its place among what is done on all tasks before the next is begun, from 1.
        first: The first of the seeds.
    """

    task: str
    arm: str
    kind: Kind
    runs: int
    steps: int
    wave: int = 1
    first: int = 0

    @property
    def label(self) -> str:
        """For people."""
        words = {"seeds": "", "target": "target of ", "tuning": "tuning of ", "range": "range of "}
        last = self.first + self.runs - 1
        seeds = f", seed{f's {self.first} to' if self.runs > 1 else ''} {last}" if self.kind == "seeds" else ""
        return f"{self.task}: {words[self.kind]}{self.arm}{seeds}"

    @property
    def seeds(self) -> range:
        """Of its runs, where it is those of an arm."""
        return range(self.first, self.first + self.runs)


def in_order(tasks: Iterable[StudyTask]) -> list[StudyTask]:
    """From scratch first, then fine-tuning of what is small, then the encoders, whose steps cost most."""
    return sorted(tasks, key=lambda task: (task.kind == "glue", not task.scratch))


def stages(
    tasks: Sequence[StudyTask], arms: Sequence[str], range_arms: Sequence[str], seeds: int, steps: int | None = None
) -> list[Stage]:
    """All stages, wave by wave: on all tasks what the goals are judged by, then on all tasks the rest.

    Within a wave all arms of all tasks get their first seeds before any gets more, so that what is there can be compared whenever it ends.

    Args:
        tasks: The tasks, in the order in which they are run.
        arms: What is wanted; the order is that of the waves, and an arm of none comes last.
        range_arms: Arms of the range of learning rates, after those that the goals are judged by.
        seeds: Seeds per arm.
        steps: Steps of each run, if not the task's own.
    """
    other = tuple(arm for arm in dict.fromkeys(arms) if arm not in (*CORE, *REST))
    found: list[Stage] = []
    tuned: set[tuple[str, str]] = set()
    waves = [*(("seeds", wave) for wave in CORE_WAVES), ("range", tuple(range_arms))]
    waves += [("seeds", wave) for wave in (*REST_WAVES, other)]
    number = 0
    for kind, wave in waves:
        chosen = [arm for arm in wave if kind == "range" or arm in arms]
        number += bool(chosen)
        if kind == "range":
            found += [
                _range(task, arm, steps, number, (task.name, tuned_name(arm)) in tuned)
                for task in tasks
                for arm in chosen
            ]
            continue
        for first in range(0, seeds, AT_ONCE):
            for task in tasks:
                found += _of(task, chosen, range(first, min(seeds, first + AT_ONCE)), steps, number, tuned)
    return found


def _of(
    task: StudyTask, arms: Sequence[str], seeds: range, steps: int | None, wave: int, tuned: set[tuple[str, str]]
) -> list[Stage]:
    """Some seeds of some arms of a task; with the first of them what has to be tuned before, and the targets."""
    whole = steps or task.steps
    found: list[Stage] = []
    for arm in arms:
        first = needs(arm)
        if first is not None and (task.name, first) not in tuned:
            found.append(Stage(task.name, first, "tuning", tuning_runs(COORDINATES, len(task.rates)), whole, wave))
            tuned.add((task.name, first))
        length = short_steps(whole) if arm.endswith(SHORT) else whole
        found.append(Stage(task.name, arm, "seeds", len(seeds), length, wave, seeds.start))
        if arm in (STOCK, TUNED) and seeds.start == 0:
            found.append(Stage(task.name, arm, "target", len(TUNING_SEEDS), whole, wave))
    return found


def _range(task: StudyTask, arm: str, steps: int | None, wave: int, shared: bool) -> Stage:
    """The rates of the tuning are there already where the arm was tuned."""
    rates = len(rates_of_range(task)) - (len(task.rates) if shared else 0)
    return Stage(task.name, arm, "range", rates * len(TUNING_SEEDS), steps or task.steps, wave)


def tuned_name(arm: str) -> str:
    """What an arm is called where it is tuned."""
    return TUNED if arm == STOCK else f"{arm}-{TUNED}"


class Measured:
    """Seconds per step by task and arm, of the runs that are there; where there are none, as far as the others tell.

    Args:
        tasks: The tasks.
        output: The study's folder.
        record: Folder of the raw results, or None.
    """

    def __init__(self, tasks: Sequence[StudyTask], output: Path, record: Path | None) -> None:
        self._tasks = {task.name: task for task in tasks}
        self._output, self._record = output, record
        self._seconds: dict[tuple[str, str], float] = {}
        for task in tasks:
            self.read(task)

    def read(self, task: StudyTask) -> None:
        """See what runs of a task there are now."""
        found: dict[tuple[str, str], list[float]] = {}
        recorded = [] if self._record is None else _recorded(self._record, task)
        for arm, seconds in (*_results(self._output / task.name), *recorded):
            found.setdefault((task.name, base_of(arm)), []).append(seconds)
        self._seconds.update({place: float(np.median(values)) for place, values in found.items()})

    def __call__(self, task: str, arm: str) -> float:
        """Seconds per step; of a task without any run, what `StudyTask.step_seconds` says."""
        arm = base_of(arm)
        if (task, arm) in self._seconds:
            return self._seconds[task, arm]
        stock = self._seconds.get((task, STOCK), self._tasks[task].step_seconds)
        factors = [
            seconds / self._seconds[name, STOCK]
            for (name, other), seconds in self._seconds.items()
            if other == arm and (name, STOCK) in self._seconds and self._tasks[name].kind == self._tasks[task].kind
        ]
        if factors:
            return stock * float(np.median(factors))
        return stock * (FACTORS[self._tasks[task].kind] if arm in ORTHOGONAL else 1.0 if arm == STOCK else 1.1)


ORTHOGONAL = ("spectral", "spectral-agreement", "muon")
FACTORS = {"vit": 1.43, "clm": 1.22, "glue": 5.4}
"""Seconds per step of these arms over those of the stock arm, by kind of task, where no run says: model_cards/spectral, at width 0."""


def _results(folder: Path) -> list[tuple[str, float]]:
    found = []
    for path in folder.glob(f"runs/**/{RESULT_FILE}"):
        found += _seconds_of(json.loads(path.read_text(encoding="utf-8")), lambda run: run["spec"]["arm"])
    return found


def _recorded(folder: Path, task: StudyTask) -> list[tuple[str, float]]:
    return [found for line in recorded_lines(folder, task) for found in _seconds_of(line, lambda run: run["arm"])]


def _seconds_of(run: dict[str, Any], arm_of: Callable[[dict[str, Any]], str]) -> list[tuple[str, float]]:
    label, points, wall = arm_of(run), run.get("points"), run.get("wall_seconds")
    if run.get("error") or not points or wall is None:
        return []
    last = points[-1]
    name = label.split("/")[1] if "/" in label else label
    return [(name, wall / (last["step"] if isinstance(last, dict) else last[0]))]


def order(planned: Sequence[Stage], seconds: Seconds, done: Callable[[Stage], int] = lambda stage: 0) -> str:
    """In which order it is run and what it takes: a line per wave, task and arm with its tuning and targets, and the sum so far."""
    parts: dict[tuple[int, str, str], list[Stage]] = {}
    for stage in planned:
        parts.setdefault((stage.wave, stage.task, stage.arm), []).append(stage)
    lines = [f"{'wave':<4} {'task':<18} {'arm':<28} {'runs':>5} {'there':>5} {'CPU h':>7} {'left':>7} {'sum left':>8}"]
    so_far = 0.0
    for (wave, task, arm), ours in parts.items():
        whole = sum(_hours(stage, seconds) for stage in ours)
        left = sum(_hours(stage, seconds, done(stage)) for stage in ours)
        so_far += left
        name = f"{arm}: range" if ours[0].kind == "range" else arm
        lines.append(
            f"{wave:<4} {task:<18} {name:<28} {sum(s.runs for s in ours):>5} {sum(map(done, ours)):>5} {whole:>7.2f} {left:>7.2f} "
            f"{so_far:>8.2f}"
        )
    return "\n".join(lines)


def table(
    planned: Sequence[Stage], seconds: Seconds, jobs: int, done: Callable[[Stage], int] = lambda stage: 0
) -> str:
    """The plan as a table: per task runs and minutes, the runs of a tuned arm, and the whole in hours.

    Args:
        planned: The stages.
        seconds: What a step takes.
        jobs: Runs at a time.
        done: How many runs of a stage are there already.
    """
    lines = [f"{'task':<20} {'runs':>6} {'there':>6} {'s/step':>8} {'CPU min':>8} {'left':>8}"]
    whole = left = 0.0
    for name in dict.fromkeys(stage.task for stage in planned):
        ours = [stage for stage in planned if stage.task == name]
        cost = sum(_hours(stage, seconds) for stage in ours)
        rest = sum(_hours(stage, seconds, done(stage)) for stage in ours)
        lines.append(
            f"{name:<20} {sum(s.runs for s in ours):>6} {sum(map(done, ours)):>6} {seconds(name, STOCK):>8.3f} {60 * cost:>8.0f} "
            f"{60 * rest:>8.0f}"
        )
        whole, left = whole + cost, left + rest
    core = sum(_hours(s, seconds) for s in planned if s.kind == "range" or s.arm in _core_arms())
    counts = sorted({stage.runs for stage in planned if stage.kind == "tuning"})
    tuned = list(dict.fromkeys(stage.arm for stage in planned if stage.kind == "tuning"))
    lines += [
        f"{sum(stage.runs for stage in planned):,} runs; {whole:.1f} CPU hours, {left:.1f} of them left; "
        f"{left / jobs:.1f} hours with {jobs} run{'s' if jobs > 1 else ''} at a time. What the goals need: {core:.1f} CPU hours, first.",
    ]
    if tuned:
        each = " or ".join(map(str, counts))
        lines.append(f"Tuned by {each} runs each on every task (rate, threshold, warm-up, beta2): {', '.join(tuned)}.")
    return "\n".join(lines)


def _hours(stage: Stage, seconds: Seconds, there: int = 0) -> float:
    """Of one thread, for what is missing of a stage."""
    return (stage.runs - there) * stage.steps * seconds(stage.task, stage.arm) / 3600


def _core_arms() -> Collection[str]:
    return {*CORE, *(arm for arm in map(needs, CORE) if arm is not None)}


def minutes(stage: Stage, seconds: Seconds, jobs: int, there: int = 0) -> float:
    """Minutes of what is missing of a stage, on an otherwise idle machine."""
    return math.ceil((stage.runs - there) / jobs) * stage.steps * seconds(stage.task, stage.arm) / 60
