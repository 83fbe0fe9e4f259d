"""What a loop says of its run beforehand: where the pace starts, and what several epochs hold back."""

import math

import pytest
import torch
from accelerate import Accelerator

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, ConfigError, RunPlan
from hf_adaclip.run.checkpoint import SavedPlan
from hf_adaclip.run.run_plan import steps_per_epoch
from tests.integrations.trainers import as_loaded, model

TRAINED = "this run plans 3 or more epochs with a model that was trained before"


def clipper_of(made, plan, clip="adaptive", *, known=True, **given):
    optimizer = torch.optim.AdamW(made.parameters())
    return AdaptiveClipper(clip, optimizer=optimizer, model=made if known else None, plan=plan, **given)


@pytest.mark.parametrize(
    ("given", "start"),
    [
        ({}, None),
        ({"steps": 1200}, 120),
        ({"steps": 1200, "warmup_steps": 60}, 60),
        ({"steps": 1200, "warmup_steps": 600}, 1),
        ({"steps": 3}, 1),
        ({"steps": 1200, "before": SavedPlan(start=7)}, 7),
        ({"before": SavedPlan(start=7)}, 7),
    ],
)
def test_the_start_of_the_pace_is_a_tenth_less_the_warm_up(given, start):
    plan = RunPlan(**given)
    assert plan.pace_start == start
    settings = clipper_of(model(), plan).config.settings
    assert settings.pace_start == start
    assert clipper_of(model(), plan, "adaptive:pace_start=9").config.settings.pace_start == 9


@pytest.mark.parametrize(
    "given",
    [
        {"steps": 0},
        {"steps": True},
        {"steps": "many"},
        {"steps": math.nan},
        {"warmup_steps": -1},
        {"warmup_steps": None},
        {"epochs": 0},
        {"epochs": math.nan},
        {"epochs": "3"},
    ],
)
def test_a_plan_that_is_none_names_what_is_wrong(given):
    [(name, value)] = given.items()
    with pytest.raises(ConfigError, match=rf"^`{name}` of RunPlan must be .*, but is {value!r} instead\.$"):
        RunPlan(**given)


@pytest.mark.parametrize(
    ("epochs", "loaded", "known", "pace", "why"),
    [
        (3, True, True, 1.0, TRAINED),
        (math.inf, True, True, 1.0, TRAINED),
        (2.9, True, True, 64.0, ""),
        (None, True, True, 64.0, ""),
        (3, False, True, 64.0, ""),
        (3, True, False, 1.0, "no model tells whether it was trained before (pass `model=`)"),
    ],
)
def test_a_loop_that_plans_several_epochs_has_no_pace_with_a_trained_model(epochs, loaded, known, pace, why):
    made = as_loaded(model()) if loaded else model()
    clipper = clipper_of(made, RunPlan(epochs=epochs), known=known)
    assert clipper.config.max_pace == pace
    assert clipper.config.max_threshold == (1.0 if why else None)
    assert (why in clipper.held_back) if why else (clipper.held_back == "")
    assert why in clipper.explain()


def test_what_is_set_by_hand_stays():
    plan = RunPlan(epochs=4)
    clipper = clipper_of(as_loaded(model()), plan, "adaptive:max_pace=8,max_threshold=5")
    assert (clipper.config.max_pace, clipper.config.max_threshold, clipper.held_back) == (8.0, 5.0, "")
    assert clipper_of(as_loaded(model()), plan, static_threshold=0.3).config.max_threshold == 0.3
    assert clipper_of(as_loaded(model()), plan, static_threshold=math.inf).config.max_threshold is None
    assert clipper_of(as_loaded(model()), plan, "zscore").config.max_threshold is None


def test_a_script_whose_threshold_is_above_the_limit_hears_of_it(caplog):
    accelerator = Accelerator(cpu=True)
    made = as_loaded(model())
    optimizer = torch.optim.AdamW(made.parameters())
    clipper = AdaptiveClipper(
        accelerator=accelerator, optimizer=optimizer, model=made, plan=RunPlan(epochs=3), ledger=None
    )
    with clipper.install():
        made(input_ids=torch.ones(1, 4, dtype=torch.int64), labels=torch.ones(1, 4, dtype=torch.int64)).loss.backward()
        accelerator.clip_grad_norm_(made.parameters(), 5.0)
    assert "`max_norm` is 5, but no threshold is above `max_threshold`, 1. There is no pace" in caplog.text


class Endless:
    def __len__(self):
        raise TypeError("no length")


@pytest.mark.parametrize(
    ("batches", "accumulated", "steps"), [(8, 1, 8), (8, 3, 3), (2, 4, 1), (0, 1, 1), (None, 1, None)]
)
def test_steps_of_an_epoch_are_counted_as_the_trainer_counts(batches, accumulated, steps):
    data = Endless() if batches is None else range(batches)
    assert steps_per_epoch(data, accumulated) == steps


def test_the_config_is_the_same_without_a_plan():
    made = model()
    settled = [clipper_of(made, plan).config for plan in (None, RunPlan())]
    assert settled[0] == settled[1]
    assert isinstance(settled[0], AdaptiveClipConfig)
