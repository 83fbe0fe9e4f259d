"""That every optimizer step of a Trainer is clipped once, by the threshold of that step; and what is said where it is not."""

import json
import logging
from unittest import mock

import pytest
import torch
from transformers import Trainer, TrainerCallback

import hf_adaclip.integrations.transformers as trainer_module
from hf_adaclip import (
    AdaptiveClipConfig,
    AdaptiveClipMixin,
    AdaptiveClipper,
    AdaptiveClipTrainer,
    ClippingDefeatedError,
    ConfigError,
    NonFiniteGradientError,
    StateError,
    UnsupportedSetupError,
    attach,
)
from hf_adaclip.audit import verify_ledger
from hf_adaclip.integrations import first_line
from tests.integrations.trainers import arguments, build, dataset, run, stock, weights

pytestmark = pytest.mark.slow

CONFIG = AdaptiveClipConfig(warmup_observations=10)
GUARD = AdaptiveClipConfig.resolve("guard:warmup_observations=10")


def steps_of(folder):
    lines = [json.loads(line) for line in (folder / "clip_ledger.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


# -- a step without a gradient ---------------------------------------------------------------------------------------


class GivesUp(Trainer):
    at = (7,)

    def training_step(self, *args, **kwargs):
        if self.state.global_step in self.at:
            return torch.tensor(0.0)
        return super().training_step(*args, **kwargs)


class OursGivesUp(AdaptiveClipMixin, GivesUp):
    pass


@pytest.mark.parametrize(
    "clip",
    [
        AdaptiveClipConfig(controller="static"),
        CONFIG,
        CONFIG.replace(granularity="module", max_pace=2.0),
        CONFIG.replace(granularity="tensor", max_skipped=3, on_trouble="stop"),
        AdaptiveClipConfig(controller="weight_ratio"),
        AdaptiveClipConfig(controller="second_moment"),
    ],
    ids=lambda c: f"{c.controller}-{c.granularity}",
)
@pytest.mark.parametrize("at", [(7,), (0, 1, 2)], ids=str)
def test_a_step_without_a_gradient_goes_on_as_in_the_stock_trainer(tmp_path, lane, clip, at):
    args = {"max_steps": 20, "max_grad_norm": 0.3, "logging_steps": 1}
    a = build(GivesUp, tmp_path / "a", args=arguments(tmp_path / "a", **args))
    b = build(OursGivesUp, tmp_path / "b", args=arguments(tmp_path / "b", **args), clip=clip)
    a.at = b.at = at
    run(a)
    run(b)

    logged = [h["grad_norm"] for h in b.state.log_history if "grad_norm" in h]
    assert [i for i, norm in enumerate(logged) if norm == 0] == list(at)
    assert b.clipper.step == b.state.global_step == 20
    assert b.clipper.statistics.skipped == 0
    report = verify_ledger(tmp_path / "b/clip_ledger.jsonl")
    assert (report.ok, report.steps, report.closed) == (True, 20, True), report.findings
    if clip.controller == "static":
        assert torch.equal(weights(a), weights(b))
        assert logged == [h["grad_norm"] for h in a.state.log_history if "grad_norm" in h]


def test_nothing_is_learnt_from_it(tmp_path):
    args = {"lr_scheduler_type": "constant"}
    plain = build(OursGivesUp, tmp_path / "a", args=arguments(tmp_path / "a", max_steps=7, **args), clip=GUARD)
    with_one = build(OursGivesUp, tmp_path / "b", args=arguments(tmp_path / "b", max_steps=8, **args), clip=GUARD)
    run(plain)
    run(with_one)
    assert [float(v) for v in plain.clipper.state.values()] == pytest.approx(
        [float(v) for v in with_one.clipper.state.values()], abs=0, nan_ok=True
    )


# -- a threshold that changes in the middle ---------------------------------------------------------------------------


class Schedule(TrainerCallback):
    def __init__(self, value_at):
        self.value_at = value_at

    def on_step_begin(self, args, state, control, **kwargs):
        args.max_grad_norm = self.value_at(state.global_step)


@pytest.mark.parametrize(
    "value_at", [lambda s: 0.5 if s < 10 else 0.1, lambda s: 0.1 + 0.02 * s], ids=["once", "ramp"]
)
@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}], ids=str)
def test_static_follows_a_schedule_of_max_grad_norm_bit_for_bit(tmp_path, lane, caplog, value_at, changes):
    settings = {"max_steps": 25, "max_grad_norm": value_at(0), **changes}
    pair = [
        build(
            kind,
            tmp_path / name,
            args=arguments(tmp_path / name, **settings),
            callbacks=[Schedule(value_at)],
            **clip,
        )
        for kind, name, clip in ((Trainer, "a", {}), (AdaptiveClipTrainer, "b", {"clip": "static"}))
    ]
    for trainer in pair:
        run(trainer)

    assert torch.equal(*map(weights, pair))
    assert [s["threshold"] for s in steps_of(tmp_path / "b")] == pytest.approx([value_at(s) for s in range(25)])
    report = verify_ledger(tmp_path / "b/clip_ledger.jsonl")
    assert (report.ok, report.segments, report.recomputed) == (True, 1, 25), report.findings
    assert len([r for r in caplog.records if "`max_grad_norm` was set from" in r.getMessage()]) == 1


@pytest.mark.parametrize("clip", [CONFIG, CONFIG.replace(shadow=True), CONFIG.replace(granularity="tensor")], ids=str)
def test_the_others_take_it_for_their_warm_up_and_verify(tmp_path, clip):
    callbacks = [Schedule(lambda s: 0.5 if s < 5 else 0.1)]
    args = arguments(tmp_path, max_steps=25, max_grad_norm=0.5)
    run(build(AdaptiveClipTrainer, tmp_path, args=args, callbacks=callbacks, clip=clip))
    report = verify_ledger(tmp_path / "clip_ledger.jsonl")
    assert (report.ok, report.recomputed) == (True, 25), report.findings
    assert report.measured > 1


@pytest.mark.parametrize(
    "value_at", [lambda s: 0.5 if s < 10 else 0.1, lambda s: 0.1 if 10 <= s < 15 else 0.5], ids=["once", "and back"]
)
def test_a_run_with_a_schedule_is_resumed_bit_for_bit(tmp_path, value_at):
    callbacks = [Schedule(value_at)]
    settings = {"max_steps": 30, "max_grad_norm": 0.5, "save_strategy": "steps", "save_steps": 15}

    def trainer(folder):
        return build(
            AdaptiveClipTrainer, folder, args=arguments(folder, **settings), callbacks=callbacks, clip="static"
        )

    whole = trainer(tmp_path / "whole")
    run(whole)
    again = trainer(tmp_path / "whole")
    run(again, resume_from_checkpoint=str(tmp_path / "whole/checkpoint-15"))
    assert torch.equal(weights(whole), weights(again))
    assert verify_ledger(tmp_path / "whole/clip_ledger.jsonl").ok


@pytest.mark.parametrize("value", [0.0, None, -1.0, float("nan")])
def test_one_that_switches_clipping_off_ends_the_run_before_that_step_moves(tmp_path, value):
    moved = []

    class Off(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 6:
                args.max_grad_norm = value

        def on_optimizer_step(self, args, state, control, **kwargs):
            moved.append(state.global_step)

    trainer = build(AdaptiveClipTrainer, tmp_path, callbacks=[Off()], clip=CONFIG)
    with pytest.raises(ConfigError, match="`max_grad_norm` must be above 0"):
        run(trainer)
    assert moved == list(range(6))


def test_a_threshold_of_the_config_is_not_moved_and_says_so(tmp_path, caplog):
    callbacks = [Schedule(lambda s: 0.5 if s < 5 else 0.1)]
    config = AdaptiveClipConfig(controller="static", static_threshold=0.2)
    args = arguments(tmp_path, max_steps=10, max_grad_norm=0.5)
    run(build(AdaptiveClipTrainer, tmp_path, args=args, callbacks=callbacks, clip=config))
    assert {s["threshold"] for s in steps_of(tmp_path)} == {0.2}
    assert any("it has no effect" in r.getMessage() for r in caplog.records)


def test_steps_of_a_run_that_was_interrupted_do_not_count_in_the_next(tmp_path, caplog):
    trainer = build(AdaptiveClipTrainer, tmp_path, clip=CONFIG)
    trainer._watch._stepped = 1  # between an optimizer's step and the Trainer's end of it
    run(trainer)
    assert not [r for r in caplog.records if "stepped more than once" in r.getMessage()]


def test_another_max_grad_norm_on_resume_is_named(tmp_path):
    settings = {"max_steps": 10, "save_strategy": "steps", "save_steps": 5}
    run(build(AdaptiveClipTrainer, tmp_path, args=arguments(tmp_path, **settings), clip=CONFIG))
    lower = build(AdaptiveClipTrainer, tmp_path, args=arguments(tmp_path, max_grad_norm=0.5, **settings), clip=CONFIG)
    with pytest.raises(StateError, match=r"`max_grad_norm` was 1\.0 and is 0\.5"):
        run(lower, resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


# -- a seam that is not reached ---------------------------------------------------------------------------------------


class LosesIt(AdaptiveClipTrainer):
    def _clip_grad_norm(self, model):
        if self.state.global_step < 5:
            return super()._clip_grad_norm(model)
        return torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])


def test_a_seam_that_is_lost_midway_ends_the_run_before_that_step_moves(tmp_path):
    trainer = build(LosesIt, tmp_path, clip="static")
    with pytest.raises(ClippingDefeatedError, match="went without it in step 5"):
        run(trainer)
    assert trainer.clipper.step == trainer.state.global_step == 5


def test_without_the_self_test_it_is_a_warning_and_a_finding(tmp_path, caplog):
    trainer = build(LosesIt, tmp_path, clip=AdaptiveClipConfig(controller="static", self_test=False))
    run(trainer)
    report = verify_ledger(tmp_path / "clip_ledger.jsonl")
    assert len([r for r in caplog.records if "a step was made without clipping" in r.message]) == 1
    assert not report.ok
    assert "counted 40 optimizer steps, but clipping decided on 5" in str(report.findings[0])


def test_one_that_is_replaced_on_the_object_during_training_is_noticed_too(tmp_path):
    class Replaces(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                trainer._clip_grad_norm = lambda model: torch.tensor(1.0)

    trainer = build(AdaptiveClipTrainer, tmp_path, callbacks=[Replaces()], clip=CONFIG)
    with pytest.raises(ClippingDefeatedError, match="in step 3"):
        run(trainer)


def test_a_wrapper_around_the_seam_is_left_alone(tmp_path):
    trainer = build(AdaptiveClipTrainer, tmp_path, args=arguments(tmp_path, max_steps=5), clip=CONFIG)
    inner, calls = trainer._clip_grad_norm, []

    def wrapper(model):
        calls.append(1)
        return inner(model)

    trainer._clip_grad_norm = wrapper
    run(trainer)
    assert (len(calls), trainer.clipper.step) == (5, 5)


class Does(TrainerCallback):
    def __init__(self, action):
        self.action = action

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.action(model, optimizer)


@pytest.mark.parametrize("name", ["adamw_torch_fused", "sgd", "adafactor"])
def test_a_callback_that_steps_the_optimizer_itself_is_warned_of_once(tmp_path, caplog, name):
    args = arguments(tmp_path, max_steps=5, optim=name)
    run(build(AdaptiveClipTrainer, tmp_path, args=args, callbacks=[Does(lambda m, o: o.step())], clip=CONFIG))
    assert len([r for r in caplog.records if "the optimizer stepped more than once" in r.message]) == 1
    caplog.clear()
    run(build(AdaptiveClipTrainer, tmp_path, args=arguments(tmp_path, max_steps=5, optim=name), clip=CONFIG))
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("hf_adaclip")]


def test_a_callback_that_clips_again_lower_is_told_during_the_run(tmp_path, caplog, lane):
    said = []

    class Says(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            said.append(any("was given a gradient of norm" in r.message for r in caplog.records))

    again = Does(lambda model, o: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05))
    args = arguments(tmp_path, max_steps=40, logging_steps=500)
    run(build(AdaptiveClipTrainer, tmp_path, args=args, callbacks=[again, Says()], clip="static"))
    assert said.index(True) <= (2 if lane == "host" else 27)
    assert len([r for r in caplog.records if "where clipping had left" in r.message]) == 1


class TwoClasses(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


def test_an_optimizer_whose_step_calls_that_of_its_base_steps_once(tmp_path, caplog):
    trainer = stock(tmp_path, args=arguments(tmp_path, max_steps=3))
    trainer.optimizer = TwoClasses(trainer.model.parameters(), lr=1e-3)
    run(attach(trainer, "static"))
    assert not any("stepped more than once" in r.message for r in caplog.records)


def test_clipping_twice_in_a_step_is_warned_of(tmp_path, caplog):
    trainer = build(AdaptiveClipTrainer, tmp_path, clip="static")
    trainer.add_callback(Does(lambda model, o: trainer._clip_grad_norm(model)))
    run(trainer)
    assert any("clipping was called more than once in a step" in r.message for r in caplog.records)
    assert not verify_ledger(tmp_path / "clip_ledger.jsonl").ok


# -- how soon ----------------------------------------------------------------------------------------------------------


class Bad(AdaptiveClipTrainer):
    bad = ()

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.state.global_step in self.bad else loss


def test_trouble_and_a_storm_of_nan_are_acted_on_at_once_whatever_logging_steps_is(tmp_path, lane):
    late = 1 if lane == "host" else 26
    args = {"max_steps": 100, "logging_steps": 500}
    trainer = build(
        Bad,
        tmp_path / "a",
        args=arguments(tmp_path / "a", **args),
        clip=CONFIG.replace(max_skipped=2, on_trouble="stop"),
    )
    trainer.bad = range(20, 23)
    run(trainer)
    assert 24 <= trainer.state.global_step <= 23 + late

    trainer = build(
        Bad,
        tmp_path / "b",
        args=arguments(tmp_path / "b", **args),
        clip=CONFIG.replace(max_consecutive_nonfinite=5),
    )
    trainer.bad = range(20, 200)
    before = []

    class Keeps(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            before.append(weights(trainer))

    trainer.add_callback(Keeps())
    with pytest.raises(NonFiniteGradientError):
        run(trainer)
    assert 25 <= trainer.state.global_step <= 24 + late
    assert torch.equal(before[20], weights(trainer))


# -- the place among the bases ------------------------------------------------------------------------------------------


def test_a_mixin_that_stands_last_is_refused_as_the_class_is_made():
    with pytest.raises(ConfigError, match=r"Write `class M\(AdaptiveClipMixin, Trainer\)`"):

        class M(Trainer, AdaptiveClipMixin):  # type: ignore[misc]
            pass

    class Own(Trainer):
        pass

    class Ours(AdaptiveClipMixin):
        pass

    with pytest.raises(ConfigError, match="must stand before Own among the bases of Deep, but stands after it"):

        class Deep(Own, Ours):
            pass

    class Right(Ours, Own):
        pass

    sft = pytest.importorskip("trl").SFTTrainer
    with pytest.raises(ConfigError, match="must stand before SFTTrainer"):
        type("Last", (sft, AdaptiveClipMixin), {})


def test_an_init_that_goes_past_the_mixin_is_refused(tmp_path):
    class Past(AdaptiveClipTrainer):
        def __init__(self, *args, clip=None, **kwargs):
            Trainer.__init__(self, *args, **kwargs)

    with pytest.raises(ConfigError, match=r"must call `super\(\).__init__"):
        run(build(Past, tmp_path))


class OwnClip(Trainer):
    def _clip_grad_norm(self, model):
        return torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def test_clipping_of_a_class_of_ones_own_is_said_to_be_no_longer_called(tmp_path, caplog):
    attach(build(OwnClip, tmp_path))
    assert any("OwnClip._clip_grad_norm is no longer called" in r.getMessage() for r in caplog.records)
    caplog.clear()

    class Both(AdaptiveClipMixin, OwnClip):
        pass

    build(Both, tmp_path)
    assert any("OwnClip._clip_grad_norm is no longer called" in r.getMessage() for r in caplog.records)
    caplog.clear()
    attach(stock(tmp_path))
    assert not caplog.records


def test_an_optimizer_made_on_the_object_is_the_one_that_is_guarded(tmp_path):
    trainer = stock(tmp_path, args=arguments(tmp_path, max_steps=4))
    made = []

    def create_optimizer(model=None):
        made.append(torch.optim.SGD(trainer.model.parameters(), lr=0.1))
        trainer.optimizer = made[0]
        return made[0]

    trainer.create_optimizer = create_optimizer
    run(attach(trainer, "static"))
    assert "SGD" in trainer.clipper.explain()
    assert steps_of(tmp_path)[0]["applied_norm"] is not None


def test_attach_during_training_and_to_a_class_is_refused_and_after_training_said(tmp_path, caplog):
    caught: list[str] = []

    class Attaches(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                try:
                    attach(trainer)
                except ConfigError as error:
                    caught.append(str(error))

    args = arguments(tmp_path, max_steps=3)
    trainer = build(Trainer, tmp_path, args=args, callbacks=[Attaches()])
    run(trainer)
    assert "must not be in the middle of `train()`" in caught[0]
    attach(trainer, CONFIG)
    assert any("`attach` comes after 3 steps of training" in r.getMessage() for r in caplog.records)
    run(trainer)
    assert trainer.clipper.step == 3
    with pytest.raises(ConfigError, match="but is the class Trainer"):
        attach(Trainer)  # type: ignore[type-var]


@pytest.mark.parametrize(
    "name", ["_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler", "_maybe_log_save_evaluate"]
)
def test_a_transformers_in_which_a_method_has_another_name_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.delattr(Trainer, name)
    with pytest.raises(UnsupportedSetupError, match=rf"must have Trainer.{name}"):
        build(AdaptiveClipTrainer, tmp_path)


@pytest.mark.parametrize("by", ["position", "keyword"])
def test_the_trial_is_found_by_position_too(tmp_path, monkeypatch, by):
    asked = []
    trainer = build(AdaptiveClipTrainer, tmp_path, args=arguments(tmp_path, max_steps=2), clip=CONFIG)

    def complete(trial):
        asked.append(trial)
        return CONFIG

    monkeypatch.setattr(trainer, "_complete_config", complete)
    monkeypatch.setattr(
        Trainer, "_inner_training_loop", lambda self, batch_size=None, args=None, resume=None, trial=None: None
    )
    trainer._inner_training_loop(
        *((1, None, None, "t") if by == "position" else (1,)), **({} if by == "position" else {"trial": "t"})
    )
    assert asked == ["t"]


# -- what is logged, and what is left as it was --------------------------------------------------------------------------


class LogsItself(AdaptiveClipTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.log({"loss": 1.0, "grad_norm": 0.0, "part": 1.0})
        return loss


def test_losses_logged_by_hand_get_no_metrics_and_close_no_window(tmp_path):
    args = arguments(tmp_path, max_grad_norm=0.74, eval_strategy="steps", eval_steps=10)
    trainer = build(LogsItself, tmp_path, args=args, clip="static", eval_dataset=trainer_rows())
    run(trainer)
    cut = [float(s["coefficient"]) < 1 for s in steps_of(tmp_path)]
    own = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [entry["clip/fraction"] for entry in own] == [sum(cut[i : i + 10]) / 10 for i in range(0, 40, 10)]
    assert not any("clip/fraction" in entry for entry in trainer.state.log_history if "part" in entry)


def trainer_rows():
    from tests.integrations.trainers import dataset

    return dataset().select(range(32))


class StockNan(Trainer):
    bad = (3, 7, 8, 21)
    factor = float("nan")

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * self.factor if self.state.global_step in self.bad else loss


class OurNan(AdaptiveClipMixin, StockNan):
    pass


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_the_filter_on_the_device_logs_exactly_what_the_trainers_own_does(tmp_path, accumulation, factor):
    logged = []
    for name, config in (("host", {}), ("device", {"nan_filter_on_device": True})):
        args = arguments(tmp_path / name, gradient_accumulation_steps=accumulation, logging_steps=5, max_steps=30)
        trainer = build(OurNan, tmp_path / name, args=args, clip=AdaptiveClipConfig(controller="static", **config))
        trainer.factor = factor
        output = run(trainer)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        logged.append((losses, output.training_loss))
        assert args.logging_nan_inf_filter, "the caller's arguments are as they were"
    assert logged[0] == logged[1]


def test_the_effective_learning_rate_is_logged_where_there_is_a_pace(tmp_path):
    run(a := build(AdaptiveClipTrainer, tmp_path / "a", clip=GUARD))
    assert not any("clip/learning_rate" in entry for entry in a.state.log_history)
    run(b := build(AdaptiveClipTrainer, tmp_path / "b", clip=CONFIG.replace(max_pace=4.0)))
    own = [entry for entry in b.state.log_history if "grad_norm" in entry]
    planned = [entry["learning_rate"] for entry in own]
    assert [entry["clip/learning_rate"] for entry in own] == [
        rate * entry["clip/pace"] for rate, entry in zip(planned, own, strict=True)
    ]


def test_a_resumed_run_is_introduced_as_what_it_goes_on_with(tmp_path, monkeypatch, caplog):
    said: list[str] = []
    monkeypatch.setattr(trainer_module._shown, "warning", said.append)
    args = arguments(tmp_path, max_steps=30, save_strategy="steps", save_steps=20, learning_rate=1e-5)
    run(build(AdaptiveClipTrainer, tmp_path, args=args))
    assert "with pace up to x64, spectral range, agreement, static" in said[0]
    assert "departed" in caplog.text
    caplog.clear()
    run(build(AdaptiveClipTrainer, tmp_path, args=args), resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert said[1] == said[0]
    assert "departed" not in caplog.text


def test_a_run_that_only_clips_is_introduced_so(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(trainer_module._shown, "warning", said.append)
    args = arguments(tmp_path, max_steps=2)
    for clip in ("adaptive:granularity=tensor", {"parameter_rules": {"*norm*": "exclude"}}):
        run(build(AdaptiveClipTrainer, tmp_path, args=args, clip=clip))
        assert " It only clips: parameters are judged apart. " in said[-1]
    run(build(AdaptiveClipTrainer, tmp_path, args=args, clip="guard"))
    assert "only clips" not in said[-1]


def test_a_default_trainer_shows_one_line_on_what_clips(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(trainer_module._shown, "warning", said.append)
    run(build(AdaptiveClipTrainer, tmp_path, args=arguments(tmp_path, max_steps=2), clip="zscore"))
    assert len(said) == 1
    assert said[0].startswith("Adaptive clipping by `zscore`, static threshold 1; ledger ")


@pytest.mark.parametrize(
    ("clip", "there", "missing"),
    [
        ("adaptive", [], ["spectral range", "agreement"]),
        ("adaptive:agreement=true", ["agreement"], ["spectral range"]),
        ("adaptive:spectral_width=0", ["spectral range"], ["agreement"]),
    ],
)
def test_the_line_names_what_acts_in_a_model_that_was_trained_before(tmp_path, monkeypatch, clip, there, missing):
    said: list[str] = []
    monkeypatch.setattr(trainer_module._shown, "warning", said.append)
    monkeypatch.setattr(first_line, "trained_before", lambda models: True)
    run(build(AdaptiveClipTrainer, tmp_path, args=arguments(tmp_path, max_steps=2), clip=clip))
    assert all(part in said[0] for part in there)
    assert not [part for part in missing if part in said[0]]


def test_a_model_card_that_cannot_get_its_section_is_a_warning(tmp_path, caplog):
    trainer = build(AdaptiveClipTrainer, tmp_path, args=arguments(tmp_path, max_steps=2), clip=CONFIG)
    run(trainer)
    (tmp_path / "clip_ledger.jsonl").write_text("not a ledger\n")
    trainer.create_model_card()
    assert (tmp_path / "README.md").is_file()
    assert len([r for r in caplog.records if "got no section on clipping" in r.getMessage()]) == 1


def test_a_second_run_hears_of_its_own_evaluations(tmp_path):
    heard: list[float] = []
    args = arguments(tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2)
    small = dataset().select(range(16))
    trainer = build(AdaptiveClipTrainer, tmp_path, args=args, eval_dataset={"first": small})
    with mock.patch.object(AdaptiveClipper, "evaluated", lambda self, loss: heard.append(loss)):
        run(trainer)
        trainer.eval_dataset = small
        run(trainer)
    assert len(heard) == 4


def test_the_work_of_the_range_is_weighed_without_incidents_too(tmp_path):
    args = arguments(tmp_path, max_steps=2, per_device_train_batch_size=1)
    trainer = build(AdaptiveClipTrainer, tmp_path, args=args, clip={"incidents": False})
    trainer.train_dataset = dataset().map(lambda row: {k: v[:2] for k, v in row.items()})
    run(trainer)
    assert "with 2 tokens in a step it would take" in trainer.clipper.explain()
    assert not (tmp_path / "incidents").exists()


class Terminated(AdaptiveClipTrainer):
    """Asks for a checkpoint in a step, as the handler of SIGTERM does once its grace is over: in the backward pass, or after clipping."""

    at, late = -1, False

    def ask(self, *, late):
        if late is self.late and self.state.global_step == self.at:
            [manager] = filter(None, (getattr(c, "jit_manager", None) for c in self.callback_handler.callbacks))
            manager.is_checkpoint_requested = True

    def compute_loss(self, *args, **kwargs):
        self.ask(late=False)
        return super().compute_loss(*args, **kwargs)

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        self.ask(late=True)
        return norm


def terminated(folder, at=-1, late=False):
    args = arguments(folder, max_steps=30, enable_jit_checkpoint=True, learning_rate=1e-4)
    trainer = build(Terminated, folder, args=args, clip=CONFIG.replace(max_pace=8.0, spectral_width=0.0))
    for layer in trainer.model.model.layers:
        layer.self_attn.attention_dropout = (
            0.0  # the generator's state is saved after the forward pass, in the stock Trainer too
        )
    trainer.at, trainer.late = at, late
    return trainer


def test_a_checkpoint_within_a_step_is_gone_on_from_bit_for_bit(tmp_path):
    whole = terminated(tmp_path / "whole")
    run(whole)
    run(terminated(tmp_path / "cut", at=17))
    assert (tmp_path / "cut/checkpoint-17/clip_state.safetensors").is_file()
    resumed = terminated(tmp_path / "cut")
    run(resumed, resume_from_checkpoint=str(tmp_path / "cut/checkpoint-17"))
    assert resumed.clipper.step == 30
    assert torch.equal(weights(resumed), weights(whole))
    assert verify_ledger(tmp_path / "cut/clip_ledger.jsonl").ok


def test_a_checkpoint_that_is_asked_for_since_the_decision_has_no_state_of_another_step(tmp_path, caplog):
    run(terminated(tmp_path, at=17, late=True))
    assert "which has decided on a step that is not in its weights" in caplog.text
    assert not (tmp_path / "checkpoint-17/clip_state.safetensors").exists()
