"""`convergence.jsonl` of real runs: of the stock Trainer as well as of ours, through a resumption too."""

import json
import time

from transformers import TrainerCallback

from hf_adaclip import AdaptiveClipTrainer
from hf_adaclip.convergence.callback import ConvergenceCallback
from hf_adaclip.convergence.tracker import read_points
from tests.integrations.trainers import arguments, build, dataset, run, stock

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
    run(stock(tmp_path, args=args, eval_dataset={"a": few, "b": few, "c": few}, callbacks=callbacks))
    points = [p for p in read_points(tmp_path / "convergence.jsonl") if p.step == 40]

    assert len(points) == 3
    assert len({p.train_seconds for p in points}) == 1
    assert points[0].train_seconds < 2.0  # fifteen evaluations of two batches took six seconds


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
    run(
        build(
            AdaptiveClipTrainer,
            tmp_path,
            args=args,
            eval_dataset=dataset().select(range(16)),
            callbacks=[ConvergenceCallback()],
        )
    )
    first = read_points(tmp_path / "convergence.jsonl")
    again = build(
        AdaptiveClipTrainer,
        tmp_path,
        args=args,
        eval_dataset=dataset().select(range(16)),
        callbacks=[ConvergenceCallback()],
    )
    run(again, resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    second = read_points(tmp_path / "convergence.jsonl")

    assert [p.step for p in second] == [10, 20, 30, 40]
    assert second[:2] == first[:2]
    assert second[2].train_seconds > second[1].train_seconds
    assert [p.metrics["eval_loss"] for p in second] == [p.metrics["eval_loss"] for p in first]
    run(
        build(
            AdaptiveClipTrainer,
            tmp_path,
            args=args,
            eval_dataset=dataset().select(range(16)),
            callbacks=[ConvergenceCallback()],
        )
    )
    assert [p.step for p in read_points(tmp_path / "convergence.jsonl")] == [10, 20, 30, 40]


def test_an_evaluation_outside_of_training_is_not_recorded(tmp_path):
    trainer = build(
        AdaptiveClipTrainer, tmp_path, eval_dataset=dataset().select(range(16)), callbacks=[ConvergenceCallback()]
    )
    trainer.evaluate()

    assert not (tmp_path / "convergence.jsonl").exists()
