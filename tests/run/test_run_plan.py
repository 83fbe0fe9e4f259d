"""What a loop says of its run beforehand: where the pace starts, and what several epochs hold back."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, ConfigError, RunPlan
from hf_adaclip.run.fresh_data import FreshData
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
        ({"steps": np.int64(3)}, 1),
    ],
)
def test_the_start_of_the_pace_is_a_tenth_less_the_warm_up(given, start):
    plan = RunPlan(**given)
    assert plan.pace_start == start
    settings = clipper_of(model(), plan).config.settings
    assert settings.pace_start == start
    assert clipper_of(model(), plan, "adaptive:pace_start=9").config.settings.pace_start == 9


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"steps": 12, "epochs": 3}, 4),
        ({"steps": 13, "epochs": 3}, 4),
        ({"steps": 2, "epochs": 3}, 1),
        ({"steps": 12, "epochs": 3, "epoch_steps": 5}, 5),
        ({"epochs": 3}, None),
        ({"steps": 12}, None),
        ({"steps": 12, "epochs": math.inf}, None),
    ],
)
def test_the_first_epoch_has_its_part_of_the_steps(given, steps):
    assert RunPlan(**given).first_epoch == steps


@pytest.mark.parametrize(
    "given",
    [
        {"steps": 0},
        {"steps": 0.5},
        {"steps": True},
        {"steps": "many"},
        {"steps": math.inf},
        {"epoch_steps": 0},
        {"warmup_steps": -1},
        {"warmup_steps": math.inf},
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
    ("plan", "loaded", "known", "pace", "why"),
    [
        ({"epochs": 3, "steps": 30}, True, True, 64.0, TRAINED),
        ({"epochs": 3, "epoch_steps": 10}, True, True, 64.0, TRAINED),
        ({"epochs": 3}, True, True, 1.0, TRAINED),
        ({"epochs": math.inf}, True, True, 1.0, TRAINED),
        ({"epochs": 2.9, "steps": 30}, True, True, 64.0, ""),
        ({"steps": 30}, True, True, 64.0, ""),
        ({"epochs": 3, "steps": 30}, False, True, 64.0, ""),
        (
            {"epochs": 3, "steps": 30},
            True,
            False,
            64.0,
            "no model tells whether it was trained before (pass `model=`)",
        ),
    ],
)
def test_a_loop_that_plans_several_epochs_holds_the_pace_of_a_trained_model(plan, loaded, known, pace, why):
    made = as_loaded(model()) if loaded else model()
    clipper = clipper_of(made, RunPlan(**plan), known=known)
    assert clipper.config.max_pace == pace
    assert clipper.config.max_threshold == (1.0 if why else None)
    assert (why in clipper.held_back) if why else (clipper.held_back == "")
    assert ("by the first epoch alone" in clipper.held_back) == (bool(why) and pace > 1)
    assert why in clipper.explain()
    assert ("where that is useful, by the first epoch alone: " in clipper.explain()) == (bool(why) and pace > 1)
    assert (clipper.config.settings.pace_start == 1) == (bool(why) and pace > 1)


def test_what_is_set_by_hand_stays():
    plan = RunPlan(epochs=4, steps=40)
    clipper = clipper_of(as_loaded(model()), plan, "adaptive:max_pace=8,max_threshold=5")
    assert (clipper.config.max_pace, clipper.config.max_threshold, clipper.held_back) == (8.0, 5.0, "")
    assert clipper_of(as_loaded(model()), plan, static_threshold=0.3).config.max_threshold == 0.3
    assert clipper_of(as_loaded(model()), plan, static_threshold=math.inf).config.max_threshold is None
    assert clipper_of(as_loaded(model()), plan, "zscore").config.max_threshold is None


def test_where_there_is_no_pace_none_is_held():
    made = as_loaded(model())
    clipper = AdaptiveClipper(
        optimizer=torch.optim.SGD(made.parameters(), lr=0.1), model=made, plan=RunPlan(steps=12, epochs=3)
    )
    assert clipper.held_back.startswith("There is no threshold above 1: ")
    assert "by the first epoch" not in clipper.explain()


def test_a_script_whose_threshold_is_above_the_limit_hears_of_it(caplog):
    accelerator = Accelerator(cpu=True)
    made = as_loaded(model())
    optimizer = torch.optim.AdamW(made.parameters())
    clipper = AdaptiveClipper(
        accelerator=accelerator, optimizer=optimizer, model=made, plan=RunPlan(epochs=3, steps=9), ledger=None
    )
    with clipper.install():
        made(input_ids=torch.ones(1, 4, dtype=torch.int64), labels=torch.ones(1, 4, dtype=torch.int64)).loss.backward()
        accelerator.clip_grad_norm_(made.parameters(), 5.0)
    assert "only clips" not in caplog.text
    assert "`max_norm` is 5, but no threshold is above `max_threshold`, 1. The pace goes by" in caplog.text


def test_a_static_threshold_above_the_limit_is_told(caplog):
    clipper = clipper_of(as_loaded(model()), RunPlan(epochs=3, steps=9))
    clipper.set_static_threshold(5.0)
    assert "the static threshold is 5, but no threshold is above `max_threshold`, 1. The pace goes by" in caplog.text


# -- by the first epoch alone --------------------------------------------------------------------------------------


class Falls(torch.nn.Module):
    """A loss that a higher rate brings down at once: the estimate grows and grows."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((4, 4), 100.0))
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]

    def forward(self):
        return self.weight.square().mean()


def paces(plan, steps, *, width=None, resume=None, saved=None, folder=None, at=None):
    made = Falls()
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-3, weight_decay=0.0)
    clipper = AdaptiveClipper(
        {"spectral_width": width, "agreement": False, "pace_start": 1}, optimizer=optimizer, model=made, plan=plan
    )
    if resume is not None:
        clipper.load_state(resume)
        made.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    found = []
    for step in range(clipper.step, steps):
        if step == at:
            clipper.save_state(folder)
            saved = copy.deepcopy((made.state_dict(), optimizer.state_dict()))
        loss = made()
        loss.backward()
        clipper.clip_(made.parameters(), loss=loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(clipper.metrics()["clip/pace"])
    return found, saved


@pytest.mark.parametrize("epoch", [5, 10])
def test_the_pace_goes_by_what_was_seen_for_the_first_time(lane, epoch):
    free, _ = paces(RunPlan(epochs=2, epoch_steps=30), 60)  # two are no several
    held, _ = paces(RunPlan(epochs=60 / epoch, epoch_steps=epoch), 60)
    assert free[-1] == 64.0
    assert held[:epoch] == free[:epoch]
    assert max(held) < 16.0


def test_an_estimate_that_comes_one_step_late_counts_for_the_step_that_made_it(lane, monkeypatch):
    told, held = [], FreshData.held

    def hears(self, reach, step, ops):
        told.append((step, float(reach)))
        return held(self, reach, step, ops)

    monkeypatch.setattr(FreshData, "held", hears)
    paces(RunPlan(epochs=6, epoch_steps=10), 12, width=0.0)
    assert [step for step, _ in told] == [0, *range(11)]
    assert told[11][1] > told[10][1] > 0


@pytest.mark.parametrize("at", [3, 20, 33])
def test_so_it_does_after_a_resumption_whatever_is_planned_then(lane, tmp_path, at):
    plan = RunPlan(epochs=3, epoch_steps=20)
    whole, saved = paces(plan, 60, folder=tmp_path, at=at)
    for then in (plan, None, RunPlan(epochs=1, steps=60)):
        given = RunPlan(checkpoint=tmp_path) if then is None else dataclasses.replace(then, checkpoint=tmp_path)
        rest, _ = paces(given, 60, resume=tmp_path, saved=saved)
        assert rest == whole[at:]


def test_a_run_of_one_epoch_that_goes_on_for_several_keeps_its_pace(tmp_path):
    whole, saved = paces(RunPlan(epochs=1, epoch_steps=60), 60, folder=tmp_path, at=20)
    rest, _ = paces(RunPlan(epochs=4, epoch_steps=20, checkpoint=tmp_path), 60, resume=tmp_path, saved=saved)
    assert rest == whole[20:]


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


@pytest.mark.parametrize("given", [100, {"steps": 100}, "100"])
def test_a_plan_that_is_none_is_refused(given):
    optimizer = torch.optim.AdamW(model().parameters())
    with pytest.raises(ConfigError, match=r"`plan` must be a RunPlan, but is .* instead"):
        AdaptiveClipper(optimizer=optimizer, plan=given)


def test_a_folder_without_a_state_is_named(tmp_path, caplog):
    made = model()
    clipper = AdaptiveClipper(optimizer=torch.optim.AdamW(made.parameters()), model=made)
    assert not clipper.load_state(tmp_path / "mistyped")
    assert "mistyped has no clip_state.safetensors" in caplog.text
