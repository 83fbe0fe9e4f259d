"""What the study has to run, stage by stage, and how long that takes.

A stage is one thing that is done for one task: an arm as it comes, the tuning of one, its runs at what was found. After each the raw
results are recorded, and between two of them the budget may end the study.
"""

import json
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from hf_adaclip.compare.arms import STOCK, TUNED
from hf_adaclip.compare.runs import RESULT_FILE
from hf_adaclip.compare.tuning import TUNING_SEEDS, tuning_runs
from scripts.study.arms import COORDINATES, CORE, REST, SHORT, base_of, needs, short_steps
from scripts.study.records import recorded_lines
from scripts.study.results import rates_of_range
from scripts.study.tasks import StudyTask

Kind: TypeAlias = Literal["seeds", "target", "tuning", "range"]
Seconds: TypeAlias = Callable[[str, str], float]
"""Seconds per step, everything included, of a task and an arm."""


@dataclass(frozen=True)
class Stage:
    """One thing to do.

    Attributes:
        task, arm: For which task and arm.
        kind: Its runs on the seeds; those that set a target; its tuning; its range of learning rates.
        runs: How many there are.
        steps: Steps of each.
    """

    task: str
    arm: str
    kind: Kind
    runs: int
    steps: int

    @property
    def label(self) -> str:
        """For people."""
        words = {"seeds": "", "target": "target of ", "tuning": "tuning of ", "range": "range of "}
        return f"{self.task}: {words[self.kind]}{self.arm}"


def stages(
    tasks: Sequence[StudyTask], arms: Sequence[str], range_arms: Sequence[str], seeds: int, steps: int | None = None
) -> list[Stage]:
    """All stages: on all tasks what the goals are judged by, then on all tasks the rest.

    Args:
        tasks: The tasks, in the order in which they are run.
        arms: What is wanted; the order is that of `CORE` and `REST`, and an arm of neither comes last.
        range_arms: Arms of the range of learning rates, with `CORE`.
        seeds: Seeds per arm.
        steps: Steps of each run, if not the task's own.
    """
    first = [arm for arm in CORE if arm in arms]
    later = [arm for arm in (*REST, *arms) if arm in arms and arm not in first]
    found = [s for task in tasks for s in _of(task, first, range_arms, seeds, steps)]
    tuned = {(s.task, s.arm) for s in found if s.kind == "tuning"}
    rest = [s for task in tasks for s in _of(task, list(dict.fromkeys(later)), (), seeds, steps)]
    return [*found, *(s for s in rest if s.kind != "tuning" or (s.task, s.arm) not in tuned)]


def _of(task: StudyTask, arms: Sequence[str], range_arms: Sequence[str], seeds: int, steps: int | None) -> list[Stage]:
    whole = steps or task.steps
    found: list[Stage] = []
    tuned: set[str] = set()
    for arm in arms:
        first = needs(arm)
        if first is not None and first not in tuned:
            found.append(Stage(task.name, first, "tuning", tuning_runs(COORDINATES, len(task.rates)), whole))
            tuned.add(first)
        length = short_steps(whole) if arm.endswith(SHORT) else whole
        found.append(Stage(task.name, arm, "seeds", seeds, length))
        if arm in (STOCK, TUNED):
            found.append(Stage(task.name, arm, "target", len(TUNING_SEEDS), whole))
    extra = len(rates_of_range(task)) - len(task.rates)
    for arm in range_arms:
        shared = extra if tuned_name(arm) in tuned else extra + len(task.rates)
        found.append(Stage(task.name, arm, "range", shared * len(TUNING_SEEDS), whole))
    return found


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
        found: dict[tuple[str, str], list[float]] = {}
        for task in tasks:
            for run in (*_results(output / task.name), *([] if record is None else _recorded(record, task))):
                found.setdefault((task.name, base_of(run[0])), []).append(run[1])
        self._seconds = {place: float(np.median(values)) for place, values in found.items()}

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
    names = list(dict.fromkeys(stage.task for stage in planned))
    lines = [f"{'task':<20} {'runs':>6} {'there':>6} {'s/step':>8} {'CPU min':>8} {'left':>8}"]
    whole = left = 0.0
    for name in names:
        ours = [stage for stage in planned if stage.task == name]
        cost = sum(stage.runs * stage.steps * seconds(name, stage.arm) for stage in ours)
        there = sum(done(stage) for stage in ours)
        rest = sum((stage.runs - done(stage)) * stage.steps * seconds(name, stage.arm) for stage in ours)
        lines.append(
            f"{name:<20} {sum(s.runs for s in ours):>6} {there:>6} {seconds(name, STOCK):>8.3f} {cost / 60:>8.0f} {rest / 60:>8.0f}"
        )
        whole, left = whole + cost, left + rest
    core = sum(
        s.runs * s.steps * seconds(s.task, s.arm) for s in planned if s.kind == "range" or s.arm in _core_arms()
    )
    counts = sorted({stage.runs for stage in planned if stage.kind == "tuning"})
    tuned = list(dict.fromkeys(stage.arm for stage in planned if stage.kind == "tuning"))
    lines += [
        f"{sum(stage.runs for stage in planned):,} runs; {whole / 3600:.1f} CPU hours, {left / 3600:.1f} of them left; "
        f"{left / 3600 / jobs:.1f} hours with {jobs} runs at a time. What the goals need: {core / 3600:.1f} CPU hours, first.",
    ]
    if tuned:
        each = " or ".join(map(str, counts))
        lines.append(f"Tuned by {each} runs each on every task (rate, threshold, warm-up, beta2): {', '.join(tuned)}.")
    return "\n".join(lines)


def _core_arms() -> Collection[str]:
    return {*CORE, *(arm for arm in map(needs, CORE) if arm is not None)}


def minutes(stage: Stage, seconds: Seconds, jobs: int, there: int = 0) -> float:
    """Minutes of what is missing of a stage, on an otherwise idle machine."""
    return math.ceil((stage.runs - there) / jobs) * stage.steps * seconds(stage.task, stage.arm) / 60
