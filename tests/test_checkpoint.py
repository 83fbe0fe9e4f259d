"""A state is taken only if it belongs to its checkpoint and holds what a run can have; else the error names file, field and way out."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, StateError
from hf_adaclip.controllers import CONTROLLERS, build_controller
from hf_adaclip.controllers.numerics.ops import SCALAR
from hf_adaclip.ledger.records import new_fields
from tests.loops import make, train, weights

NAME = "clip_state.safetensors"
CONFIG = AdaptiveClipConfig(warmup_observations=10, ceiling_share=1.0)
LIMITS = CONFIG.replace(max_threshold=50.0, divergence_spreads=3.0)


def write(folder, config=CONFIG, steps=30, trainer_step=None, name=None):
    model, optimizer = make()
    clipper = AdaptiveClipper(config, optimizer=optimizer)
    train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), steps)
    folder = folder / (name or f"checkpoint-{steps}")
    folder.mkdir(parents=True)
    clipper.save_state(folder)
    if trainer_step is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": trainer_step}))
    return folder


def load(folder, config=CONFIG, steps=0):
    model, optimizer = make()
    clipper = AdaptiveClipper(config, optimizer=optimizer)
    clipper.load_state(folder)
    train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), steps, start=30)
    return clipper, model


def change(folder, tensors=None, drop=(), **metadata):
    path = folder / NAME
    with safe_open(path, "pt") as file:
        text, found = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a mapping
    found = {k: v for k, v in found.items() if k not in drop} | (tensors or {})
    text["metadata"] = json.dumps({**json.loads(text["metadata"]), **metadata})
    save_file(found, path, metadata=text)


def test_a_state_of_another_step_is_refused(tmp_path):
    folder = write(tmp_path, steps=70, trainer_step=70)
    other = write(tmp_path, steps=30)
    assert load(folder)[0].step == 70
    shutil.copy(other / NAME, folder / NAME)
    with pytest.raises(
        StateError, match=r"of the step of its checkpoint, 70 by trainer_state\.json, but .* is of step 30"
    ):
        load(folder)


def test_a_run_that_began_from_a_stock_checkpoint_counts_otherwise_and_resumes(tmp_path):
    """Its controller has seen 30 steps, its Trainer 530: the checkpoint is whole all the same."""
    folder = write(tmp_path, steps=30, trainer_step=530, name="checkpoint-530")
    assert load(folder)[0].step == 30


@pytest.mark.parametrize("text", ["{", '{"global_step": "x"}', "[]"])
def test_a_damaged_trainer_state_is_for_the_trainer_to_tell(tmp_path, text):
    folder = write(tmp_path)
    (folder / "trainer_state.json").write_text(text)
    assert load(folder)[0].step == 30


def test_folders_of_accelerate_say_no_step(tmp_path):
    assert load(write(tmp_path, name="epoch_0"))[0].step == 30


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_every_controller_takes_its_own_state_and_no_other(tmp_path, controller):
    config = CONFIG.replace(controller=controller, ceiling_share=0.5)
    folder = write(tmp_path, config)
    assert load(folder, config, steps=3)[0].step == 33
    begins = build_controller(config.resolved()).init(SCALAR, ())
    for name, like in zip(begins._fields, begins, strict=True):
        if name in ("loss_mean", "loss_spread", "loss_best"):
            continue  # not known, in a state of the first revision
        broken = torch.full(tuple(like.shape), float("nan"))
        change(folder, {name: broken})
        with pytest.raises(StateError, match=f"`{name}` must be a number, but is NaN"):
            load(folder, config)
        shutil.rmtree(folder)
        write(tmp_path, config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("level", "nan", "`level` must be a number, but is NaN"),
        ("level", "inf", "`level` must be finite, but is infinite"),
        ("level", "-1", "`level` must not be negative, but is -1"),
        ("spread", "-inf", "`spread` must be finite"),
        ("pace", "0", "`pace` must be above 0"),
        ("count", "2.5", "`count` counts, so it must be whole, but is 2.5"),
        ("count", "31", "`count` must be at most the 30 steps done, but is 31"),
        ("oversight_loss_spread", "-1", "`oversight_loss_spread` must not be negative"),
        ("oversight_edge", "nan", "`oversight_edge` must be a number"),
    ],
)
def test_values_that_no_run_can_have(tmp_path, field, value, message):
    folder = write(tmp_path, LIMITS)
    change(folder, {field: torch.tensor(float(value))})
    with pytest.raises(StateError, match=message) as caught:
        load(folder, LIMITS)
    assert str(folder / NAME) in str(caught.value)
    assert "delete the file to start the controller afresh" in str(caught.value)


@pytest.mark.parametrize("field", ["oversight_loss_mean", "oversight_loss_spread", "oversight_loss_best"])
def test_what_is_unknown_at_first_may_be_nan(tmp_path, field):
    folder = write(tmp_path, LIMITS)
    change(folder, {field: torch.tensor(float("nan"))})
    assert load(folder, LIMITS, steps=2)[0].step == 32


def test_a_state_by_tensor_is_checked_when_the_parameters_are_known(tmp_path):
    config = CONFIG.replace(granularity="tensor", parameter_rules={"*.bias": "static"})
    model, optimizer = make()
    clipper = AdaptiveClipper(config, optimizer=optimizer, model=model)
    train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), 5)
    clipper.save_state(tmp_path)
    with safe_open(tmp_path / NAME, "pt") as file:
        name = next(k for k in file.keys() if k.endswith("level"))  # noqa: SIM118 - not a mapping
        value = file.get_tensor(name)
    change(tmp_path, {name: value * float("nan")})
    model, optimizer = make()
    again = AdaptiveClipper(config, optimizer=optimizer, model=model)
    again.load_state(tmp_path)
    before = weights(model)
    with pytest.raises(StateError, match="must be a number, but is NaN"):
        train(model, optimizer, lambda m, loss: again.clip_(m.parameters(), loss=loss), 1)
    assert torch.equal(before, weights(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool])
def test_another_dtype_is_refused(tmp_path, dtype):
    folder = write(tmp_path)
    change(folder, {"level": torch.ones((), dtype=dtype)})
    with pytest.raises(StateError, match="`level` must be float32, but is"):
        load(folder)


def test_fields_too_many_and_too_few(tmp_path):
    folder = write(tmp_path)
    change(folder, {"evil": torch.ones(3)})
    with pytest.raises(StateError, match="`evil` is none of its fields"):
        load(folder)
    change(folder, drop=("evil", "width"))
    with pytest.raises(StateError, match="`width` is missing"):
        load(folder)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"step": "30"}, "`step` is '30'"),
        ({"step": -1}, "`step` is -1"),
        ({"step": 30.0}, "`step` is 30.0"),
        ({"step": True}, "`step` is True"),
        ({"step": 29}, "`step` is 29 and the counts by reason are of 30 steps"),
        ({"static_threshold": -1}, "`static_threshold` is -1"),
        ({"static_threshold": float("nan")}, "`static_threshold` is nan"),
        (
            {"statistics": {"counts": {"WARMUP": -1}, "clipped": 0, "skipped": 0, "consecutive_nonfinite": 0}},
            "`statistics` holds",
        ),
        ({"ledger": "x"}, "`ledger` is 'x'"),
        ({"revision": 99}, r"of revision \d of the rule or older, but .* is of 99"),
    ],
)
def test_metadata_that_no_run_writes(tmp_path, metadata, message):
    folder = write(tmp_path)
    change(folder, **metadata)
    with pytest.raises(StateError, match=message):
        load(folder)


def test_a_file_without_metadata_or_with_its_end_cut_off(tmp_path):
    folder = write(tmp_path)
    whole = (folder / NAME).read_bytes()
    for size in (0, 4, 8, 100, len(whole) - 1):
        (folder / NAME).write_bytes(whole[:size])
        with pytest.raises(StateError, match="is damaged"):
            load(folder)
    save_file({"level": torch.ones(())}, folder / NAME)
    with pytest.raises(StateError, match="must have schema 2, but"):
        load(folder)


def test_a_state_of_an_older_revision_takes_new_fields_from_the_beginning(tmp_path, monkeypatch):
    folder = write(tmp_path)
    change(folder, {"long_gone": torch.ones(())}, drop=("width",))
    kind = CONTROLLERS["adaptive"]
    monkeypatch.setattr(kind, "revision", kind.revision + 1)
    monkeypatch.setattr(kind, "new_fields", frozenset({"width"}))
    clipper, _ = load(folder, steps=1)
    assert clipper.step == 31
    assert "width" in new_fields(build_controller(LIMITS.resolved()))


def test_how_a_pace_moves_means_nothing_to_a_state_without_one(tmp_path):
    model, optimizer = make()
    clipper = AdaptiveClipper("guard:pace_growth=1.1", optimizer=optimizer)
    train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), 3)
    clipper.save_state(tmp_path)
    assert AdaptiveClipper("guard", optimizer=optimizer).load_state(tmp_path)
    with pytest.raises(StateError, match=r"`max_pace` was 1\.0 and is 64\.0"):
        AdaptiveClipper("adaptive", optimizer=optimizer).load_state(tmp_path)
