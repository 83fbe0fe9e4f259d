"""`hf-adaclip compare` end to end, with a few steps: what it leaves, that it resumes, that it refuses to mix."""

import json
import math
import re

import pytest

from hf_adaclip.cli import main
from hf_adaclip.compare.arms import ARMS
from hf_adaclip.compare.compare import run_spec
from hf_adaclip.compare.present import table_rows
from hf_adaclip.compare.tasks import TASKS
from hf_adaclip.compare.tuning import TUNING_SEEDS, load_tuned, settle, tuning_specs

QUICK = ["--steps", "6", "--seeds", "2", "--tasks", "digits-vit", "--arms", "stock,adaptive", "--jobs", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("comparison")
    assert main(["compare", "--output", str(output), *QUICK]) == 0
    return output


def test_leaves_everything_it_names(folder):
    for name in ("comparison.json", "curves.png", "report.html", "README.md"):
        assert (folder / name).stat().st_size > 500, name
    for seed in (0, 1):
        assert (folder / f"runs/digits-vit/adaptive/seed-{seed}/clip_ledger.jsonl").is_file()
        assert (folder / f"runs/digits-vit/stock/seed-{seed}/convergence.jsonl").is_file()
    assert main(["verify", *map(str, sorted(folder.glob("runs/*/adaptive/*/clip_ledger.jsonl")))]) == 0


def test_arms_share_weights_and_data_seed_by_seed(folder):
    def first_losses(arm):
        results = [json.loads((folder / f"runs/digits-vit/{arm}/seed-{s}/result.json").read_text()) for s in (0, 1)]
        return [r["train_loss"][0] for r in results]

    # six steps are warm-up: the controller clips as the stock Trainer does, so equal losses mean equal batches and weights
    assert first_losses("stock") == first_losses("adaptive")
    assert first_losses("stock")[0] != first_losses("stock")[1]


def test_comparison_json_is_strict_and_complete(folder):
    def refuse(text):
        raise AssertionError(text)

    comparison = json.loads((folder / "comparison.json").read_text(), parse_constant=refuse)
    task = comparison["tasks"][0]
    stock, adaptive = task["arms"]

    assert [a["arm"] for a in task["arms"]] == ["stock", "adaptive"]
    assert stock["seeds"][0]["step"] == "inf"  # six steps reach no target: kept, and shown as never
    assert adaptive["ratio_step"]["neither"] == 2
    assert adaptive["seeds"][0]["ledger"]["verified"] is True
    assert {"step", "train_seconds", "energy_wh", "final_eval_loss", "clipped", "skipped"} <= set(adaptive["seeds"][0])
    row = dict(zip(range(11), table_rows(task)[1], strict=True))
    assert row[2] == "never"
    assert row[5] == "1.00 [1.00, 1.00] (2 of 2 neither)"
    assert row[10] == "0"


def test_started_again_it_goes_on_where_it_stopped(folder, capsys):
    results = sorted(folder.glob("runs/digits-vit/*/*/result.json"))
    untouched = {p: p.stat().st_mtime_ns for p in results[1:]}
    results[0].unlink()  # as if it had been interrupted here
    before = (folder / "comparison.json").read_text()
    assert main(["compare", "--output", str(folder), *QUICK]) == 0

    assert {p: p.stat().st_mtime_ns for p in results[1:]} == untouched
    assert results[0].is_file()
    losses = [
        re.findall(r'"final_eval_loss": ([\d.]+)', text) for text in (before, (folder / "comparison.json").read_text())
    ]
    assert losses[0] == losses[1]  # the same seed gives the same numbers, bit for bit


def test_a_folder_of_another_comparison_is_refused(folder, capsys):
    arguments = [*QUICK]
    arguments[1] = "7"
    assert main(["compare", "--output", str(folder), *arguments]) == 2
    assert "was made with another `max_steps`" in capsys.readouterr().err


def test_report_fetches_nothing_and_holds_the_plots(folder):
    text = (folder / "report.html").read_text()
    outside = re.sub(
        r"<script>.*?</script>", "", text, count=1, flags=re.DOTALL
    )  # plotly itself holds links in its code

    assert "Plotly" not in text
    assert text.count('<svg class="chart"') >= 2
    assert not re.findall(r'(?:src|href)="https?:', outside)
    assert text.count("plotly-graph-div") >= 2


def test_card_states_rules_and_every_seed(folder):
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")

    assert card.data.library_name == "transformers"
    for piece in ("target eval_loss", "## Rules", "never", "hf-adaclip verify", "| adaptive | 1 |"):
        assert piece in card.content


def test_a_failed_run_is_shown_not_dropped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("hf_adaclip.compare.pool._run", _failing_run)
    assert main(["compare", "--output", str(tmp_path), *QUICK]) == 1
    out = capsys.readouterr().out

    assert "(1 failed)" in out
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    assert len(comparison["tasks"][0]["arms"][1]["ratio_step"]["ratios"]) == 1  # the failed pair is left out
    assert "RuntimeError: out of luck" in (tmp_path / "README.md").read_text()


def _failing_run(specs, output, *, jobs, quiet):
    """Runs in this process; one of them fails inside training."""
    import hf_adaclip.compare.worker as worker

    real, results = worker._train, {}
    for spec in specs:

        def train(spec, folder, on_steps):
            if spec.arm == "adaptive" and spec.seed == 1:
                raise RuntimeError("out of luck")
            return real(spec, folder, on_steps)

        worker._train = train
        try:
            results[spec.digest] = worker.execute(spec, output)
        finally:
            worker._train = real
    return results


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "mnist"], "`tasks` must be among digits-vit, pydoc-llama, but 'mnist' is not."),
        (["--arms", "adam"], "`arms` must be among"),
    ],
)
def test_unknown_names_are_refused_with_the_known(tmp_path, capsys, arguments, message):
    assert main(["compare", "--output", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_recorded_tuning_follows_from_its_own_grid():
    """Best rate and target in tuned.json are what the rule gives on the recorded runs; the seeds are never compared on."""
    for name, tuned in load_tuned().items():
        task = TASKS[name]
        assert {(g["learning_rate"], g["seed"]) for g in tuned.grid} == {
            (r, s) for r in task.grid for s in TUNING_SEEDS
        }
        mean = {r: sum(g["final_eval_loss"] for g in tuned.grid if g["learning_rate"] == r) for r in task.grid}
        assert tuned.learning_rate == min(mean, key=lambda rate: mean[rate])
        best = [g["best_eval_loss_within_share"] for g in tuned.grid if g["learning_rate"] == tuned.learning_rate]
        assert tuned.target.value == round(max(best), 4)
        assert len(task.grid) == 5
    assert set(load_tuned()) == set(TASKS)
    assert not set(TUNING_SEEDS) & set(range(50))


def test_settle_ignores_diverged_rates_and_gives_up_when_all_diverge():
    task = TASKS["digits-vit"]

    def results(final):
        return [
            {
                "spec": {"learning_rate": s.learning_rate, "seed": s.seed},
                "points": [{"metrics": {"eval_loss": v}} for v in (3.0, 2.0, 2.0, 2.0, final(s.learning_rate))],
            }
            for s in tuning_specs(task)
        ]

    tuned = settle(task, results(lambda rate: math.nan if rate > 2e-3 else 1 / rate))
    assert tuned.learning_rate == 1e-3
    assert tuned.target.value == 2.0  # within the first 80 % of five evaluations
    with pytest.raises(ValueError, match="failed at all of them"):
        settle(task, results(lambda rate: math.inf))


def test_every_arm_has_a_complete_config():
    spec = run_spec(TASKS["digits-vit"], ARMS["adaptive-pace"], 0, 1e-3)
    assert spec.clip is not None
    assert spec.clip["max_pace"] == 64.0
    assert spec.clip["decay"] == 0.97
    assert run_spec(TASKS["digits-vit"], ARMS["stock"], 0, 1e-3).clip is None
    assert run_spec(TASKS["digits-vit"], ARMS["stock-default"], 0, 1e-3).learning_rate == 5e-5
