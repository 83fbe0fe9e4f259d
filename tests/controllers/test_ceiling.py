"""The static threshold as ceiling of the range: kept where it cut most of the warm-up, and nowhere else."""

import numpy as np
import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.audit import verify_ledger
from hf_adaclip.controllers import Observation, Reason, build_controller
from hf_adaclip.controllers.numerics.ops import SCALAR
from hf_adaclip.gauntlet.verdict import CALM_LEVEL, NOISES
from hf_adaclip.run.events import ClipEvent
from tests.loops import make, train, weights

WARMUP = 20


def decide(norms, static, losses=None, **settings):
    """All decisions on a series of norms: thresholds, coefficients, reasons."""
    losses = np.full(len(norms), np.nan) if losses is None else losses
    config = AdaptiveClipConfig(warmup_observations=WARMUP, **settings)
    controller = build_controller(config)
    state, decisions = controller.init(SCALAR, ()), []
    for norm, loss in zip(norms, losses, strict=True):
        observation = Observation(np.float32(norm), np.float32(loss), np.float32(static))
        with np.errstate(invalid="ignore"):
            decision, state = controller.update(state, observation)
        decisions.append((decision.threshold, decision.coefficient, Reason(int(decision.reason)).name))
    thresholds, coefficients, reasons = zip(*decisions, strict=True)
    return np.array(thresholds), np.array(coefficients), np.array(reasons)


@pytest.fixture
def norms():
    return CALM_LEVEL * np.exp(NOISES["normal"](np.random.default_rng(0), 200))


def test_a_run_that_the_static_threshold_always_cuts_is_left_as_it_is(norms):
    """Bit for bit what `static` does: at the level, in a spike, in a lasting rise."""
    norms[100] *= 50
    norms[150:] *= 3
    thresholds, coefficients, reasons = decide(norms, CALM_LEVEL / 3)
    assert np.array_equal(coefficients, decide(norms, CALM_LEVEL / 3, controller="static")[1])
    assert (thresholds == np.float32(CALM_LEVEL / 3)).all()
    assert reasons[100] == "SPIKE"
    assert set(reasons[WARMUP:100]) == {"HELD"}


def test_below_the_ceiling_the_range_goes_on_guarding(norms):
    norms[60:] *= 0.05
    norms[100] = CALM_LEVEL / 4  # five times the level by then, and still below the ceiling
    thresholds, coefficients, reasons = decide(norms, CALM_LEVEL / 3)
    assert thresholds[40] == np.float32(CALM_LEVEL / 3)
    assert reasons[100] == "SPIKE"
    assert norms[100] * coefficients[100] < 1.5 * 0.05 * CALM_LEVEL


def test_once_it_hardly_acts_the_ceiling_is_given_up_for_good(norms):
    """Norms that fall from far above the static threshold, as from scratch, to far below, and much later rise for good."""
    norms = np.concatenate([norms, norms, norms])
    norms[:60] *= 10
    norms[400:] *= 4
    progress = 5 * np.exp(-np.arange(600) / 200)
    thresholds, coefficients, reasons = decide(norms, 2 * CALM_LEVEL, progress)
    assert thresholds[50] == np.float32(2 * CALM_LEVEL)
    assert "HELD" in reasons[WARMUP:60]
    assert "HELD" not in reasons[60:400]
    assert (coefficients[460:] == 1).all()
    assert decide(norms, 2 * CALM_LEVEL, progress, ceiling_share=0.0)[1][460:].max() < 1, "with 0 it never is"
    assert decide(norms, 2 * CALM_LEVEL)[1][410:].max() < 1, "nor does the range follow where nothing speaks for it"


def test_a_threshold_that_guards_only_is_given_up_after_the_warm_up(norms):
    norms[150:] *= 1.7
    losses = 5 * np.exp(-np.arange(200) / 200)
    found = decide(norms, 2 * CALM_LEVEL, losses)
    assert found[0][170:].min() > 2 * CALM_LEVEL
    assert (found[1][180:] == 1).all()


@pytest.mark.parametrize(
    ("cut", "share", "held"), [(10, 0.5, False), (11, 0.5, True), (1, 0.0, True), (0, 0.0, False), (20, 1.0, False)]
)
def test_how_much_of_the_warm_up_counts_as_most(norms, cut, share, held):
    norms[:WARMUP] = np.where(np.arange(WARMUP) < cut, 1.3, 0.9) * CALM_LEVEL
    norms = np.insert(norms, 5, [np.nan, np.inf, 0.0])  # these are no observations
    thresholds, _, _ = decide(norms, 1.1 * CALM_LEVEL, ceiling_share=share)
    assert (thresholds[WARMUP + 3 :].max() <= np.float32(1.1 * CALM_LEVEL)) == held


def test_under_the_ceiling_spikes_are_skipped_and_the_rest_is_clipped(norms):
    norms[100] *= 50
    _, coefficients, reasons = decide(norms, CALM_LEVEL / 3, on_spike="skip")
    assert np.flatnonzero(coefficients == 0).tolist() == [100] == np.flatnonzero(reasons == "SKIPPED").tolist()
    assert (coefficients < 1).all()


WRAPPED = [
    {"one_step_late": True},
    {"freeze_after": 60},
    {"max_widening_step": 1.5, "max_widening_100": 2.0},
    {"min_threshold": 1e-3, "max_threshold": 10.0},
    {"divergence_spreads": 5.0, "on_trouble": "fallback"},
]


@pytest.mark.parametrize("settings", WRAPPED, ids=lambda s: "-".join(s))
def test_the_ceiling_holds_under_every_limit(norms, settings):
    norms[100] *= 50
    _, coefficients, reasons = decide(norms, CALM_LEVEL / 3, **settings)
    assert np.array_equal(coefficients, decide(norms, CALM_LEVEL / 3, controller="static")[1])
    assert reasons[40] == "HELD"


def test_a_ceiling_is_one_for_the_global_norm():
    assert AdaptiveClipConfig().resolved().to_dict()["ceiling_share"] == 0.5
    assert AdaptiveClipConfig(granularity="tensor").resolved().to_dict()["ceiling_share"] == 1.0


def steps_under_a_ceiling(clipper, model, optimizer, count, start=0):
    train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), count, start=start)


def test_it_is_said_once_recorded_and_verified(tmp_path, caplog):
    model, optimizer = make()
    config = AdaptiveClipConfig(warmup_observations=WARMUP, static_threshold=1e-3, ledger=str(tmp_path / "l.jsonl"))
    clipper = AdaptiveClipper(config, optimizer=optimizer)
    heard: list[ClipEvent] = []
    clipper.on_event(heard.append)
    with caplog.at_level("INFO", logger="hf_adaclip"):
        steps_under_a_ceiling(clipper, model, optimizer, WARMUP)
        assert "if it cuts more than 50% of the warm-up" in clipper.explain()
        assert "the range follows norms only while the loss makes progress" in clipper.explain()
        steps_under_a_ceiling(clipper, model, optimizer, 40, start=WARMUP)
        ceiling = "the static threshold 0.001, which cut more than 50% of the warm-up, until it cuts less than 10%"
        assert f"ceiling     {ceiling}" in clipper.explain()
        clipper.close()
    assert [e.kind for e in heard if e.step == WARMUP] == ["held"]
    assert [e.kind for e in heard].count("held") == 1
    assert "widened" not in {e.kind for e in heard}
    assert [r.levelname for r in caplog.records if "held" in r.getMessage()] == ["INFO"]
    assert clipper.statistics.counts_by_name()["HELD"] > 30
    report = verify_ledger(tmp_path / "l.jsonl")
    assert report.ok, report.findings


@pytest.mark.parametrize("stop", [WARMUP // 2, WARMUP, WARMUP + 1, 40])
def test_a_resumed_run_goes_on_under_the_same_ceiling(tmp_path, stop):
    config = AdaptiveClipConfig(warmup_observations=WARMUP, static_threshold=1e-3)
    model, optimizer = make()
    whole = AdaptiveClipper(config, optimizer=optimizer)
    steps_under_a_ceiling(whole, model, optimizer, 60)
    expected = weights(model)

    model, optimizer = make()
    first = AdaptiveClipper(config, optimizer=optimizer)
    steps_under_a_ceiling(first, model, optimizer, stop)
    first.save_state(tmp_path)
    second = AdaptiveClipper(config, optimizer=optimizer)
    assert second.load_state(tmp_path)
    steps_under_a_ceiling(second, model, optimizer, 60 - stop, start=stop)
    assert torch.equal(expected, weights(model))
    assert "which cut more than 50% of the warm-up" in second.explain()


def test_shadow_clips_as_the_stock_trainer_and_says_what_would_be(tmp_path):
    model, optimizer = make()
    config = AdaptiveClipConfig(
        warmup_observations=WARMUP, static_threshold=1e-3, shadow=True, ledger=str(tmp_path / "l.jsonl")
    )
    with AdaptiveClipper(config, optimizer=optimizer) as clipper:
        steps_under_a_ceiling(clipper, model, optimizer, 40)
    assert clipper.statistics.counts_by_name()["HELD"] > 10
    assert verify_ledger(tmp_path / "l.jsonl").ok
