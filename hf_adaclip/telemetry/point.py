"""`convergence.jsonl`: what had been spent when each evaluation was made, and when a target was reached."""

import contextlib
import errno
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from hf_adaclip.ledger.schema import plain
from hf_adaclip.telemetry.energy import EnergyMeter

logger = logging.getLogger(__name__)

CONVERGENCE_FILE: Final = "convergence.jsonl"


@dataclass(frozen=True)
class Point:
    """One evaluation and what it took to get there.

    Attributes:
        step: Optimizer steps done.
        samples: Training examples seen, None when the dataset has no length.
        tokens: Training tokens seen, None unless the Trainer counts them.
        train_seconds: Wall-clock seconds of training, evaluations left out.
        energy_wh: Energy in watt-hours over the same time, None when nothing on this machine tells.
        energy_source: `nvml`, `rapl` or `codecarbon`; None with `energy_wh`.
        energy_measured: False for an estimate (codecarbon).
        metrics: What the evaluation returned.
        cpu_seconds: Seconds of processor time of this process, all threads, over the time of `train_seconds`; None where it is not known.
    """

    step: int
    samples: int | None
    tokens: int | None
    train_seconds: float
    energy_wh: float | None
    energy_source: str | None
    energy_measured: bool | None
    metrics: dict[str, float]
    cpu_seconds: float | None = None


@dataclass(frozen=True)
class Target:
    """A quality fixed before any run that is judged by it.

    Attributes:
        metric: Name of the metric, such as `eval_loss`.
        value: The value to reach.
        greater_is_better: Direction of the metric.
    """

    metric: str
    value: float
    greater_is_better: bool = False

    def reached_by(self, value: float) -> bool:
        if math.isnan(value):
            return False
        return value >= self.value if self.greater_is_better else value <= self.value


def first_reaching(points: Sequence[Point], target: Target) -> Point | None:
    """The first evaluation at or beyond the target, None if there is none: a run that never reached it took infinitely long."""
    return next((p for p in points if target.reached_by(p.metrics.get(target.metric, math.nan))), None)


class Stopwatch:
    """Seconds, of the clock and of processors, and energy of training, with pauses.

    Args:
        meter: Counter of energy, or None.
        seconds, energy_wh, cpu_seconds: Where to go on from when a run is resumed.
    """

    def __init__(
        self,
        meter: EnergyMeter | None = None,
        *,
        seconds: float = 0.0,
        energy_wh: float = 0.0,
        cpu_seconds: float | None = 0.0,
    ) -> None:
        self._meter = meter
        self.go_on(seconds=seconds, energy_wh=energy_wh, cpu_seconds=cpu_seconds)
        self._since: tuple[float, float, float] | None = None

    def go_on(self, *, seconds: float, energy_wh: float, cpu_seconds: float | None = None) -> None:
        """Count on from what a checkpoint holds; one that knows no processor time leaves it unknown."""
        self._seconds, self._energy_wh, self._cpu_seconds = seconds, energy_wh, cpu_seconds

    def run(self) -> None:
        """Start or go on; running already, nothing changes."""
        if self._since is None:
            self._since = (time.perf_counter(), self._counter(), time.process_time())

    def pause(self) -> None:
        """Stop counting; stopped already, nothing changes."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since[0]
            self._energy_wh += self._counter() - self._since[1]
            if self._cpu_seconds is not None:
                self._cpu_seconds += time.process_time() - self._since[2]
            self._since = None

    @property
    def seconds(self) -> float:
        return self._seconds

    @property
    def cpu_seconds(self) -> float | None:
        """None where the run was resumed from a checkpoint that does not say."""
        return self._cpu_seconds

    @property
    def meter(self) -> EnergyMeter | None:
        """The meter, None without one and after it has failed."""
        return self._meter

    @property
    def energy_wh(self) -> float | None:
        return None if self._meter is None else self._energy_wh

    def _counter(self) -> float:
        if self._meter is None:
            return 0.0
        try:
            return self._meter.read_wh()
        except Exception as error:  # a sensor that fails must not end what it measures
            logger.warning("The energy of this run is not known: %s failed (%s).", self._meter.source, error)
            self._meter = None
            return 0.0


def append_point(path: Path, point: Point) -> None:
    """Add a line to `convergence.jsonl`; non-finite metrics become strings. A line that does not fit on the disk is taken back whole.

    Raises:
        OSError: The file cannot be written.
    """
    line = (json.dumps(plain(asdict(point)), allow_nan=False) + "\n").encode("utf-8")
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(before)
            raise


def write_points(path: Path, points: Sequence[Point]) -> None:
    """Replace the file's content in one move, so that a kill leaves the old points or the new ones."""
    unfinished = path.with_suffix(".part")
    try:
        unfinished.write_text("", encoding="utf-8")
        for point in points:
            append_point(unfinished, point)
        unfinished.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def point_from(values: dict[str, Any]) -> Point:
    """The point that a line of `convergence.jsonl` holds; non-finite metrics are strings there."""
    return Point(**{**values, "metrics": {k: float(v) for k, v in values["metrics"].items()}})


def read_points(path: Path) -> list[Point]:
    """All points of a file; a torn last line (a killed process) is left out.

    Raises:
        ValueError: Another line is damaged.
    """
    points: list[Point] = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            points.append(point_from(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{path}, line {number}, is not a point of convergence: {error}") from error
    return points
