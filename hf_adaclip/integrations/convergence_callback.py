"""A `TrainerCallback` that writes `convergence.jsonl`, for the stock Trainer as well as for ours. It never ends a training."""

import functools
import itertools
import json
import logging
import math
import numbers
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_adaclip.telemetry.energy import open_meter
from hf_adaclip.telemetry.point import CONVERGENCE_FILE, Point, Stopwatch, append_point, read_points, write_points

logger = logging.getLogger(__name__)

STATE_FILE: Final = "convergence_state.json"


def _only_records(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that may fail (a full disk, a folder that is gone, a sensor): said once for each hook, and tried again the next time."""

    @functools.wraps(hook)
    def guarded(self: "ConvergenceCallback", *args: Any, **kwargs: Any) -> None:
        try:
            hook(self, *args, **kwargs)
        except Exception as error:
            self._warn(hook.__name__, error)

    return guarded


class ConvergenceCallback(TrainerCallback):
    """Records steps, samples, tokens, training seconds and energy at every evaluation.

    A disk that is full or a sensor that fails is a warning, once, and training goes on.

    Args:
        output_dir: Folder of `convergence.jsonl`; by default the Trainer's.
        estimate_energy: Let codecarbon estimate where no sensor can be read.
        on_steps: Called with the number of steps done after each of them, for progress bars.
    """

    def __init__(
        self,
        output_dir: str | Path | None = None,
        *,
        estimate_energy: bool = False,
        on_steps: Callable[[int], None] | None = None,
    ) -> None:
        self._folder = output_dir
        self._path = Path(output_dir or ".") / CONVERGENCE_FILE
        self._warned: set[str] = set()
        self._estimate = estimate_energy
        self._on_steps = on_steps
        self._watch: Stopwatch | None = None

    @_only_records
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._warned.clear()
        if self._folder is None:
            self._path = Path(args.output_dir or ".") / CONVERGENCE_FILE
        self._watch = Stopwatch(open_meter(estimate=self._estimate))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [p for p in self._earlier(resumed=state.global_step > 0) if 0 < p.step <= state.global_step]
        self._watch.go_on(**self._spent(state.global_step, kept))
        write_points(self._path, kept)

    @_only_records
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The clock runs from here and not from the end of an evaluation: there may be several, or a checkpoint to write.
        if self._watch is not None:
            self._watch.run()

    @_only_records
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Writing a log line belongs to training (it is where the ledger is written); what comes after it does not.
        if not control.should_log:
            self._pause(control)
        if self._on_steps is not None:
            self._on_steps(state.global_step)

    @_only_records
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._pause(control)

    @_only_records
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pause(control)

    @_only_records
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._watch is None:
            return
        self._watch.pause()
        folder = self._path.parent / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            spent = {
                "train_seconds": self._watch.seconds,
                "energy_wh": self._watch.energy_wh,
                "cpu_seconds": self._watch.cpu_seconds,
            }
            (folder / STATE_FILE).write_text(json.dumps(spent) + "\n", encoding="utf-8")

    @_only_records
    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self._watch is None:  # an evaluation outside of training, or another rank
            return
        self._watch.pause()
        energy, meter = self._watch.energy_wh, self._watch.meter
        point = Point(
            step=state.global_step,
            samples=_samples_seen(state, train_dataloader),
            tokens=state.num_input_tokens_seen or None,
            train_seconds=self._watch.seconds,
            energy_wh=energy,
            energy_source=None if meter is None else meter.source,
            energy_measured=None if meter is None else meter.measured,
            metrics=_numbers(metrics or {}),
            cpu_seconds=self._watch.cpu_seconds,
        )
        append_point(self._path, point)

    @_only_records
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        watch, self._watch = self._watch, None
        if watch is not None and watch.meter is not None:
            watch.meter.close()

    def _warn(self, hook: str, error: Exception) -> None:
        if hook not in self._warned:
            self._warned.add(hook)
            logger.warning(
                "%s could not be kept up (%s: %s). Training goes on.", self._path, type(error).__name__, error
            )

    def _pause(self, control: TrainerControl) -> None:
        if self._watch is not None and (control.should_evaluate or control.should_save):
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # queued steps belong to training, not to the evaluation that would wait for them
            self._watch.pause()

    def _earlier(self, *, resumed: bool) -> list[Point]:
        """Points of the run that is resumed. A file of another run, or a damaged one, is moved aside and not written over."""
        if not self._path.exists() or not self._path.stat().st_size:
            return []
        try:
            points = read_points(self._path)
        except (OSError, ValueError) as error:
            logger.warning("%s is damaged (%s): it is kept under another name.", self._path, error)
            resumed, points = False, []
        if not resumed:
            number = next(n for n in itertools.count(1) if not self._aside(n).exists())
            self._path.replace(self._aside(number))
            return []
        return points

    def _aside(self, number: int) -> Path:
        return self._path.with_suffix(f".{number}.jsonl")

    def _spent(self, step: int, kept: list[Point]) -> dict[str, Any]:
        """For `Stopwatch.go_on`: spent up to the checkpoint that the run goes on from; without its file, up to the last evaluation."""
        try:
            spent = json.loads((self._path.parent / f"checkpoint-{step}" / STATE_FILE).read_text(encoding="utf-8"))
            return {
                "seconds": float(spent["train_seconds"]),
                "energy_wh": float(spent["energy_wh"] or 0.0),
                "cpu_seconds": None if spent.get("cpu_seconds") is None else float(spent["cpu_seconds"]),
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            if not kept:
                return {"seconds": 0.0, "energy_wh": 0.0, "cpu_seconds": 0.0 if step == 0 else None}
            last = kept[-1]
            return {
                "seconds": last.train_seconds,
                "energy_wh": last.energy_wh or 0.0,
                "cpu_seconds": last.cpu_seconds,
            }


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Those metrics that are numbers; a whole number beyond every float is infinite."""
    found = {}
    for name, value in metrics.items():
        if isinstance(value, numbers.Real):
            try:
                found[name] = float(value)
            except OverflowError:  # a whole number beyond every float
                found[name] = math.inf if str(value)[0] != "-" else -math.inf
    return found


def _samples_seen(state: TrainerState, dataloader: Any) -> int | None:
    try:
        return round((state.epoch or 0.0) * len(dataloader.dataset))
    except (AttributeError, TypeError):  # an iterable dataset has no length
        return None
