"""A `TrainerCallback` that writes `convergence.jsonl`, for the stock Trainer as well as for ours."""

import numbers
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_adaclip.convergence.energy import EnergyMeter, open_meter
from hf_adaclip.convergence.tracker import CONVERGENCE_FILE, Point, Stopwatch, append_point, read_points


class ConvergenceCallback(TrainerCallback):
    """Records steps, samples, tokens, training seconds and energy at every evaluation.

    Args:
        output_dir: Folder of `convergence.jsonl`.
        estimate_energy: Let codecarbon estimate where no sensor can be read.
        on_steps: Called with the number of steps done after each of them, for progress bars.
    """

    def __init__(
        self,
        output_dir: str | Path | None,
        *,
        estimate_energy: bool = False,
        on_steps: Callable[[int], None] | None = None,
    ) -> None:
        self._path = Path(output_dir or ".") / CONVERGENCE_FILE
        self._estimate = estimate_energy
        self._on_steps = on_steps
        self._meter: EnergyMeter | None = None
        self._watch: Stopwatch | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        self._meter = open_meter(estimate=self._estimate)
        kept = [p for p in self._earlier() if 0 < p.step <= state.global_step]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("", encoding="utf-8")
        for point in kept:
            append_point(self._path, point)
        spent = kept[-1] if kept else None
        self._watch = Stopwatch(
            self._meter,
            seconds=0.0 if spent is None else spent.train_seconds,
            energy_wh=0.0 if spent is None else (spent.energy_wh or 0.0),
        )
        self._watch.run()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pause_before_evaluation(control)
        if self._on_steps is not None:
            self._on_steps(state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pause_before_evaluation(control)

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
        energy = self._watch.energy_wh
        point = Point(
            step=state.global_step,
            samples=_samples_seen(state, train_dataloader),
            tokens=state.num_input_tokens_seen or None,
            train_seconds=self._watch.seconds,
            energy_wh=energy,
            energy_source=None if self._meter is None else self._meter.source,
            energy_measured=None if self._meter is None else self._meter.measured,
            metrics={k: float(v) for k, v in (metrics or {}).items() if isinstance(v, numbers.Real)},
        )
        append_point(self._path, point)
        self._watch.run()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._meter is not None:
            self._meter.close()
        self._meter = self._watch = None

    def _pause_before_evaluation(self, control: TrainerControl) -> None:
        if self._watch is not None and control.should_evaluate:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # queued steps belong to training, not to the evaluation that would wait for them
            self._watch.pause()

    def _earlier(self) -> list[Point]:
        try:
            return read_points(self._path)
        except (OSError, ValueError):
            return []


def _samples_seen(state: TrainerState, dataloader: Any) -> int | None:
    try:
        return round((state.epoch or 0.0) * len(dataloader.dataset))
    except (AttributeError, TypeError):  # an iterable dataset has no length
        return None
