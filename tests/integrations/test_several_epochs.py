"""Several epochs over little data, of a model that was trained before: there the pace goes by the first of them alone."""

import copy
import json
import logging
import math

import pytest
import torch
from transformers import Trainer, TrainerCallback

import hf_adaclip.integrations.transformers as trainer_module
from hf_adaclip import AdaptiveClipTrainer
from tests.integrations.trainers import arguments, as_loaded, dataset, model, run

PER_EPOCH = 4


def adapted(made):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(as_loaded(made), config)


def head_alone(made):
    as_loaded(made.model).requires_grad_(False)
    return made


def beside_a_target(made):
    made.target = copy.deepcopy(made.model).requires_grad_(False)  # which would follow `made.model`
    return made


def trainer_of(folder, steps, *, clip="adaptive", loaded=True, tuned=lambda made: made, **changes):
    made = tuned(as_loaded(model()) if loaded else model())
    args = arguments(folder, max_steps=steps, **changes)
    return AdaptiveClipTrainer(model=made, args=args, train_dataset=dataset().select(range(16 * PER_EPOCH)), clip=clip)


def first_epoch(trainer):
    """Its steps, where the pace goes by it alone."""
    held = trainer.clipper._driver._fresh
    return None if held is None else held.steps


@pytest.mark.parametrize(
    ("steps", "given", "pace"),
    [
        (3 * PER_EPOCH, {}, 64.0),
        (3 * PER_EPOCH - 1, {}, 64.0),
        (3 * PER_EPOCH, {"loaded": False}, 64.0),
        (3 * PER_EPOCH, {"loaded": False, "tuned": adapted}, 64.0),
        (3 * PER_EPOCH - 1, {"loaded": False, "tuned": adapted}, 64.0),
        (3 * PER_EPOCH, {"loaded": False, "tuned": head_alone}, 64.0),
        (3 * PER_EPOCH, {"loaded": False, "tuned": beside_a_target}, 64.0),
        (3 * PER_EPOCH, {"clip": "adaptive:max_pace=8"}, 8.0),
        (3 * PER_EPOCH, {"clip": "guard"}, 1.0),
        (3 * PER_EPOCH // 2, {"gradient_accumulation_steps": 2}, 64.0),
        (3 * PER_EPOCH // 2, {"gradient_accumulation_steps": 3}, 64.0),  # two steps a pass, the second of one batch
        (5, {"gradient_accumulation_steps": 3}, 64.0),
    ],
    ids=lambda value: str(
        {k: getattr(v, "__name__", v) for k, v in value.items()} if isinstance(value, dict) else value
    ),
)
def test_the_pace_goes_by_the_first_epoch_where_a_trained_model_sees_its_data_several_times(
    tmp_path, monkeypatch, steps, given, pace
):
    said: list[str] = []
    monkeypatch.setattr(trainer_module._shown, "warning", said.append)
    trainer = trainer_of(tmp_path, steps, **given)
    run(trainer)
    enough = steps >= 3 * math.ceil(PER_EPOCH / given.get("gradient_accumulation_steps", 1))
    several = enough and (given.get("loaded", True) or given.get("tuned") in (adapted, head_alone))
    assert trainer.clipper.config.max_pace == pace
    assert trainer.clipper.config.max_threshold == (1.0 if several else None)
    explained = trainer.clipper.explain()
    alone = several and "clip" not in given
    assert ("by the first epoch alone" in trainer.clipper.held_back) is alone
    first = math.ceil(PER_EPOCH / given.get("gradient_accumulation_steps", 1))
    assert first_epoch(trainer) == (first if alone else None)
    assert ("beyond 1 the range" in explained) is not several
    assert ("this run plans 3 or more epochs" in said[0]) is several


def test_where_the_static_threshold_cuts_it_is_the_run_of_the_stock_trainer_bit_for_bit(tmp_path):
    found = []
    for clip in ("adaptive", "static"):
        settings = {"learning_rate": 1e-5, "max_grad_norm": 0.5}  # below every norm of this run
        trainer = trainer_of(tmp_path / clip, 20 * PER_EPOCH, clip=clip, **settings)
        run(trainer)
        found.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*found)


def test_limits_that_are_set_stay(tmp_path):
    trainer = trainer_of(tmp_path, 3 * PER_EPOCH, clip="adaptive:max_threshold=5,min_threshold=2")
    run(trainer)
    assert trainer.clipper.config.max_threshold == 5
    trainer = trainer_of(tmp_path, 3 * PER_EPOCH, clip="adaptive:min_threshold=2")
    run(trainer)
    assert trainer.clipper.config.max_threshold == 2
    trainer = trainer_of(tmp_path, 3 * PER_EPOCH, clip="zscore")
    run(trainer)
    assert trainer.clipper.config.max_threshold is None


@pytest.mark.parametrize(("first", "then", "held"), [(2, 4, None), (4, 2, PER_EPOCH)])
def test_a_run_that_is_gone_on_with_keeps_its_pace(tmp_path, first, then, held):
    run(trainer_of(tmp_path, first * PER_EPOCH, save_strategy="steps", save_steps=PER_EPOCH))
    again = trainer_of(tmp_path, then * PER_EPOCH)
    run(again, resume_from_checkpoint=str(tmp_path / f"checkpoint-{PER_EPOCH}"))
    assert again.clipper.config.max_pace == 64.0
    assert first_epoch(again) == held
    assert again.clipper.config.max_threshold == (1.0 if held else None)


def test_without_a_static_threshold_there_is_no_limit(tmp_path):
    trainer = trainer_of(tmp_path, 3 * PER_EPOCH, max_grad_norm=math.inf)
    run(trainer)
    assert trainer.clipper.config.max_threshold is None
    assert first_epoch(trainer) == PER_EPOCH


@pytest.mark.parametrize("tuned", [lambda made: made, adapted])
def test_a_checkpoint_of_the_stock_trainer_is_gone_on_with_by_the_same_plan(tmp_path, tuned):
    plan = {"max_steps": 3 * PER_EPOCH, "save_strategy": "steps", "save_steps": PER_EPOCH}
    data = dataset().select(range(16 * PER_EPOCH))
    run(Trainer(model=tuned(as_loaded(model())), args=arguments(tmp_path, **plan), train_dataset=data))
    trainer = trainer_of(tmp_path, 3 * PER_EPOCH, tuned=tuned)
    run(trainer, resume_from_checkpoint=str(tmp_path / f"checkpoint-{PER_EPOCH}"))
    assert first_epoch(trainer) == PER_EPOCH
    assert max(paces(tmp_path)) == 1.0  # the first epoch was over, and said nothing


def paces(folder):
    lines = (folder / "clip_ledger.jsonl").read_text().splitlines()
    return [line["pace"] for line in map(json.loads, lines) if line["kind"] == "step"]


def test_the_first_line_names_what_is_held_back_and_no_more(tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(trainer_module._shown, "warning", said.append)
    run(trainer_of(tmp_path, 3 * PER_EPOCH))
    plan = "this run plans 3 or more epochs with a model that was trained before"
    held = "The pace goes by the first epoch alone and there is no threshold above 1"
    assert f"{held}: {plan} (set `max_pace` and `max_threshold` to override)." in said[-1]
    run(trainer_of(tmp_path, 3 * PER_EPOCH, clip="adaptive:max_pace=8,min_threshold=2"))
    assert f"There is no threshold above 2: {plan} (set `max_threshold` to override)." in said[-1]
    run(trainer_of(tmp_path, 3 * PER_EPOCH, clip="adaptive:max_threshold=5"))
    assert f"The pace goes by the first epoch alone: {plan} (set `max_pace` to override)." in said[-1]
    run(trainer_of(tmp_path, 3 * PER_EPOCH, clip="zscore"))
    assert plan not in said[-1]


def test_a_run_that_is_gone_on_with_says_what_it_goes_by(tmp_path, monkeypatch):
    run(trainer_of(tmp_path, 4 * PER_EPOCH, save_strategy="steps", save_steps=PER_EPOCH))
    said: list[str] = []
    monkeypatch.setattr(trainer_module._shown, "warning", said.append)
    trainer = trainer_of(tmp_path, 4 * PER_EPOCH)
    run(trainer, resume_from_checkpoint=str(tmp_path / f"checkpoint-{PER_EPOCH}"))
    said_then = "The pace goes by the first epoch alone and there is no threshold above 1: it is as in the checkpoint that this run goes on"
    assert f"{said_then} from." in said[0]


class Raises(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            args.max_grad_norm = 10.0


def test_a_callback_that_raises_the_static_threshold_hears_of_the_limit(tmp_path, caplog):
    trainer = trainer_of(tmp_path, 3 * PER_EPOCH)
    trainer.add_callback(Raises())
    with caplog.at_level(logging.WARNING):
        run(trainer)
    assert "no threshold is above `max_threshold`, 1" in caplog.text
