"""What counts as an incident, and that healthy runs have none."""

import math

import numpy as np
import pytest

from hf_adaclip import AdaptiveClipConfig
from hf_adaclip.controllers import Reason
from hf_adaclip.gauntlet.trials import TRIALS
from hf_adaclip.incidents.rules import IncidentRules

CONFIG = AdaptiveClipConfig()


def judge(norms, losses=None, *, reasons=None, static=1.0, threshold=math.inf, split=False, config=CONFIG):
    """Steps and kinds of the incidents of a stream."""
    rules, found = IncidentRules(config, split=split), []
    for step, norm in enumerate(norms):
        loss = math.nan if losses is None else float(losses[step])
        row = {"norm": float(norm), "threshold": threshold, "coefficient": 1.0, "loss": loss}
        reason = Reason.WITHIN if reasons is None else reasons.get(step, Reason.WITHIN)
        if (finding := rules.feed(step, row, reason, static)) is not None:
            assert finding.sentence.endswith(".")
            found.append((step, finding.kind))
    return found


def calm(rng, steps=400):
    return 0.5 * np.exp(0.15 * rng.standard_normal(steps))


@pytest.mark.parametrize(
    "trial", [t for t in TRIALS if "growth" not in t.name and "spikes" not in t.name], ids=lambda t: t.name
)
def test_healthy_streams_have_at_most_one_in_a_thousand(trial):
    streams = [trial.norms(np.random.default_rng(seed)) for seed in range(5)]
    found = sum(len(judge(stream, static=trial.static_threshold)) for stream in streams)
    assert found <= sum(map(len, streams)) / 1000


@pytest.mark.parametrize("sd", [0.1, 0.3, 0.6, 1.0, 1.5])
def test_norms_that_scatter_widely_are_usual(sd, rng):
    stream = np.exp(sd * rng.standard_normal(20_000))
    assert len(judge(stream)) <= 20


def test_the_fall_and_the_slow_rise_of_a_healthy_run_are_none(rng):
    steps = np.arange(4000)
    fall = (0.3 + 10 * np.exp(-steps / 100)) * np.exp(0.2 * rng.standard_normal(4000))
    rise = (0.3 + steps / 2000) * np.exp(0.2 * rng.standard_normal(4000))
    losses = 2 + 6 * np.exp(-steps / 300) + 0.1 * rng.standard_normal(4000)
    assert judge(fall, losses) == judge(rise, losses) == []


@pytest.mark.parametrize("trial", [t for t in TRIALS if "growth" in t.name], ids=lambda t: t.name)
def test_growth_is_told_before_it_is_far(trial):
    stream = trial.norms(np.random.default_rng(0))
    found = [step for step, kind in judge(stream) if kind == "growth"]
    assert found
    assert found[0] < 700


def test_spikes_of_many_sizes_are_found(rng):
    stream = calm(rng, 2000)
    planted = [100, 400, 900, 1500]
    stream[planted] *= [8, 30, 1000, 1e8]
    assert judge(stream) == [(step, "spike") for step in planted]


def test_a_spike_is_found_while_norms_fall_quickly(rng):
    stream = (0.1 + 20 * np.exp(-np.arange(200) / 20)) * np.exp(0.15 * rng.standard_normal(200))
    stream[40] *= 40
    assert judge(stream) == [(40, "spike")]


def test_a_second_source_is_told_of_and_then_usual(rng):
    stream = calm(rng, 2000)
    stream[100::25] *= 10
    assert [step for step, _ in judge(stream)] == [100, 125, 150]
    stream[1500] *= 200
    assert judge(stream)[-1] == (1500, "spike")


def test_a_norm_that_is_not_finite_counts_also_while_the_loss_is(rng):
    stream, losses = calm(rng), np.full(400, 2.0)
    stream[[50, 60]] = math.nan, math.inf
    assert judge(stream, losses) == [(50, "nonfinite"), (60, "nonfinite")]
    rules = IncidentRules(CONFIG)
    row = {"norm": math.nan, "threshold": 1.0, "coefficient": 1.0, "loss": 2.0}
    finding = rules.feed(0, row, Reason.NONFINITE, 1.0)
    assert finding is not None
    assert "NaN, while the loss is finite (2)" in finding.sentence
    losses[70] = math.inf
    assert (70, "nonfinite") in judge(stream, losses)


def test_overflows_of_a_loss_scaler_are_none_until_they_go_on(rng):
    stream = calm(rng)
    at = [0, 1, 2, 3, 50, 100, 101]
    stream[at] = math.inf
    assert judge(stream, reasons=dict.fromkeys(at, Reason.SCALER_SKIPPED)) == []
    long = list(range(200, 220))
    stream[long] = math.inf
    assert judge(stream, reasons=dict.fromkeys([*at, *long], Reason.SCALER_SKIPPED)) == [(209, "nonfinite")]


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        (Reason.SKIPPED, "skipped"),
        (Reason.TROUBLE_BUDGET, "budget"),
        (Reason.TROUBLE_DIVERGENCE, "divergence"),
        (Reason.TROUBLE_STATISTICS, "statistics"),
    ],
)
def test_what_the_controller_says_counts(reason, kind, rng):
    stream = calm(rng)
    assert judge(stream, reasons={70: reason}) == [(70, kind)]
    series = dict.fromkeys(range(70, 90), reason)
    assert judge(stream, reasons=series) == [(70, kind), (71, kind), (72, kind)]


def test_a_norm_at_the_threshold_for_long(rng):
    stream = calm(rng)
    stream[100:] = 1.0
    assert judge(stream) == [(149, "at_threshold")]
    assert judge(stream, static=2.0, threshold=1.0) == [(149, "at_threshold")]
    assert judge(stream, static=2.0, threshold=1.0, split=True) == []  # there the threshold follows the norm
    assert judge(stream, config=AdaptiveClipConfig(incident_steps=20)) == [(119, "at_threshold")]


def test_a_loss_that_falls_to_zero(rng):
    stream, losses = calm(rng), 2 + 0.1 * rng.standard_normal(400)
    losses[200:] = 0.0
    assert judge(stream, losses) == [(209, "zero_loss")]
    falling = 2 * np.exp(-np.arange(400) / 20)  # what is learnt by heart falls, too
    assert judge(stream, falling) == []
    assert judge(stream, np.zeros(400)) == []  # as of policies, that may begin there


def test_a_loss_that_rises_above_its_beginning(rng):
    steps = np.arange(1000)
    stream, losses = calm(rng, 1000), 2 + 4 * np.exp(-steps / 100) + 0.1 * rng.standard_normal(1000)
    losses[600:] = 8.0
    [(step, kind)] = judge(stream, losses)
    assert kind == "divergence"
    assert 600 < step < 650
    penalty = 1e-4 * steps + 1e-5  # one that is added, and grows from nothing
    assert judge(stream, penalty) == []
    assert judge(stream, 0.01 * rng.standard_normal(1000)) == []


def test_few_norms_say_nothing(rng):
    stream = calm(rng)
    stream[10] *= 100
    assert judge(stream) == []
    stream[10:] = 0.0  # steps without a gradient
    assert judge(stream) == []


def test_the_healthy_runs_that_were_recorded_have_at_most_one_in_a_thousand():
    from scripts.study.incidents import GOAL, judged, rate, recorded, table

    lines = recorded()
    outcomes = [judged(line) for line in lines]
    assert sum(outcome.steps for outcome in outcomes) >= 6000
    assert {line["task"].partition(" ")[0] for line in lines} >= {"wikitext-2", "cifar-10", "gsm8k", "grpo"}
    assert rate(outcomes) <= GOAL, table(outcomes)


def test_what_is_planted_in_them_is_found():
    from scripts.study.incidents import judged, recorded

    found, planted = 0, 0
    for line in recorded():
        for at in range(21, len(line["norms"]), 41) if "grpo" not in line["task"] else ():
            norms = list(line["norms"])
            norms[at] *= 20
            found += any(step == at for step, _ in judged({**line, "norms": norms}).found)
            planted += 1
    assert planted > 20
    assert found >= 0.9 * planted  # two of the tasks scatter so widely that 20 times is not much
