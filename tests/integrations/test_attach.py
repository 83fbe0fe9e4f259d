"""`attach` to a Trainer with a life of its own: in `on_train_begin`, and over methods that somebody has put on the object."""

import json
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipMixin, AdaptiveClipTrainer, ConfigError, attach
from hf_adaclip.audit import verify_ledger
from tests.integrations.trainers import arguments, build, run, stock, weights

pytestmark = pytest.mark.slow

STEPS = 24
CONFIG = AdaptiveClipConfig(warmup_observations=6, ceiling_share=1.0, max_pace=4.0)


class Attaches(TrainerCallback):
    """As a callback of some tool does, which is given the Trainer before it is built."""

    trainer: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not isinstance(self.trainer, AdaptiveClipMixin):
            attach(self.trainer, CONFIG)


def attaching(folder, *, resume=None, kind=Trainer, first=False, **changes):
    callback = Attaches()
    saving = {"save_strategy": "steps", "save_steps": 12, "max_steps": STEPS, "learning_rate": 1e-4, **changes}
    others = [Other(), callback] if not first else [callback, Other()]
    trainer = build(kind, folder, args=arguments(folder, **saving), callbacks=others)
    callback.trainer = trainer
    run(trainer, resume_from_checkpoint=resume)
    return trainer


class Other(TrainerCallback):
    pass


def ahead(folder):
    saving = {"save_strategy": "steps", "save_steps": 12, "max_steps": STEPS, "learning_rate": 1e-4}
    trainer = attach(stock(folder, args=arguments(folder, **saving)), CONFIG)
    run(trainer)
    return trainer


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    return ahead(tmp_path_factory.mktemp("before"))


@pytest.mark.parametrize("first", [False, True])
def test_from_on_train_begin_it_is_the_run_attached_before(before, tmp_path, first):
    trainer = attaching(tmp_path, first=first)
    assert torch.equal(weights(trainer), weights(before))
    assert trainer.clipper.state == before.clipper.state
    assert trainer.clipper.config.pace_start == before.clipper.config.pace_start
    report = verify_ledger(tmp_path / "clip_ledger.jsonl")
    assert (report.ok, report.steps, report.closed) == (True, STEPS, True)
    assert any("clip/threshold" in entry for entry in trainer.state.log_history)


def test_from_on_train_begin_of_a_resumed_run_the_state_is_loaded(before, tmp_path):
    attaching(tmp_path)
    (tmp_path / "checkpoint-24").rename(tmp_path / "gone")
    trainer = attaching(tmp_path, resume=str(tmp_path / "checkpoint-12"))
    assert torch.equal(weights(trainer), weights(before))
    assert trainer.clipper.step == STEPS
    assert verify_ledger(tmp_path / "clip_ledger.jsonl").ok


def test_a_second_train_after_that_is_a_run_of_its_own(tmp_path):
    trainer = attaching(tmp_path)
    first = trainer.clipper
    trainer.train()
    assert trainer.clipper is not first
    assert trainer.clipper.step == STEPS
    assert verify_ledger(tmp_path / "clip_ledger.jsonl").closed


@pytest.mark.parametrize("attached", ["before", "on_train_begin"])
def test_over_a_clipping_on_the_object_ours_acts_and_that_is_said(before, tmp_path, caplog, attached):
    class Replaced(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            vars(self)["_clip_grad_norm"] = self.theirs

        def theirs(self, model):
            raise AssertionError("not called any more")

    if attached == "before":
        saving = {"save_strategy": "no", "max_steps": STEPS, "learning_rate": 1e-4}
        trainer = attach(build(Replaced, tmp_path, args=arguments(tmp_path, **saving)), CONFIG)
        run(trainer)
    else:
        trainer = attaching(tmp_path, kind=Replaced)
    assert torch.equal(weights(trainer), weights(before))
    assert "Replaced._clip_grad_norm is no longer called" in caplog.text


def test_a_training_step_on_the_object_is_called_and_its_loss_known(tmp_path):
    trainer = stock(tmp_path, args=arguments(tmp_path, max_steps=4))
    inner, seen = trainer.training_step, []

    def training_step(*args, **kwargs):
        loss = inner(*args, **kwargs)
        seen.append(float(loss))
        return loss

    trainer.training_step = training_step
    run(attach(trainer, "static"))
    lines = [json.loads(line) for line in (tmp_path / "clip_ledger.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "norm" in line] == pytest.approx(seen)


@pytest.mark.parametrize("name", ["_inner_training_loop", "_save_optimizer_and_scheduler", "log", "create_scheduler"])
def test_other_methods_on_the_object_are_still_called(tmp_path, name):
    trainer = stock(tmp_path, args=arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2))
    inner, calls = getattr(trainer, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        return inner(*args, **kwargs)

    setattr(trainer, name, counted)
    run(attach(trainer, "static"))
    assert calls
    assert trainer.clipper.step == 4
    assert verify_ledger(tmp_path / "clip_ledger.jsonl").closed


def test_a_refusal_leaves_the_object_as_it_was(tmp_path):
    trainer = stock(tmp_path, args=arguments(tmp_path, max_steps=4, max_grad_norm=0.0))
    trainer.training_step = replaced = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="`max_grad_norm` must be above 0"):
        attach(trainer)
    assert type(trainer) is Trainer
    assert trainer.__dict__["training_step"] is replaced


class AttachesAndGoesOn(TrainerCallback):
    """Goes on with the stock Trainer where that fails."""

    trainer: Any = None
    said = ""

    def on_train_begin(self, args, state, control, **kwargs):
        try:
            attach(self.trainer)
        except ValueError as error:
            self.said = str(error)


def test_a_refusal_within_a_run_leaves_the_stock_trainer(tmp_path):
    (tmp_path / "skip_batches.json").write_text('{"samples": [5]}')
    callback = AttachesAndGoesOn()
    trainer = stock(tmp_path, args=arguments(tmp_path, max_steps=4), callbacks=[callback])
    callback.trainer, kinds = trainer, [type(c) for c in trainer.callback_handler.callbacks]
    run(trainer)
    assert callback.said
    assert trainer.state.global_step == 4
    assert type(trainer) is Trainer
    assert [type(c) for c in trainer.callback_handler.callbacks] == kinds
    assert trainer.args.logging_nan_inf_filter


def test_a_mixin_without_a_trainer_is_refused():
    class Alone(AdaptiveClipMixin):
        pass

    with pytest.raises(ConfigError, match=r"`class Alone\(AdaptiveClipMixin, Trainer\)`"):
        Alone(model=None)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "clipp",
            "adaptive",
            "`clipp` must be an argument of the Trainer, but is unknown instead. Did you mean `clip`",
        ),
        ("clip_config", CONFIG, "Did you mean `clip`"),
        ("config", CONFIG, "Did you mean `clip`"),
        ("max_pace", 8.0, r"pass `clip=AdaptiveClipConfig\(max_pace=...\)`"),
        ("max_grad_norm", 2.0, "`max_grad_norm` of TrainingArguments"),
    ],
)
def test_a_misnamed_argument_of_a_trainer_is_named(tmp_path, name, value, words):
    with pytest.raises(ConfigError, match=words):
        build(AdaptiveClipTrainer, tmp_path, **{name: value})


def test_an_argument_that_nobody_meant_for_clipping_is_pythons_to_refuse(tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'train_rows'"):
        build(AdaptiveClipTrainer, tmp_path, train_rows=None)
