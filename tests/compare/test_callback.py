"""`convergence.jsonl` of real runs: of the stock Trainer as well as of ours, through a resumption too."""

import io
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from hf_adaclip import AdaptiveClipTrainer
from hf_adaclip.integrations.convergence_callback import ConvergenceCallback
from hf_adaclip.telemetry.point import Point, append_point, read_points
from tests.integrations.trainers import arguments, build, dataset, run, stock, weights

pytestmark = pytest.mark.slow

EVAL = {"eval_strategy": "steps", "eval_steps": 10, "max_steps": 40}


class SlowEvaluation(TrainerCallback):
    def on_prediction_step(self, args, state, control, **kwargs):
        time.sleep(0.2)


def test_evaluation_is_not_training_time(tmp_path):
    trainer = stock(
        tmp_path,
        args=arguments(tmp_path, **EVAL),
        eval_dataset=dataset().select(range(16)),
        callbacks=[ConvergenceCallback(tmp_path), SlowEvaluation()],
    )
    started = time.perf_counter()
    run(trainer)
    wall = time.perf_counter() - started
    points = read_points(tmp_path / "convergence.jsonl")

    assert [p.step for p in points] == [10, 20, 30, 40]
    assert points[-1].train_seconds < wall - 4 * 2 * 0.2  # two batches an evaluation
    assert all(p.energy_wh is None or p.energy_wh >= 0 for p in points)


def test_tokens_and_samples_are_counted(tmp_path):
    args = arguments(tmp_path, include_num_input_tokens_seen="all", **EVAL)
    trainer = build(
        AdaptiveClipTrainer,
        tmp_path,
        args=args,
        eval_dataset=dataset().select(range(16)),
        callbacks=[ConvergenceCallback()],
    )
    run(trainer)
    point = read_points(tmp_path / "convergence.jsonl")[1]

    assert point.samples == 20 * 16
    assert point.tokens == 20 * 16 * 32


def test_several_evaluations_in_a_row_are_none_of_them_training_time(tmp_path):
    few = dataset().select(range(16))
    args = arguments(tmp_path, eval_on_start=True, **EVAL)
    callbacks = [ConvergenceCallback(tmp_path), SlowEvaluation()]
    begin = time.perf_counter()
    run(stock(tmp_path, args=args, eval_dataset={"a": few, "b": few, "c": few}, callbacks=callbacks))
    wall = time.perf_counter() - begin
    points = [p for p in read_points(tmp_path / "convergence.jsonl") if p.step == 40]

    assert len(points) == 3
    assert len({p.train_seconds for p in points}) == 1
    evaluations = len(read_points(tmp_path / "convergence.jsonl"))
    assert points[0].train_seconds < wall - evaluations * 2 * 0.2


def test_the_time_between_an_evaluation_and_the_checkpoint_is_not_lost(tmp_path):
    args = arguments(
        tmp_path, save_strategy="steps", save_steps=25, eval_strategy="steps", eval_steps=20, max_steps=40
    )
    few = dataset().select(range(16))
    run(build(AdaptiveClipTrainer, tmp_path, args=args, eval_dataset=few, callbacks=[ConvergenceCallback()]))
    whole = read_points(tmp_path / "convergence.jsonl")
    saved = json.loads((tmp_path / "checkpoint-25/convergence_state.json").read_text())
    run(
        build(AdaptiveClipTrainer, tmp_path, args=args, eval_dataset=few, callbacks=[ConvergenceCallback()]),
        resume_from_checkpoint=str(tmp_path / "checkpoint-25"),
    )
    resumed = read_points(tmp_path / "convergence.jsonl")

    assert saved["train_seconds"] > whole[0].train_seconds
    assert resumed[-1].train_seconds > saved["train_seconds"]
    assert resumed[-1].cpu_seconds > saved["cpu_seconds"] > 0


def test_a_damaged_file_is_kept_under_another_name(tmp_path, caplog):
    args = arguments(tmp_path, save_strategy="steps", save_steps=20, **EVAL)
    few = dataset().select(range(16))
    run(build(AdaptiveClipTrainer, tmp_path, args=args, eval_dataset=few, callbacks=[ConvergenceCallback()]))
    path = tmp_path / "convergence.jsonl"
    damaged = path.read_text().replace('"step"', '"stp"', 1)
    path.write_text(damaged)
    run(
        build(AdaptiveClipTrainer, tmp_path, args=args, eval_dataset=few, callbacks=[ConvergenceCallback()]),
        resume_from_checkpoint=str(tmp_path / "checkpoint-20"),
    )

    assert (tmp_path / "convergence.1.jsonl").read_text() == damaged
    assert [p.step for p in read_points(path)] == [30, 40]


def test_a_resumed_run_goes_on_and_a_new_one_starts_over(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=20, **EVAL)

    def trainer():
        few = dataset().select(range(16))
        return build(AdaptiveClipTrainer, tmp_path, args=args, eval_dataset=few, callbacks=[ConvergenceCallback()])

    run(trainer())
    first = read_points(tmp_path / "convergence.jsonl")
    run(trainer(), resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    second = read_points(tmp_path / "convergence.jsonl")

    assert [p.step for p in second] == [10, 20, 30, 40]
    assert second[:2] == first[:2]
    assert second[2].train_seconds > second[1].train_seconds
    assert [p.metrics["eval_loss"] for p in second] == [p.metrics["eval_loss"] for p in first]
    run(trainer())
    assert [p.step for p in read_points(tmp_path / "convergence.jsonl")] == [10, 20, 30, 40]


def test_an_evaluation_outside_of_training_is_not_recorded(tmp_path):
    trainer = build(
        AdaptiveClipTrainer, tmp_path, eval_dataset=dataset().select(range(16)), callbacks=[ConvergenceCallback()]
    )
    trainer.evaluate()

    assert not (tmp_path / "convergence.jsonl").exists()


class Fails:
    """A meter that is read well a few times and then no more."""

    source, measured, reads = "nvml", True, 0

    def read_wh(self):
        self.reads += 1
        if self.reads > 3:
            raise RuntimeError("GPU is lost")
        return float(self.reads)

    def close(self):
        raise RuntimeError("not there any more")


def _full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def _trains(folder, monkeypatch, break_it, metrics=None):
    args = arguments(folder, save_strategy="steps", save_steps=20, **EVAL)
    plain = build(AdaptiveClipTrainer, folder / "plain", args=args, eval_dataset=dataset().select(range(16)))
    run(plain)
    break_it(monkeypatch, folder)
    trainer = build(
        AdaptiveClipTrainer,
        folder,
        args=args,
        eval_dataset=dataset().select(range(16)),
        callbacks=[ConvergenceCallback()],
        compute_metrics=metrics,
    )
    run(trainer)
    assert trainer.state.global_step == 40
    assert torch.equal(weights(plain), weights(trainer))
    return trainer


@pytest.mark.parametrize(
    ("target", "warnings"),
    [("append_point", 1), ("write_points", 1), ("open_meter", 1), ("read_points", 0), ("json.dumps", 1)],
)
def test_whatever_fails_in_it_training_goes_on_with_one_warning(tmp_path, monkeypatch, caplog, target, warnings):
    def break_it(monkeypatch, folder):
        if target == "json.dumps":
            monkeypatch.setattr(
                "hf_adaclip.integrations.convergence_callback.json", SimpleNamespace(dumps=_full, loads=json.loads)
            )
        else:
            monkeypatch.setattr(f"hf_adaclip.integrations.convergence_callback.{target}", _full)

    _trains(tmp_path, monkeypatch, break_it)
    assert len([r for r in caplog.records if "could not be kept up" in r.getMessage()]) == warnings


def test_a_folder_that_goes_away_and_comes_back_costs_one_warning_and_the_points_between(tmp_path, caplog):
    class Moves(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 15:
                (tmp_path / "points").rename(tmp_path / "away")
            if state.global_step == 35:
                (tmp_path / "away").rename(tmp_path / "points")

    callbacks = [ConvergenceCallback(tmp_path / "points"), Moves()]
    args = arguments(tmp_path, **EVAL)
    run(stock(tmp_path, args=args, eval_dataset=dataset().select(range(16)), callbacks=callbacks))
    assert [p.step for p in read_points(tmp_path / "points/convergence.jsonl")] == [10, 40]
    assert len([r for r in caplog.records if "could not be kept up" in r.getMessage()]) == 1


def test_a_line_that_does_not_fit_is_taken_back_whole(tmp_path, monkeypatch):
    class Short(io.FileIO):
        def write(self, data):
            return super().write(data[:20])

    path = tmp_path / "convergence.jsonl"
    point = Point(1, 2, None, 0.5, None, None, None, {"eval_loss": 1.0})
    append_point(path, point)
    before = path.read_bytes()
    monkeypatch.setattr("builtins.open", lambda file, mode, buffering=0: Short(file, "a"))
    with pytest.raises(OSError, match="No space left"):
        append_point(path, point)
    monkeypatch.undo()
    assert path.read_bytes() == before


def test_a_sensor_that_fails_midway_leaves_the_energy_unknown(tmp_path, monkeypatch, caplog):
    def break_it(monkeypatch, folder):
        monkeypatch.setattr("hf_adaclip.integrations.convergence_callback.open_meter", lambda estimate: Fails())

    _trains(tmp_path, monkeypatch, break_it)
    points = read_points(tmp_path / "convergence.jsonl")
    assert points[0].energy_wh is not None
    assert (points[-1].energy_wh, points[-1].energy_source, points[-1].energy_measured) == (None, None, None)
    assert len([r for r in caplog.records if "The energy of this run is not known" in r.getMessage()]) == 1


def test_a_metric_that_no_float_holds_is_infinite_and_one_that_is_no_number_is_left_out(tmp_path, monkeypatch):
    def metrics(prediction):
        return {"huge": 10**400, "nan": float("nan"), "text": "good", "tensor": np.float32(0.5)}

    args = arguments(tmp_path, **EVAL)
    few = dataset().select(range(16))
    callbacks = [ConvergenceCallback()]
    run(stock(tmp_path, args=args, eval_dataset=few, callbacks=callbacks, compute_metrics=metrics))
    found = read_points(tmp_path / "convergence.jsonl")[0].metrics
    assert found["eval_huge"] == float("inf")
    assert found["eval_nan"] != found["eval_nan"]
    assert found["eval_tensor"] == 0.5
    assert "eval_text" not in found
