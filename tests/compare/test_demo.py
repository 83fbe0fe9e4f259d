"""`hf-adaclip compare` without a script, end to end with a few steps: what it leaves, that it resumes, that a failed arm is shown."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from hf_adaclip.cli import main
from hf_adaclip.compare import demo
from hf_adaclip.compare.arms import Study
from hf_adaclip.compare.demo import TASKS
from hf_adaclip.compare.demo_study import demo_studies, fixed_before
from hf_adaclip.compare.present import table_rows
from hf_adaclip.compare.runs import RESULT_FILE, ScriptRun, run_scripts
from hf_adaclip.compare.tuning import TUNING_SEEDS

pytestmark = pytest.mark.slow

QUICK = ["--steps", "6", "--seeds", "2", "--tasks", "digits-vit", "--arms", "stock,guard", "--jobs", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("comparison")
    assert main(["compare", "--output", str(output), *QUICK]) == 0
    return output


def test_leaves_everything_it_names(folder):
    for name in ("comparison.json", "curves.png", "report.html", "README.md"):
        assert (folder / name).stat().st_size > 500, name
    for seed in (0, 1):
        assert (folder / f"runs/digits-vit/guard/seed-{seed}/clip_ledger.jsonl").is_file()
        assert (folder / f"runs/digits-vit/stock/seed-{seed}/convergence.jsonl").is_file()
    assert main(["verify", *map(str, sorted(folder.glob("runs/*/guard/*/clip_ledger.jsonl")))]) == 0


def test_arms_share_weights_and_data_seed_by_seed(folder):
    def first_loss(arm, seed):
        state = json.loads((folder / f"runs/digits-vit/{arm}/seed-{seed}/trainer_state.json").read_text())
        return next(entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry)

    # six steps are warm-up: the controller clips as the stock Trainer does, so equal losses mean equal batches and weights
    assert [first_loss("stock", s) for s in (0, 1)] == [first_loss("guard", s) for s in (0, 1)]
    assert first_loss("stock", 0) != first_loss("stock", 1)


def test_comparison_json_is_strict_and_complete(folder):
    def refuse(text):
        raise AssertionError(text)

    comparison = json.loads((folder / "comparison.json").read_text(), parse_constant=refuse)
    task = comparison["tasks"][0]
    stock, guard = task["arms"]

    assert [a["arm"] for a in task["arms"]] == ["stock", "guard"]
    assert (task["quality"], task["quality_greater_is_better"], task["same_data_as_tuning"]) == (
        "accuracy",
        True,
        True,
    )
    assert stock["seeds"][0]["step"] == "inf"  # six steps reach no target: kept, and shown as never
    assert guard["ratio_step"]["neither"] == 2
    assert guard["seeds"][0]["ledger"]["verified"] is True
    assert {"step", "train_seconds", "energy_wh", "final_eval_loss", "clipped", "skipped"} <= set(guard["seeds"][0])
    row = dict(zip(range(11), table_rows(task)[1], strict=True))
    assert row[2] == "never"
    assert row[5] == "1.00 [1.00, 1.00] (2 of 2 neither)"
    assert row[10] == "0"


def test_started_again_it_goes_on_where_it_stopped(folder):
    results = sorted(folder.glob(f"runs/digits-vit/*/*/{RESULT_FILE}"))
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


def test_a_killed_comparison_leaves_no_run_behind_and_goes_on(tmp_path):
    command = [sys.executable, "-m", "hf_adaclip.cli", "compare", "--output", str(tmp_path), *QUICK]
    command[command.index("6")] = "400"  # long enough to be killed in
    comparison = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    points = tmp_path / "runs/digits-vit/stock/seed-0/convergence.jsonl"
    _until(lambda: points.is_file() and points.read_text().count("\n") > 1)
    comparison.send_signal(signal.SIGKILL)
    comparison.wait()
    _until(lambda: not _writers(tmp_path))
    written = points.read_text()
    assert not (points.parent / RESULT_FILE).exists()
    assert main(["compare", "--output", str(tmp_path), *QUICK]) == 0
    assert points.read_text() != written
    assert len(list(tmp_path.glob(f"runs/*/*/*/{RESULT_FILE}"))) == 4


def _until(there):
    end = time.monotonic() + 400
    while not there():
        assert time.monotonic() < end
        time.sleep(0.1)


def _writers(folder):
    """Processes that have a file of the folder open."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            files = [os.readlink(f"/proc/{process}/fd/{number}") for number in os.listdir(f"/proc/{process}/fd")]
        except OSError:  # gone, or not ours
            continue
        found += [file for file in files if file.startswith(str(folder))]
    return found


def test_report_fetches_nothing_and_holds_the_figures(folder):
    text = (folder / "report.html").read_text()
    assert "<script" not in text
    assert text.count('<svg class="chart"') >= 2
    assert not re.findall(r'(?:src|href)="https?:', text)


def test_card_states_rules_and_every_seed(folder):
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")

    assert card.data.library_name == "transformers"
    for piece in (
        "target eval_loss",
        "## Rules",
        "never",
        "hf-adaclip verify",
        "| guard | 1 |",
        "the stock arm's best of",
    ):
        assert piece in card.content


def test_a_failed_arm_is_shown_not_dropped(tmp_path, capsys):
    own = ["--arm", "broken=--clip adaptive --lr_scheduler_type nonsense"]
    assert main(["compare", "--output", str(tmp_path), *QUICK[:3], "1", *QUICK[4:], *own]) == 1
    assert "(1 failed)" in capsys.readouterr().out
    stock, guard, broken = json.loads((tmp_path / "comparison.json").read_text())["tasks"][0]["arms"]
    assert "nonsense" in broken["seeds"][0]["error"]
    assert broken["ratio_step"] is None
    assert guard["ratio_step"]["ratios"] == [1.0]
    assert stock["seeds"][0]["error"] is None
    assert broken["seeds"][0]["error"][:40] in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "mnist"], "`--tasks` must be among digits-vit, pydoc-llama, but 'mnist' is not."),
        (["--arms", "adam"], "`--arms` must be among stock"),
        (["--target", "0.3", "--rates", "1"], "`--target`, `--rates` must be given with a script"),
        (["--steps", "3", "--tune", "--", "t.py"], "`--steps`, `--tune` must be left out with a script"),
        (["--", "-m", "nothing.there"], "`-m` must be followed by a module that this Python finds, but is by 'nothing.there'."),
        (["--", "-m"], "`-m` must be followed by a module"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_before_anything_runs(tmp_path, capsys, arguments, message):
    assert main(["compare", "--output", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_is_recorded_follows_from_its_own_grid():
    fixed = fixed_before()["tasks"]
    for name, task in TASKS.items():
        tried = {entry["--learning_rate"]: entry["final"] for entry in fixed[name]["tried"]}
        assert tuple(tried) == task.rates
        assert fixed[name]["chosen"] == {"--learning_rate": min(tried, key=lambda rate: tried[rate])}
        assert fixed[name]["seeds"] == list(TUNING_SEEDS)
        assert min(tried.values()) < fixed[name]["target"], "reached within 80 %, and training goes on"
    assert set(fixed) == set(TASKS)
    assert not set(TUNING_SEEDS) & set(range(50))


def test_the_stock_arm_is_tuned_and_the_target_set_anew(tmp_path, capsys):
    options = ["--output", str(tmp_path), "--tasks", "digits-vit", "--steps", "2", "--seeds", "1"]
    assert main(["compare", *options, "--tune", "--json"]) == 0
    fixed = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "demo_target.json").read_text()) == fixed
    [found] = fixed["tasks"].values()
    assert [entry["--learning_rate"] for entry in found["tried"]] == list(TASKS["digits-vit"].rates)
    assert main(["compare", *options, "--arms", "stock", "--full"]) == 0
    [task] = json.loads((tmp_path / "comparison.json").read_text())["tasks"]
    assert [entry["arm"] for entry in task["arms"]] == ["stock", "stock-default"]
    assert task["target"]["value"] == found["target"]


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_is_a_script(task, tmp_path):
    script = ("-m", "hf_adaclip.compare.demo", "--task", task, "--max_steps", "4", "--eval_steps", "2")
    run = ScriptRun(task, "adaptive", 0, (sys.executable,), script, ("--clip", "adaptive"))
    [result] = run_scripts([run], tmp_path, jobs=1, quiet=True, warm=True)

    assert [p["step"] for p in result["points"]] == [2, 4]
    assert result["points"][-1]["tokens"] == (4 * 16 * 128 if task == "pydoc-llama" else None)
    assert ("eval_accuracy" in result["points"][-1]["metrics"]) == (task == "digits-vit")
    assert result["ledger"]["verified"] is True


@pytest.mark.parametrize(
    ("flags", "code", "said"), [(["--help"], 0, "--clip"), (["--task", "mnist"], 2, "invalid choice")]
)
def test_the_script_says_what_it_takes(flags, code, said, capsys):
    with pytest.raises(SystemExit) as ended:
        demo.main(flags)
    assert ended.value.code == code
    assert said in "".join(capsys.readouterr())


def test_a_study_is_the_recorded_setting_of_the_script():
    study = Study(None, (), ("stock",), {}, 1, 1)
    [digits] = demo_studies(study, ["digits-vit"], None, fixed_before())
    assert digits.script == ("-m", "hf_adaclip.compare.demo", "--task", "digits-vit", "--learning_rate", "0.003")
    assert digits.flags_of("stock") == ("--clip", "stock")
    assert digits.flags_of("adaptive") == ("--clip", "adaptive")
    assert digits.flags_of("adaptive-default") == ("--clip", "adaptive", "--learning_rate", "5e-05")
    assert digits.flags_of("stock-default")[2:] == ("--learning_rate", "5e-05")
    assert (digits.task, digits.target, digits.warm) == (
        "digits-vit",
        fixed_before()["tasks"]["digits-vit"]["target"],
        True,
    )
