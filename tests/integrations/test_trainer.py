"""`AdaptiveClipTrainer`, the mixin and `attach`, by real training runs."""

import json
import math
import re

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_adaclip import (
    AdaptiveClipConfig,
    AdaptiveClipMixin,
    AdaptiveClipTrainer,
    ClippingDefeatedError,
    ConfigError,
    NonFiniteGradientError,
    StateError,
    UnsupportedSetupError,
    attach,
)
from hf_adaclip.audit import verify_ledger
from hf_adaclip.integrations.convergence_callback import ConvergenceCallback
from hf_adaclip.telemetry.point import read_points
from tests.integrations.trainers import STEPS, arguments, build, dataset, model, run, stock, weights

pytestmark = pytest.mark.slow

CONFIG = AdaptiveClipConfig(warmup_observations=10)
GUARD = AdaptiveClipConfig.resolve("guard:warmup_observations=10")


class SpikeTrainer(Trainer):
    """Multiplies the loss of one step, as a bad batch would."""

    spike_step, factor = 30, 1000.0

    def training_step(self, model, inputs, *args, **kwargs):
        handle = None
        if self.state.global_step == self.spike_step:
            handle = model.register_forward_hook(lambda m, a, k, out: self._enlarge(out), with_kwargs=True)
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        finally:
            if handle is not None:
                handle.remove()

    def _enlarge(self, out):
        out.loss = out.loss * self.factor
        return out


class AdaptiveSpikeTrainer(AdaptiveClipMixin, SpikeTrainer):
    pass


class Watch(TrainerCallback):
    """What reaches the optimizer."""

    def __init__(self):
        self.applied = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.applied.append(
            torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
        )


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.3}, {"max_grad_norm": 0.3}, {"bf16": True}],
    ids=str,
)
def test_static_is_the_stock_trainer_bit_for_bit(tmp_path, changes):
    a = stock(tmp_path / "a", args=arguments(tmp_path / "a", **changes))
    b = build(AdaptiveClipTrainer, tmp_path / "b", args=arguments(tmp_path / "b", **changes), clip="static")
    run(a)
    run(b)

    assert b.clipper.statistics.clipped > 0
    assert torch.equal(weights(a), weights(b))
    assert [h["grad_norm"] for h in a.state.log_history if "grad_norm" in h] == [
        h["grad_norm"] for h in b.state.log_history if "grad_norm" in h
    ]


def test_where_the_stock_threshold_always_acts_adaptive_is_the_stock_trainer_bit_for_bit(tmp_path):
    a = stock(tmp_path / "a", args=arguments(tmp_path / "a", max_grad_norm=0.01))
    b = build(AdaptiveClipTrainer, tmp_path / "b", args=arguments(tmp_path / "b", max_grad_norm=0.01), clip=GUARD)
    c = build(
        AdaptiveClipTrainer,
        tmp_path / "c",
        args=arguments(tmp_path / "c", max_grad_norm=0.01),
        clip=GUARD.replace(ceiling_share=1.0),
    )
    for trainer in (a, b, c):
        run(trainer)

    assert torch.equal(weights(a), weights(b))
    assert b.clipper.statistics.counts_by_name()["HELD"] > STEPS / 2
    assert not torch.equal(weights(a), weights(c)), "the range opens where it is told to"


def test_adaptive_changes_what_reaches_the_optimizer_when_a_spike_is_planted(tmp_path):
    watch_stock, watch = Watch(), Watch()
    args = arguments(tmp_path / "a", max_grad_norm=1e9)
    plain = build(SpikeTrainer, tmp_path / "a", args=args, callbacks=[watch_stock])
    ours = build(
        AdaptiveSpikeTrainer,
        tmp_path / "b",
        args=arguments(tmp_path / "b", max_grad_norm=1e9),
        callbacks=[watch],
        clip=CONFIG,
    )
    run(plain)
    run(ours)
    calm = sorted(watch.applied[20:30])[5]

    assert watch_stock.applied[30] > 100 * calm
    assert watch.applied[30] < 2 * calm
    assert not torch.equal(weights(plain), weights(ours))
    lines = [json.loads(line) for line in (tmp_path / "b/clip_ledger.jsonl").read_text().splitlines()]
    assert next(line for line in lines if line.get("step") == 30)["reason"] == "SPIKE"


def test_a_nan_step_is_skipped_and_the_run_goes_on(tmp_path):
    class NanTrainer(AdaptiveSpikeTrainer):
        factor = float("nan")

    trainer = build(NanTrainer, tmp_path, clip=CONFIG)
    run(trainer)

    assert torch.isfinite(weights(trainer)).all()
    assert trainer.clipper.statistics.skipped == 1


def test_logs_ledger_and_where_the_callback_is_added_convergence(tmp_path):
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=20)
    rows = dataset().select(range(64))
    run(build(AdaptiveClipTrainer, tmp_path / "plain", clip=CONFIG, args=args, eval_dataset=rows))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip_ledger.jsonl", "clip_ledger.jsonl.seal"]
    for name in ("clip_ledger.jsonl", "clip_ledger.jsonl.seal"):
        (tmp_path / name).unlink()
    callbacks = [ConvergenceCallback(tmp_path)]
    trainer = build(AdaptiveClipTrainer, tmp_path, args=args, clip=CONFIG, eval_dataset=rows, callbacks=callbacks)
    run(trainer)
    logs = [h for h in trainer.state.log_history if "loss" in h]

    assert len(logs) == 4
    names = {"clip/threshold", "clip/coefficient", "clip/fraction", "clip/pace", "clip/phase", "clip/skipped"}
    assert all(names <= set(entry) and entry["grad_norm"] > 0 for entry in logs)
    assert not any(k.startswith("clip/") for h in trainer.state.log_history if "eval_loss" in h for k in h)
    assert logs[0]["clip/phase"] == "warmup"
    report = verify_ledger(tmp_path / "clip_ledger.jsonl")
    assert report.ok, report.findings
    assert (report.steps, report.closed, report.measured) == (STEPS, True, 5)  # at every log line, and the first step
    points = read_points(tmp_path / "convergence.jsonl")
    assert [p.step for p in points] == [20, 40]
    assert 0 < points[0].train_seconds < points[1].train_seconds
    assert points[0].samples == 320
    assert points[0].metrics["eval_loss"] > 0


def test_the_step_loss_is_what_the_trainer_logs(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=4, logging_steps=1, max_steps=6)
    trainer = build(AdaptiveClipTrainer, tmp_path, args=args, clip=CONFIG)
    run(trainer)
    lines = [json.loads(line) for line in (tmp_path / "clip_ledger.jsonl").read_text().splitlines()]
    recorded = [line["loss"] for line in lines if line["kind"] == "step"]
    logged = [h["loss"] for h in trainer.state.log_history if "loss" in h]

    assert recorded == pytest.approx(logged, rel=1e-6)


def test_train_twice_starts_afresh(tmp_path):
    trainer = build(AdaptiveClipTrainer, tmp_path, clip=CONFIG)
    run(trainer)
    first = trainer.clipper
    run(trainer)

    assert trainer.clipper is not first
    assert trainer.clipper.statistics.steps == STEPS
    report = verify_ledger(tmp_path / "clip_ledger.jsonl")
    assert report.ok, report.findings
    assert report.segments == 2
    hooks = trainer.optimizer.optimizer._optimizer_step_pre_hooks
    assert not hooks


@pytest.mark.parametrize("max_pace", [1.0, 3.0])
def test_resume_is_the_uninterrupted_run_bit_for_bit(tmp_path, max_pace):
    config = CONFIG.replace(max_pace=max_pace)
    whole = build(AdaptiveSpikeTrainer, tmp_path / "whole", clip=config)
    run(whole)

    class StopsAt20(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 25

    parts = {"save_strategy": "steps", "save_steps": 20}
    first = build(
        AdaptiveSpikeTrainer,
        tmp_path / "parts",
        args=arguments(tmp_path / "parts", **parts),
        callbacks=[StopsAt20()],
        clip=config,
    )
    run(first)
    second = build(AdaptiveSpikeTrainer, tmp_path / "parts", args=arguments(tmp_path / "parts", **parts), clip=config)
    run(second, resume_from_checkpoint=str(tmp_path / "parts/checkpoint-20"))

    assert torch.equal(weights(whole), weights(second))
    assert [float(v) for v in whole.clipper.state.values()] == pytest.approx(
        [float(v) for v in second.clipper.state.values()], abs=0, nan_ok=True
    )
    assert whole.clipper.statistics.counts == second.clipper.statistics.counts
    report = verify_ledger(tmp_path / "parts/clip_ledger.jsonl")
    assert report.ok, report.findings
    assert report.segments == 2
    ends = [
        json.loads((tmp_path / name / "clip_ledger.jsonl").read_text().splitlines()[-2]) for name in ("whole", "parts")
    ]
    assert ends[0] == ends[1]


def test_resuming_a_stock_checkpoint_starts_afresh_with_a_warning(tmp_path, caplog):
    args = arguments(tmp_path, save_strategy="steps", save_steps=20)
    run(stock(tmp_path, args=args))
    trainer = build(AdaptiveClipTrainer, tmp_path, args=args, clip=CONFIG)
    run(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-20"))

    assert trainer.clipper.statistics.steps == 20
    assert any("the controller starts afresh" in r.message for r in caplog.records)
    report = verify_ledger(tmp_path / "clip_ledger.jsonl")
    assert report.before > 0
    assert report.ok, report.summary()


def test_resuming_with_another_controller_is_an_error_that_shows_the_difference(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=20)
    run(build(AdaptiveClipTrainer, tmp_path, args=args, clip=CONFIG))
    trainer = build(AdaptiveClipTrainer, tmp_path, args=args, clip="zscore")
    with pytest.raises(StateError, match=r"`controller` was 'adaptive' and is 'zscore'"):
        run(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-20"))


def test_attach_gives_the_same_run_as_the_class(tmp_path):
    a = build(AdaptiveClipTrainer, tmp_path / "a", clip=CONFIG)
    b = attach(stock(tmp_path / "b"), clip=CONFIG)
    run(a)
    run(b)

    assert isinstance(b, Trainer)
    assert type(b).__name__ == "AdaptiveClipTrainer"
    assert torch.equal(weights(a), weights(b))
    with pytest.raises(ConfigError, match="must not have adaptive clipping yet"):
        attach(b)
    with pytest.raises(ConfigError, match=r"must be a transformers.Trainer, but is dict"):
        attach({})  # type: ignore[type-var]


def test_attach_that_fails_leaves_the_trainer_as_it_was(tmp_path):
    trainer = stock(tmp_path, args=arguments(tmp_path, max_grad_norm=0.0))
    before = list(trainer.callback_handler.callbacks)
    with pytest.raises(ConfigError):
        attach(trainer)

    assert type(trainer) is Trainer
    assert trainer.callback_handler.callbacks == before
    assert not hasattr(trainer, "clipper")


def test_a_trainer_that_only_evaluates_may_have_any_max_grad_norm(tmp_path):
    args = arguments(tmp_path, max_grad_norm=0.0)
    trainer = AdaptiveClipTrainer(model=model(), args=args, eval_dataset=dataset())
    assert math.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("value", [0.0, None, -1.0, float("nan"), "1"])
def test_a_max_grad_norm_for_which_the_seam_is_never_called_is_refused(tmp_path, value):
    rule = "a number" if isinstance(value, str) else "above 0 under adaptive clipping"
    with pytest.raises(ConfigError, match=re.escape(f"`max_grad_norm` must be {rule}, but is {value!r} instead")):
        build(AdaptiveClipTrainer, tmp_path, args=arguments(tmp_path, max_grad_norm=value))


def test_an_unknown_controller_and_a_bad_field_are_refused_at_construction(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'zscore'"):
        build(AdaptiveClipTrainer, tmp_path, clip="zscor")
    with pytest.raises(ConfigError, match="`decay`"):
        build(AdaptiveClipTrainer, tmp_path, clip=AdaptiveClipConfig(decay=2.0))


def test_a_transformers_without_the_seam_is_refused(tmp_path, monkeypatch):
    monkeypatch.delattr(Trainer, "_clip_grad_norm")
    with pytest.raises(UnsupportedSetupError, match=r"must have Trainer._clip_grad_norm \(5.3 or later\)"):
        build(AdaptiveClipTrainer, tmp_path)


@pytest.mark.parametrize("kind", ["MEGATRON_LM", "XLA", "SOMETHING_NEW"])
def test_setups_that_are_not_supported_are_refused_with_those_that_are(tmp_path, monkeypatch, kind):
    trainer = stock(tmp_path)
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", kind)
    with pytest.raises(
        UnsupportedSetupError, match=f"must be one of DEEPSPEED, FSDP, MULTI_CPU, MULTI_GPU, NO, but is {kind} instead"
    ):
        attach(trainer)


class Amplifier(TrainerCallback):
    """What a careless callback does: it puts the gradient back that clipping has cut."""

    def __init__(self, from_step=0):
        self.from_step = from_step

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step >= self.from_step:
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.mul_(10.0)


def test_a_callback_that_undoes_the_clipping_stops_the_run_before_its_first_step(tmp_path):
    trainer = build(AdaptiveClipTrainer, tmp_path, callbacks=[Amplifier()], clip=CONFIG)
    before = weights(trainer)
    with pytest.raises(ClippingDefeatedError, match="callbacks with `on_pre_optimizer_step`"):
        run(trainer)
    assert torch.equal(before, weights(trainer))


def test_one_that_begins_later_is_found_by_verify(tmp_path):
    run(build(AdaptiveClipTrainer, tmp_path, callbacks=[Amplifier(from_step=25)], clip=CONFIG))
    report = verify_ledger(tmp_path / "clip_ledger.jsonl")

    assert not report.ok
    assert any("something changed it between clipping and the step" in str(f) for f in report.findings)


def test_a_seam_that_somebody_has_replaced_stops_the_run_before_its_first_step(tmp_path):
    trainer = build(AdaptiveClipTrainer, tmp_path, clip=CONFIG)
    before = weights(trainer)
    trainer._clip_grad_norm = lambda model: trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(ClippingDefeatedError, match="must be called in every optimizer step"):
        run(trainer)
    assert trainer.state.global_step == 0
    assert torch.equal(before, weights(trainer))

    class NoSeam(Trainer):
        def _clip_grad_norm(self, model):
            return torch.tensor(1.0)

    class StandsLast(NoSeam, AdaptiveClipTrainer):
        pass

    with pytest.raises(ClippingDefeatedError, match="Let the mixin stand first"):
        run(build(StandsLast, tmp_path, clip=CONFIG))


def test_the_self_test_runs_once_at_the_start_and_can_be_switched_off(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("hf_adaclip.clipper.check_on_a_copy", lambda *a: calls.append(a))
    run(build(AdaptiveClipTrainer, tmp_path, clip=CONFIG, args=arguments(tmp_path, max_steps=3)))
    assert len(calls) == 1
    settings = CONFIG.replace(self_test=False)
    run(build(AdaptiveClipTrainer, tmp_path, clip=settings, args=arguments(tmp_path, max_steps=3)))
    assert len(calls) == 1


def test_too_many_bad_steps_name_the_checkpoint_to_go_back_to(tmp_path):
    class NanFrom20(AdaptiveSpikeTrainer):
        factor = float("nan")

        def training_step(self, *args, **kwargs):
            self.spike_step = self.state.global_step if self.state.global_step >= 22 else -1
            return super().training_step(*args, **kwargs)

    args = arguments(tmp_path, max_steps=80, save_strategy="steps", save_steps=20, logging_steps=5)
    trainer = build(NanFrom20, tmp_path, args=args, clip=CONFIG.replace(max_consecutive_nonfinite=8))
    with pytest.raises(NonFiniteGradientError, match=r"resume from .*checkpoint-20\.") as caught:
        run(trainer)

    assert caught.value.checkpoint.endswith("checkpoint-20")
    assert weights(trainer).isfinite().all()


def test_a_run_that_is_gone_on_with_for_longer_does_not_start_its_pace_again(tmp_path):
    clip = CONFIG.replace(max_pace=4.0)
    settings = {"save_strategy": "steps", "save_steps": 15, "lr_scheduler_type": "constant"}
    first = build(AdaptiveClipTrainer, tmp_path, args=arguments(tmp_path, max_steps=30, **settings), clip=clip)
    run(first)
    longer = build(AdaptiveClipTrainer, tmp_path, args=arguments(tmp_path, max_steps=300, **settings), clip=clip)
    longer.add_callback(StopAt(45))
    run(longer, resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    assert longer.clipper.config.pace_start == first.clipper.config.pace_start == 3
    ledger = [json.loads(line) for line in (tmp_path / "clip_ledger.jsonl").read_text().splitlines()]
    paces = [line["pace"] for line in ledger if line["kind"] == "step"]
    assert len(paces) == 30 + 30
    assert min(paces[30:]) >= 1.0
    assert verify_ledger(tmp_path / "clip_ledger.jsonl").ok


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize(("warmup", "start"), [(0, 3), (0.05, 1), (0.5, 1)])
def test_the_pace_starts_over_a_tenth_of_the_steps_less_the_schedules_own_warm_up(tmp_path, warmup, start):
    args = arguments(tmp_path, max_steps=30, warmup_steps=warmup)
    trainer = build(AdaptiveClipTrainer, tmp_path, args=args, clip=CONFIG.replace(max_pace=4.0))
    run(trainer)
    assert trainer.clipper.config.pace_start == start
    ledger = [json.loads(line) for line in (tmp_path / "clip_ledger.jsonl").read_text().splitlines()]
    steps = [line for line in ledger if line["kind"] == "step"]
    assert [s["pace"] for s in steps[:3]] == pytest.approx([min(1.0, (i + 1) / start) for i in range(3)])
    assert all("reach" in s for s in steps[warmup > 0 :])
    assert verify_ledger(tmp_path / "clip_ledger.jsonl").ok
