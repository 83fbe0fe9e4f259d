"""The stream gauntlet (tests/gauntlet.py): the bar that `adaptive` has to meet, and the known failures of the others."""

import numpy as np
import pytest

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers import Observation, build_controller
from hf_adaclip.controllers.numerics.ops import SCALAR
from hf_adaclip.gauntlet.trials import TRIALS, run_trials
from hf_adaclip.gauntlet.verdict import BURN_IN, CALM_LEVEL, NOISES, judge, run_stream

pytestmark = pytest.mark.slow

SEEDS = 24
# (altered when calm %, applied spike x calm level, steps to accept a lasting 3x rise, altered during decay %)
BARS = {"normal": (0.1, 1.35, 10, 0.1), "student": (0.5, 1.5, 10, 0.5)}


def controller(name, **settings):
    return AdaptiveClipConfig(controller=name, **settings).settings


@pytest.mark.parametrize("noise", NOISES)
def test_adaptive_meets_the_bar(noise):
    calm, spike, accept, decay = BARS[noise]
    verdict = judge(controller("adaptive"), noise, SEEDS)

    assert verdict.altered_calm <= calm
    assert verdict.first_spike <= spike
    assert verdict.second_spike <= spike
    assert verdict.accepted_after <= accept
    assert verdict.altered_decay <= decay


@pytest.mark.parametrize("skip", [False, True], ids=["clip", "skip"])
def test_adaptive_meets_the_bar_of_every_trial(skip):
    config = AdaptiveClipConfig(on_spike="skip" if skip else "clip")
    found = run_trials(build_controller(config), 4)
    assert {t.name: found[t.name] for t in TRIALS if not found[t.name] <= t.bar} == {}


def test_the_trials_find_the_faults_that_they_are_for():
    """A rule that follows whatever agrees, and one that knows one level only."""
    found = run_trials(controller("quantile"), 2)
    assert found["growth 5% a step"] > 1e6
    assert run_trials(controller("zscore"), 2)["a source of 10%"] > 50


def test_the_card_is_generated():
    from scripts.docs.gauntlet_card import FOLDER, card

    assert (FOLDER / "README.md").read_text(encoding="utf-8") == card()


@pytest.mark.parametrize("noise", NOISES)
def test_adaptive_stops_clipping_a_lasting_rise_and_stays_stopped(noise):
    """Stricter than the bar: between 10 and 60 steps after a 3x rise hardly a step is altered that the static threshold would leave."""
    streams = np.stack(
        [CALM_LEVEL * np.exp(NOISES[noise](np.random.default_rng(s), BURN_IN + 60)) for s in range(SEEDS)], axis=1
    )
    streams[BURN_IN:] *= 3
    coefficient, _ = run_stream(controller("adaptive"), streams)

    assert (coefficient[BURN_IN : BURN_IN + 3] < 1).mean() > 0.5  # it did clip at first
    late = streams[BURN_IN + 10 :]
    assert (coefficient[BURN_IN + 10 :][late <= 1] < 1).mean() < 0.02
    assert (late * coefficient[BURN_IN + 10 :])[late > 1].min() > 0.95  # no loss speaks for more than that


def test_an_explosion_is_not_mistaken_for_a_new_level():
    """Norms that go on growing do not agree with one another: all are cut back but the first, twice the level, which may be noise."""
    noise = 0.15 * np.random.default_rng(0).standard_normal(200)
    norms = np.concatenate([0.3 * np.exp(noise), 0.3 * 2.0 ** np.arange(1, 13)])
    coefficient, _ = run_stream(controller("adaptive"), norms[:, None])

    assert (coefficient[201:] < 1).all()
    assert (
        norms[201:, None] * coefficient[201:]
    ).max() <= 1.8 * 0.3  # at a step where the norm is 4096 times the level


def test_judging_comes_before_learning():
    """A spike cannot raise its own threshold: what is applied does not depend on how large it was."""
    applied = []
    for size in (10.0, 1e3, 1e6):
        norms = np.concatenate([np.full(200, 0.3), [0.3 * size]])
        coefficient, _ = run_stream(controller("adaptive"), norms[:, None])
        applied.append(float(norms[-1] * coefficient[-1, 0]))

    assert applied == pytest.approx([applied[0]] * 3, rel=1e-5)


def test_zscore_accepts_a_lasting_rise():
    """The fault of the published rule, which clips a lasting 3x rise for ever, is mended."""
    assert judge(controller("zscore"), "normal", 5).accepted_after <= 50


def test_percentile_is_always_on():
    """As published: at p = 10 about nine in ten steps are altered when nothing is wrong."""
    assert 85 < judge(controller("percentile"), "normal", 5).altered_calm < 95


def test_the_range_widens_while_stable_and_narrows_after_a_spike():
    rule = controller("adaptive", max_edge=1.9, warmup_observations=20)
    rng = np.random.default_rng(0)
    state, widths = rule.init(SCALAR, ()), []
    for step in range(300):
        norm = np.float32(np.exp(0.1 * rng.standard_normal()) * (50 if step == 250 else 1))
        _, state = rule.update(state, Observation(norm, np.float32("nan"), np.float32(10)))
        widths.append(float(state.width))

    assert widths[249] > widths[100] > widths[20]
    assert widths[250] == pytest.approx(0.8 * widths[249])
    assert widths[299] > widths[250]
