"""Replay, advise and diff: on our ledgers and on logs that others wrote."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from hf_adaclip import AdaptiveClipConfig, LedgerError
from hf_adaclip.audit.advise import advise, wilson
from hf_adaclip.audit.diff import diff_ledgers
from hf_adaclip.audit.ingest import load_series
from hf_adaclip.audit.replay import REPLAYABLE, find_spikes, outcome, replay
from hf_adaclip.cli import main
from hf_adaclip.controllers import Reason
from hf_adaclip.report.tables import advice_text, keep_extremes
from tests.audit.test_ledger import CONFIG, write_run


def norms(steps=600, seed=0):
    rng = np.random.default_rng(seed)
    values = 0.3 * np.exp(0.15 * rng.standard_normal(steps))
    for step, size in ((200, 30.0), (400, 15.0)):
        if step < steps:
            values[step] = size
    return values


def write_state(path, values, every=1):
    history = [
        {"step": i + 1, "loss": 2.0, "grad_norm": float(v), "epoch": 1} for i, v in enumerate(values) if i % every == 0
    ]
    path.write_text(json.dumps({"global_step": len(values), "log_history": [*history, {"eval_loss": 1.0, "step": 5}]}))
    return path


def write_csv(path, values):
    path.write_text("Step,grad_norm,loss\n" + "".join(f"{i},{v},2.0\n" for i, v in enumerate(values)))
    return path


def write_events(folder, values):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    for i, v in enumerate(values):
        writer.add_scalar("train/grad_norm", v, i)
        writer.add_scalar("train/loss", 2.0, i)
    writer.close()
    return folder


# -- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["state", "csv", "tensorboard"])
def test_norms_are_read_from_logs_that_others_wrote(tmp_path, kind):
    values = norms(100)
    path = {
        "state": lambda: write_state(tmp_path / "trainer_state.json", values),
        "csv": lambda: write_csv(tmp_path / "log.csv", values),
        "tensorboard": lambda: write_events(tmp_path / "runs", values),
    }[kind]()
    series = load_series(path)

    np.testing.assert_allclose(series.norms, values.astype(np.float32), rtol=1e-6)
    assert len(series) == 100
    assert series.every == 1
    assert series.losses[3] == 2.0


def test_a_real_trainer_state_is_read(tmp_path):
    from tests.integrations.trainers import arguments, run, stock

    trainer = stock(tmp_path, args=arguments(tmp_path, logging_steps=2))
    run(trainer)
    trainer.state.save_to_json(str(tmp_path / "trainer_state.json"))
    series = load_series(tmp_path / "trainer_state.json")

    assert series.every == 2
    assert series.steps.tolist() == list(range(2, 41, 2))
    assert "one in 2 steps" in advise(series)["uncertainty"]


def test_a_resumed_ledger_reads_as_one_run(tmp_path):
    path = tmp_path / "l.jsonl"
    write_run(path, steps=30, clean=False)
    write_run(path, steps=45)
    series = load_series(path)

    assert series.steps.tolist() == list(range(45))  # the second run began at step 0 again, and counts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "a,b\n1,2\n", "must be a CSV with a column `step` and a column `norm`"),
        ("x.csv", "step,norm\n1,abc\n", "cannot be read as CSV"),
        ("x.csv", "step,norm\n", "holds no gradient norm"),
        ("x.csv", "", "must be a CSV"),
        ("x.json", "{", "must be a ledger, a trainer_state.json, a CSV"),
        ("x.json", '{"log_history": []}', "holds no gradient norm"),
        ("x.json", '{"log_history": [{"step": 1, "loss": 2}]}', "holds no gradient norm"),
        ("x.json", '{"log_history": 7}', "but is none"),
        ("x.json", "{" * 100_000, "but is none"),
    ],
)
def test_logs_without_norms_are_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(LedgerError, match=message) as caught:
        load_series(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_folder_without_events_is_refused(tmp_path):
    with pytest.raises(LedgerError, match="is a folder without TensorBoard events"):
        load_series(tmp_path)


# -- replay -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("controller", ["static", "percentile", "zscore", "adaptive"])
def test_replaying_a_ledger_with_its_own_config_gives_its_decisions(tmp_path, controller):
    path = tmp_path / "l.jsonl"
    write_run(path, CONFIG.replace(controller=controller))
    series = load_series(path)
    assert series.header is not None
    done = replay(
        series,
        AdaptiveClipConfig.from_dict(series.header["config"]),
        static_threshold=series.header["static_threshold"],
    )
    thresholds, coefficients = series.decisions()

    np.testing.assert_array_equal(done.thresholds, thresholds)
    np.testing.assert_array_equal(done.coefficients, coefficients)
    assert [Reason(int(r)).name for r in done.reasons] == series.reasons


def test_spikes_are_found_and_a_lasting_rise_is_none():
    values = norms()
    values[500:] *= 10
    values[250], values[251] = np.nan, np.inf

    assert find_spikes(values.astype(np.float32)).tolist() == [200, 400]
    assert find_spikes(np.array([1.0, 100.0], np.float32)).tolist() == []
    assert find_spikes(np.full(300_000, 1.0, np.float32)).tolist() == []


def test_outcome_counts():
    series = load_series_from(norms())
    coefficients = np.ones(600, np.float32)
    coefficients[[200, 10]] = 0.01
    found = outcome(series, coefficients, ["WITHIN"] * 600, find_spikes(series.norms))

    assert (found["altered"], found["spikes"], found["spikes_cut"]) == (2, 2, 1)
    assert found["largest_applied_spike"] == pytest.approx(15.0)
    assert found["largest_applied_spike_over_median"] == pytest.approx(50, rel=0.1)


def load_series_from(values, losses=None):
    from hf_adaclip.audit.series import of_rows

    losses = np.full(len(values), math.nan) if losses is None else losses
    rows = [(i, float(v), float(loss)) for i, (v, loss) in enumerate(zip(values, losses, strict=True))]
    return of_rows(Path("memory"), "CSV", rows)


def test_replay_command(tmp_path, capsys):
    path, picture = tmp_path / "l.jsonl", tmp_path / "replay.png"
    write_run(path)
    assert main(["replay", str(path), "--controller", "zscore", "--set", "z_threshold=4", "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "Counterfactual on thresholds only" in out
    assert "recorded (adaptive)" in out
    assert picture.stat().st_size > 5000
    assert main(["replay", str(path), "--set", "decay=0.9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["outcomes"]) == {"recorded (adaptive)", *REPLAYABLE}
    for arguments, message in (
        (["--set", "decy=0.9"], "Did you mean `decay`?"),
        (["--set", "decay"], "`--set` must be FIELD=VALUE"),
        (["--controller", "magic"], "`controller` must be one of"),
        (["--controller", "weight_ratio"], "must be a rule on norms to be replayed"),
        (["--max-grad-norm", "-1"], "must be above 0"),
    ):
        assert main(["replay", str(path), *arguments]) == 2
        assert message in capsys.readouterr().err


# -- advise -------------------------------------------------------------------------------------------------------


def test_advice_on_a_run_with_spikes(tmp_path):
    advice = advise(load_series(write_csv(tmp_path / "log.csv", norms())))

    assert advice["spikes"] == 2
    assert [s["step"] for s in advice["largest_spikes"]] == [200, 400]
    assert advice["controllers"]["adaptive"]["spikes_cut"] == 2
    assert advice["controllers"]["static"]["largest_applied_spike_over_median"] == pytest.approx(3.3, rel=0.1)
    assert advice["controllers"]["adaptive"]["largest_applied_spike_over_median"] < 1.4
    assert not advice["static_always_on"]
    assert advice["uncertainty"] == "Every step is known."
    # Both shares are of the steps that are no spike.
    assert advice["verdict"].count("would have cut 2 of them and altered") == 2
    assert AdaptiveClipConfig(**advice["recommended"])
    assert 0.4 < advice["recommended"]["static_threshold"] < 0.5


def test_always_on_is_called_by_its_name():
    advice = advise(load_series_from(norms() * 20))

    assert advice["static_always_on"]
    assert "it is always on" in advice["verdict"]
    assert "keeps it as its ceiling" in advice["verdict"]
    assert "next to nothing" not in advice["verdict"]
    assert advice["recommended"] == {"controller": "adaptive", "static_threshold": 1.0}
    assert advice["controllers"]["adaptive"]["altered"] == advice["controllers"]["static"]["altered"]


def test_a_threshold_that_acts_only_after_the_warm_up_is_kept_until_the_loss_makes_progress():
    rng = np.random.default_rng(2)
    values = np.exp(0.1 * rng.standard_normal(600)) * np.where(np.arange(600) < 60, 0.6, 1.6)
    advice = advise(load_series_from(values))
    assert advice["static_always_on"]
    assert "keeps it as its ceiling" in advice["verdict"]
    assert advice["controllers"]["adaptive"]["altered_share"] > 0.8

    losses = 5 * np.exp(-np.arange(600) / 150) + 0.01 * rng.standard_normal(600)
    advice = advise(load_series_from(values, losses))
    assert advice["static_always_on"]
    assert "does not keep it" in advice["verdict"]
    assert advice["controllers"]["adaptive"]["altered_share"] < 0.3


def test_a_calm_run_needs_nothing():
    rng = np.random.default_rng(1)
    advice = advise(load_series_from(0.3 * np.exp(0.1 * rng.standard_normal(500))))

    assert "next to nothing to do" in advice["verdict"]
    assert "never acted" in advice["verdict"]


def test_few_logged_steps_make_it_uncertain(tmp_path):
    series = load_series(write_state(tmp_path / "trainer_state.json", norms(), every=10))
    text = advise(series)["uncertainty"]
    low, high = wilson(2, 60)

    assert series.every == 10
    assert "Only one in 10 steps was logged" in text
    assert f"between {low * 1000:.1f} and {high * 1000:.1f} per 1000 steps" in text
    assert (low, high) == pytest.approx((0.0092, 0.1136), abs=2e-3)  # Wilson's interval of 2 in 60


def test_of_few_norms_no_threshold_is_recommended(tmp_path):
    series = load_series(write_state(tmp_path / "trainer_state.json", norms()[:38], every=2))
    assert len(series) == 19
    advice = advise(series, max_grad_norm=2.0)
    assert advice["recommended"] == {"controller": "adaptive", "static_threshold": 2.0}
    assert advice["uncertainty"].startswith("Only 19 norms are known, too few to recommend another threshold.")
    assert "static_threshold: as it was" in advice_text(advice)


def test_bad_steps_are_mentioned():
    values = norms()
    values[50] = np.nan
    assert "1 step(s) had a NaN or infinite norm" in advise(load_series_from(values))["verdict"]


def test_advise_command(tmp_path, capsys):
    assert main(["advise", str(write_csv(tmp_path / "log.csv", norms()))]) == 0
    assert "Recommended: AdaptiveClipConfig(controller='adaptive'" in capsys.readouterr().out
    assert main(["advise", str(tmp_path / "missing.csv")]) == 2
    assert "cannot be read" in capsys.readouterr().err


# -- diff ---------------------------------------------------------------------------------------------------------


def test_equal_runs(tmp_path):
    write_run(tmp_path / "a.jsonl")
    write_run(tmp_path / "b.jsonl")
    found = diff_ledgers(tmp_path / "a.jsonl", tmp_path / "b.jsonl")

    assert found["first"] is None
    assert found["why"] == "The runs are equal in all 45 steps."
    assert found["settings"] == {}


def test_other_settings_part_at_the_first_other_decision(tmp_path, capsys):
    write_run(tmp_path / "a.jsonl")
    write_run(tmp_path / "b.jsonl", CONFIG.replace(decay=0.9, min_spread=0.3))
    found = diff_ledgers(tmp_path / "a.jsonl", tmp_path / "b.jsonl")

    assert found["first"]["step"] >= 10  # the warm-up is the same
    assert "norm" not in found["first"]["fields"]
    assert "the settings differ (decay, min_spread)" in found["why"]
    assert main(["diff", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 1
    assert "setting decay: 0.97 | 0.9" in capsys.readouterr().out


def test_other_data_parts_at_the_norms(tmp_path):
    write_run(tmp_path / "a.jsonl")
    write_run(tmp_path / "b.jsonl", faults={12: 1.001})
    found = diff_ledgers(tmp_path / "a.jsonl", tmp_path / "b.jsonl")

    assert found["first"]["step"] == 12
    assert {"norm", "loss"} <= set(found["first"]["fields"])
    assert "the norms part by themselves" in found["why"]


def test_a_shorter_run_ends(tmp_path):
    write_run(tmp_path / "a.jsonl")
    write_run(tmp_path / "b.jsonl", steps=40)

    assert (
        "up to there they are equal, then one of them ends"
        in diff_ledgers(tmp_path / "a.jsonl", tmp_path / "b.jsonl")["why"]
    )


def test_only_ledgers_can_be_compared(tmp_path):
    write_run(tmp_path / "a.jsonl")
    with pytest.raises(LedgerError, match="must be a ledger to be compared"):
        diff_ledgers(tmp_path / "a.jsonl", write_csv(tmp_path / "b.csv", norms(50)))


# -- honest pictures ----------------------------------------------------------------------------------------------


def test_downsampling_keeps_every_spike():
    values = np.ones(1_000_000)
    spikes = np.random.default_rng(0).choice(1_000_000, 300, replace=False)
    values[spikes] = 100 + np.arange(300)
    values[12345] = np.nan
    chosen = keep_extremes(np.arange(1_000_000), values, 4000)

    assert len(chosen) <= 4000
    buckets = {int(s // 500) for s in spikes}
    assert {int(s // 500) for s in chosen if values[s] >= 100} == buckets  # every bucket with a spike shows one
    assert values[chosen].max() == values[np.isfinite(values)].max()
    assert (np.diff(chosen) > 0).all()
