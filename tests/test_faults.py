"""Faults, planted in a plain loop and seen handled."""

import json
import math
import random

import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, ConfigError, LedgerError, NonFiniteGradientError
from hf_adaclip.audit import verify_ledger
from tests.loops import make, train, weights

CONFIG = AdaptiveClipConfig(warmup_observations=20, ceiling_share=1.0)
CONTROLLERS = ["adaptive", "static", "percentile", "zscore", "ema_ratio"]


def clip_with(clipper):
    return lambda model, loss: clipper.clip_(model.parameters(), loss=loss)


@pytest.mark.slow
@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_one_percent_of_bad_steps_are_left_out_and_the_rest_is_the_run_without_them(lane, controller, granularity):
    chosen = sorted(random.Random(3).sample(range(300), 3))
    faults = dict(zip(chosen, (float("nan"), float("inf"), -float("inf")), strict=True))
    # A pace above 1 backs off after such a step, which is meant.
    alone = {"max_pace": 1.0} if controller == "adaptive" else {}
    config = CONFIG.replace(controller=controller, granularity=granularity, **alone)
    model, optimizer = make()
    clipper = AdaptiveClipper(config, optimizer=optimizer)
    train(model, optimizer, clip_with(clipper), 300, factors=faults)
    clipper.close()

    other, other_optimizer = make()
    reference = AdaptiveClipper(config, optimizer=other_optimizer)
    for step in range(300):
        if step not in faults:
            train(other, other_optimizer, clip_with(reference), 1, start=step)

    assert torch.equal(weights(model), weights(other))
    assert clipper.statistics.skipped == 3


@pytest.mark.parametrize(
    "bad", [[0], [0, 1, 2], [5], [18, 19, 20, 21]], ids=["first", "first three", "warm-up", "edge"]
)
def test_bad_steps_at_the_start_and_in_the_warm_up_teach_nothing(lane, bad):
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer)
    train(model, optimizer, clip_with(clipper), 60, factors=dict.fromkeys(bad, float("nan")))
    clipper.close()

    assert float(clipper.state["count"]) == 60 - len(bad)
    assert math.isfinite(float(clipper.state["level"]))
    assert clipper.statistics.counts_by_name()["WARMUP"] == 20
    assert weights(model).isfinite().all()


def test_the_error_after_many_bad_steps_names_the_last_good_checkpoint(tmp_path):
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG.replace(max_consecutive_nonfinite=6, ring_capacity=8), optimizer=optimizer)
    train(model, optimizer, clip_with(clipper), 10)
    (tmp_path / "step-10").mkdir()
    clipper.save_state(tmp_path / "step-10")
    good = weights(model)
    with pytest.raises(NonFiniteGradientError, match=r"learning rate.*; then resume from .*step-10\.") as caught:
        train(model, optimizer, clip_with(clipper), 30, start=10, factors=dict.fromkeys(range(10, 40), float("nan")))

    assert caught.value.checkpoint == str(tmp_path / "step-10")
    assert caught.value.step >= 15
    assert torch.equal(weights(model), good)


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_gradients_of_zero_and_a_constant_loss_change_nothing_and_break_nothing(lane, controller, tmp_path):
    model, optimizer = make(weight_decay=0.0)
    clipper = AdaptiveClipper(
        CONFIG.replace(controller=controller, max_pace=3.0 if controller == "adaptive" else 1.0),
        optimizer=optimizer,
        ledger=tmp_path / "l.jsonl",
    )
    before = weights(model)
    for _ in range(60):
        (sum(p.sum() for p in model.parameters()) * 0.0).backward()
        assert float(clipper.clip_(model.parameters(), loss=torch.tensor(1.5))) == 0.0
        optimizer.step()
        optimizer.zero_grad()
    train(model, optimizer, clip_with(clipper), 60)
    clipper.close()

    assert not torch.equal(before, weights(model))
    assert weights(model).isfinite().all()
    assert clipper.statistics.skipped == 0
    assert verify_ledger(tmp_path / "l.jsonl").ok


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_a_gradient_of_1e30_in_every_controller(lane, controller):
    """Its square overflows float32, so it counts as infinite, and the step is left out."""
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG.replace(controller=controller), optimizer=optimizer)
    train(model, optimizer, clip_with(clipper), 60, factors={10: 1e30, 40: 1e30})
    clipper.close()

    assert weights(model).isfinite().all()
    assert clipper.statistics.skipped == 2


def test_no_parameter_and_no_gradient_are_errors_that_say_what_to_do():
    model, _ = make()
    clipper = AdaptiveClipper("adaptive")
    with pytest.raises(ConfigError, match="must hold at least one tensor, but is empty"):
        clipper.clip_([])
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ConfigError, match="must be trainable, but all of them are frozen"):
        clipper.clip_(model.parameters())
    assert clipper.step == 0


class FullDisk:
    """A file that takes no more bytes from some moment on."""

    def __init__(self, file):
        self._file = file
        self.full = False

    def write(self, data):
        if self.full:
            raise OSError(28, "No space left on device")
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.mark.parametrize("required", [False, True])
def test_a_full_disk_stops_a_run_only_when_the_ledger_is_required(tmp_path, caplog, required):
    model, optimizer = make()
    config = CONFIG.replace(ledger_required=required, ring_capacity=10)
    clipper = AdaptiveClipper(config, optimizer=optimizer, ledger=tmp_path / "l.jsonl")
    train(model, optimizer, clip_with(clipper), 15)
    ledger = clipper._run.recorder.ledger
    ledger._file = FullDisk(ledger._file)
    ledger._file.full = True
    if required:
        with pytest.raises(LedgerError, match=r"under `ledger_required`.*No space left"):
            train(model, optimizer, clip_with(clipper), 15, start=15)
        return
    before = weights(model)
    train(model, optimizer, clip_with(clipper), 15, start=15)
    ledger._file.full = False
    train(model, optimizer, clip_with(clipper), 20, start=30)
    clipper.close()

    assert not torch.equal(before, weights(model))
    assert sum("could not be written" in r.message for r in caplog.records) == 1
    steps = [
        json.loads(x).get("step") for x in (tmp_path / "l.jsonl").read_text().splitlines() if '"kind":"step"' in x
    ]
    assert set(range(50)) > set(steps)
    report = verify_ledger(tmp_path / "l.jsonl")
    assert report.num_violations == 0, report.findings
    assert (report.steps, report.recomputed, report.lost) == (len(steps), len(steps), 50 - len(steps))
    assert any(
        f"gap: {report.lost} step(s) from step 10 could not be written (ENOSPC: No space" in str(f)
        for f in report.findings
    )
    assert f"verified but for {report.lost} step(s) that could not be written" in report.summary()
    assert "ended cleanly" not in report.summary()
