"""Alerts of W&B and trackio: where they are reporters, seldom, and never at the cost of the training."""

import sys
import types
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_adaclip.integrations.telling import EVERY, Reporters
from tests.integrations.test_incidents import Ours
from tests.integrations.trainers import arguments, build, run

pytestmark = pytest.mark.slow


def fake_wandb(monkeypatch, *, run=True, error=None):
    sent: list[dict[str, Any]] = []
    module: Any = types.ModuleType("wandb")
    module.run = object() if run else None

    def alert(**given):
        sent.append(given)
        if error is not None:
            raise error

    module.alert = alert
    monkeypatch.setitem(sys.modules, "wandb", module)
    return sent


class WandbCallback(TrainerCallback):
    """What is known by its name, as transformers' own is."""


def trained(folder, factor=float("nan"), **clip):
    trainer = build(Ours, folder, args=arguments(folder), callbacks=[WandbCallback()], clip=clip or "adaptive")
    trainer.factor = factor
    run(trainer)
    return trainer


def test_an_incident_is_an_alert_of_wandb(tmp_path, monkeypatch):
    sent = fake_wandb(monkeypatch)
    trained(tmp_path)
    [alert] = sent
    assert alert["title"] == "Adaptive clipping: nonfinite"
    assert alert["level"] == "ERROR"
    assert alert["text"].startswith("Step 30: The norm is NaN")
    assert f"hf-adaclip incident {tmp_path} 30" in alert["text"]


def test_without_incidents_events_are_alerts(tmp_path, monkeypatch):
    sent = fake_wandb(monkeypatch)
    trained(tmp_path, incidents=False)
    assert [alert["title"] for alert in sent] == ["Adaptive clipping: skipped"]
    assert "left out" in sent[0]["text"]


def test_a_reporter_that_fails_or_has_no_run_ends_nothing(tmp_path, monkeypatch, caplog):
    sent = fake_wandb(monkeypatch, error=ConnectionError("no route"))
    trainer = trained(tmp_path / "a")
    assert trainer.state.global_step == 40
    assert len(sent) == 1
    assert "wandb got no alert (ConnectionError: no route). Training goes on." in caplog.text
    assert len(trainer.clipper.incidents) == 1

    sent = fake_wandb(monkeypatch, run=False)
    trained(tmp_path / "b")
    assert sent == []
    monkeypatch.delitem(sys.modules, "wandb")
    trained(tmp_path / "c")


def test_who_is_no_reporter_gets_none(tmp_path, monkeypatch):
    sent = fake_wandb(monkeypatch)
    trainer = build(Ours, tmp_path)
    run(trainer)
    assert len(trainer.clipper.incidents) == 1
    assert sent == []


def test_of_a_kind_there_is_one_in_a_hundred_steps(monkeypatch):
    sent = fake_wandb(monkeypatch)
    reporters = Reporters(lambda: {"wandb", "tensorboard"}, pytest.fail)
    for step in range(0, 2 * EVERY + 1, 10):
        reporters.alert(step, "spike", "high.")
    reporters.alert(5, "nonfinite", "NaN.")
    assert [alert["text"].partition(":")[0] for alert in sent] == ["Step 0", "Step 100", "Step 200", "Step 5"]
    assert "9 more of this kind" in sent[1]["text"]
    assert [alert["level"] for alert in sent] == ["WARN"] * 3 + ["ERROR"]


def test_the_real_trackio_stores_it(tmp_path, monkeypatch):
    trackio: Any = pytest.importorskip("trackio")
    if not hasattr(trackio, "alert"):
        pytest.skip("a trackio without alerts")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    real, sent = trackio.alert, []

    def alert(**given):
        real(**given)
        sent.append(given)

    monkeypatch.setattr(trackio, "alert", alert)
    run_of_it = trackio.init(project="adaclip", embed=False)
    try:
        said: list[str] = []
        Reporters(lambda: {"trackio"}, said.append).alert(3, "divergence", "The loss has risen.")
        assert said == []
        assert (sent[0]["title"], sent[0]["level"]) == ("Adaptive clipping: divergence", trackio.AlertLevel.ERROR)
    finally:
        run_of_it.finish()
    said = []
    Reporters(lambda: {"trackio"}, said.append).alert(3, "divergence", "The loss has risen.")
    assert len(said) <= 1  # without a run it raises, and that is only said
