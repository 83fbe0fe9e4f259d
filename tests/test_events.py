"""Events: complete, in order, the same live as from the ledger; and whom they reach."""

import json
import logging

import pytest
import torch
from transformers import TrainerCallback

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, AdaptiveClipTrainer
from hf_adaclip.controllers import Reason
from hf_adaclip.report.run_report import load_run
from hf_adaclip.run.alerts import Alerts
from hf_adaclip.run.counts import TEXT_METRICS, for_reporters
from hf_adaclip.run.events import ClipEvent, EventTracker
from tests.integrations.test_trainer import AdaptiveSpikeTrainer
from tests.integrations.trainers import arguments, build, run
from tests.loops import make, train

CONFIG = AdaptiveClipConfig(warmup_observations=20, ceiling_share=1.0, max_pace=3.0)
FAULTS = {40: 100.0, 60: float("nan"), 61: float("nan"), 62: 1.0}


def run_with_listener(path, config=CONFIG, steps=100, faults=None):
    model, optimizer = make()
    clipper = AdaptiveClipper(config, optimizer=optimizer, ledger=path)
    heard: list[ClipEvent] = []
    clipper.on_event(heard.append)
    train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), steps, factors=faults or FAULTS)
    clipper.close()
    return heard


def test_every_adjustment_is_an_event_with_step_before_after_and_reason(tmp_path):
    heard = run_with_listener(tmp_path / "l.jsonl", CONFIG.replace(max_edge=1.9, static_threshold=1e3))
    kinds = [e.kind for e in heard]
    spike = next(e for e in heard if e.kind == "spike" and e.step == 40)
    skipped = next(e for e in heard if e.kind == "skipped")
    raised = next(e for e in heard if e.kind == "pace_raised")
    lowered = next(e for e in heard if e.kind == "pace_lowered")

    assert {"widened", "tightened", "spike", "skipped", "pace_raised", "pace_lowered"} <= set(kinds)
    assert spike.quantity == "norm"
    assert spike.before > 20 * spike.after
    assert spike.reason == Reason.SPIKE.sentence
    assert (skipped.step, skipped.until) == (60, 61)
    assert raised.before == pytest.approx(1 / 50)
    assert raised.before < raised.after
    assert lowered.after < lowered.before
    tightened = next(e for e in heard if e.kind == "tightened" and e.step > 40)
    assert tightened.step == 41
    assert tightened.after < tightened.before
    assert str(skipped).startswith("steps 60-61: skipped")


def test_live_events_are_those_of_the_ledger(tmp_path):
    heard = run_with_listener(tmp_path / "l.jsonl", CONFIG.replace(ring_capacity=7))

    assert sorted(map(str, load_run(tmp_path / "l.jsonl").events)) == sorted(map(str, heard))


def test_a_run_of_the_same_adjustment_is_one_event():
    tracker = EventTracker()
    row = {"norm": 1.0, "threshold": 2.0, "coefficient": 1.0, "pace": 1.0}
    events = [e for s in range(50) for e in tracker.feed(s, {**row, "threshold": 2.0 + s}, Reason.WIDENED)]
    events += list(tracker.finish())

    assert [(e.kind, e.step, e.until, e.before, e.after) for e in events] == [("widened", 0, 49, 2.0, 51.0)]


def test_reaching_the_largest_pace_is_an_event(tmp_path):
    config = CONFIG.replace(max_pace=1.1, warmup_observations=10)
    limits = [e for e in run_with_listener(tmp_path / "l.jsonl", config) if "`max_pace`" in e.reason]

    assert limits
    assert limits[0].kind == "limit"
    assert limits[0].after == pytest.approx(1.1)
    assert [str(e) for e in load_run(tmp_path / "l.jsonl").events if "`max_pace`" in e.reason] == [
        str(e) for e in limits
    ]


def test_alarming_events_are_warned_of_once(tmp_path, caplog):
    bad = {s: float("nan") for s in range(30, 60, 3)}
    with caplog.at_level(logging.WARNING):
        run_with_listener(tmp_path / "l.jsonl", CONFIG.replace(max_threshold=0.5, max_skipped=4), faults=bad)
    texts = [r.message for r in caplog.records]

    assert len([t for t in texts if "skipped" in t and "NaN or infinite" in t]) == 1
    assert len([t for t in texts if "ceiling holds" in t]) == 1
    assert len([t for t in texts if "trouble" in t and "`max_skipped`" in t]) == 1


class Pager(TrainerCallback):
    def __init__(self):
        self.pages = []

    def on_clip_event(self, args, state, control, event=None):
        self.pages.append((state.global_step, event.kind, event.step))


def test_trainer_callbacks_are_called_and_others_left_alone(tmp_path):
    pager = Pager()
    trainer = build(AdaptiveSpikeTrainer, tmp_path, callbacks=[pager], clip=AdaptiveClipConfig(warmup_observations=10))
    run(trainer)

    assert (31, "spike", 30) in pager.pages


@pytest.mark.parametrize("policy", ["stop", "fallback", "continue"])
def test_policies_in_the_trainer(tmp_path, policy):
    class NanTrainer(AdaptiveSpikeTrainer):
        factor = float("nan")

    config = AdaptiveClipConfig(warmup_observations=10, max_skipped=0, on_trouble=policy)
    trainer = build(NanTrainer, tmp_path, args=arguments(tmp_path, logging_steps=5, max_steps=60), clip=config)
    run(trainer)
    reasons = [json.loads(line).get("reason") for line in (tmp_path / "clip_ledger.jsonl").read_text().splitlines()]

    assert reasons.count("TROUBLE_BUDGET") == 1
    assert torch.isfinite(torch.cat([p.flatten() for p in trainer.model.parameters()])).all()
    if policy == "stop":
        assert trainer.state.global_step == 32  # the step after the one that was found
        assert (tmp_path / "checkpoint-32/clip_state.safetensors").is_file()
    else:
        assert trainer.state.global_step == 60
        assert ("FALLBACK" in reasons) == (policy == "fallback")


def test_shadow_is_the_stock_trainer_bit_for_bit(tmp_path):
    from tests.integrations.trainers import stock, weights

    config = AdaptiveClipConfig(warmup_observations=10, shadow=True, max_pace=3.0, max_threshold=0.1)
    a, b = stock(tmp_path / "a"), build(AdaptiveClipTrainer, tmp_path / "b", clip=config)
    run(a)
    run(b)

    assert torch.equal(weights(a), weights(b))
    assert b.clipper.statistics.counts_by_name()["LIMIT_CEILING"] > 0


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def spike(step, kind="spike"):
    return ClipEvent(step, step, kind, 500.0, 1.0, "The norm left the range upward.", "norm", "SPIKE", "Done.")


@pytest.mark.parametrize("kind", ["spike", "skipped"])
def test_a_spike_is_warned_of_at_most_once_a_minute_with_the_number_since(caplog, kind):
    clock = Clock()
    alerts = Alerts(clock)
    with caplog.at_level(logging.WARNING):
        for step in range(100):
            clock.now = step * 1.5  # two and a half minutes
            alerts.tell([spike(step, kind)])
    texts = [r.message for r in caplog.records]

    assert len(texts) == 3
    assert "step 0" in texts[0]
    assert "norm 500, cut to 1" in texts[0]
    assert [("39 other" in t) for t in texts] == [False, True, True]


def test_a_spike_between_two_log_lines_is_in_the_log_and_in_the_metrics(caplog):
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG.replace(max_pace=1.0), optimizer=optimizer)
    with caplog.at_level(logging.WARNING):
        train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), 50, factors={40: 500.0})
        first = clipper.metrics()
        train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), 10, start=50)
        second = clipper.metrics()

    assert first["clip/norm_max"] > 50 * second["clip/norm_max"]
    assert first["clip/coefficient"] < 0.05
    assert (first["clip/spikes"], first["clip/spikes_total"]) == (1, 1)
    assert (second["clip/spikes"], second["clip/spikes_total"]) == (0, 1)
    assert second["clip/coefficient"] > 10 * first["clip/coefficient"]
    assert clipper.metrics() == second  # no step since: the last window again
    assert len([r for r in caplog.records if "step 40: spike" in r.message]) == 1


@pytest.mark.parametrize(
    "controller", ["static", "zscore", "percentile", "median", "quantile", "log_zscore", "adaptive"]
)
@pytest.mark.parametrize("step", [15, 45])  # in the warm-up and after it
def test_a_spike_is_seen_under_every_controller(controller, step):
    model, optimizer = make()
    clipper = AdaptiveClipper(AdaptiveClipConfig(controller=controller, warmup_observations=20), optimizer=optimizer)
    train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), 60, factors={step: 500.0})

    assert clipper.metrics()["clip/spikes_total"] == 1


@pytest.mark.parametrize("controller", ["static", "guard", "rl"])
def test_steps_without_a_gradient_make_no_spikes_of_the_others(controller):
    model, optimizer = make()
    clipper = AdaptiveClipper(controller, optimizer=optimizer)
    zeros = {step: 0.0 for step in range(150) if step % 5 < 3}
    train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), 150, factors=zeros)

    assert clipper.metrics()["clip/spikes_total"] == 0


def test_skipped_steps_are_counted_by_window_and_in_all(tmp_path):
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer)
    clip = lambda m, loss: clipper.clip_(m.parameters(), loss=loss)  # noqa: E731
    train(model, optimizer, clip, 30, factors={5: float("nan"), 6: float("nan")})
    first = clipper.metrics()
    train(model, optimizer, clip, 10, start=30, factors={33: float("inf")})
    second = clipper.metrics()
    train(model, optimizer, clip, 1, start=40, factors={40: float("nan")})
    third = clipper.metrics()

    assert (first["clip/skipped"], first["clip/skipped_total"]) == (2, 2)
    assert (second["clip/skipped"], second["clip/skipped_total"]) == (1, 3)
    assert third["clip/phase"] == "skipped"
    assert third["clip/norm_max"] != third["clip/norm_max"]
    assert all(isinstance(v, int | float) for k, v in second.items() if k not in TEXT_METRICS)
    clipper.save_state(tmp_path)
    again = AdaptiveClipper(CONFIG, optimizer=optimizer)
    assert again.load_state(tmp_path)
    train(model, optimizer, lambda m, loss: again.clip_(m.parameters(), loss=loss), 1, start=41)
    assert again.metrics()["clip/skipped_total"] == 4


def test_words_are_kept_from_those_who_take_only_numbers():
    mlflow, other = type("MLflowCallback", (), {}), type("TensorBoardCallback", (), {})
    heir = type("MyMLflow", (mlflow,), {})
    metrics = {"clip/phase": "stable", "clip/phase_id": 1}

    assert for_reporters(metrics, [other()]) == metrics
    assert for_reporters(metrics, [other(), mlflow()]) == {"clip/phase_id": 1}
    assert for_reporters(metrics, [heir()]) == {"clip/phase_id": 1}


def test_those_who_take_only_numbers_are_called_so_in_transformers():
    from transformers.integrations import integration_utils

    from hf_adaclip.run.counts import _NUMBERS_ONLY

    assert all(hasattr(integration_utils, name) for name in _NUMBERS_ONLY)


def test_a_listener_that_raises_ends_nothing_and_is_called_again(tmp_path, caplog):
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG, optimizer=optimizer)
    heard: list[ClipEvent] = []
    calls: list[ClipEvent] = []

    def broken(event):
        calls.append(event)
        raise RuntimeError("the pager is down")

    clipper.on_event(broken)
    clipper.on_event(heard.append)
    train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), 100, factors=FAULTS)
    clipper.close()
    tracebacks = [r for r in caplog.records if r.exc_info]

    assert len(calls) == len(heard) > 5
    assert len(tracebacks) == 1
    assert "the pager is down" in str(tracebacks[0].exc_info[1])


def test_a_norm_and_a_threshold_never_share_a_column(tmp_path):
    heard = run_with_listener(tmp_path / "l.jsonl", CONFIG.replace(max_edge=1.9, static_threshold=1e3))

    assert {(e.kind, e.quantity) for e in heard} <= {
        *((k, "norm") for k in ("spike", "held", "clipped", "skipped", "vanishing")),
        *((k, "threshold") for k in ("widened", "tightened", "new_level")),
        *((k, "pace") for k in ("departed", "pace_raised", "pace_lowered", "limit")),
    }
    skipped = next(e for e in heard if e.kind == "skipped")
    assert skipped.change == "norm nan, left out"
    assert " 1 -> 1. " not in " ".join(map(str, heard))
