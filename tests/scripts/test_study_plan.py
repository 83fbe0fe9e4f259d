"""The plan of the study: what it would run, in which order, with how many runs for each tuned arm, and what that costs."""

import json
from pathlib import Path

import pytest

from hf_adaclip.compare.arms import Study
from hf_adaclip.compare.runs import ScriptRun, write_result
from hf_adaclip.compare.tuning import TUNED_FILE, tuning_runs
from scripts.study import run as run_study
from scripts.study.arms import ARMS, COORDINATES, CORE, RANGE_ARMS, REST, UNTUNED, base_of, is_arm, needs
from scripts.study.plan import Measured, stages, table
from scripts.study.results import rates_of_range
from scripts.study.tasks import TASKS, Place

ALL = (*CORE, *REST)


def planned(*names, arms=ALL, range_arms=RANGE_ARMS, seeds=5):
    return stages([TASKS[name] for name in names or TASKS], arms, range_arms, seeds)


def test_the_arms_are_those_that_the_study_compares():
    wanted = {"stock", "adaptive", "zscore", "percentile", *ARMS}
    assert {base_of(arm) for arm in ALL} == wanted
    assert all(is_arm(arm) for arm in ALL)
    assert not is_arm("nonsense~72")
    assert [
        needs(arm) for arm in ("stock", "muon", "muon-tuned", "muon-tuned~72", "pace@tuned", "tuned", "tuned~72")
    ] == [*(None, None, "muon-tuned", "muon-tuned", "tuned", "tuned", "tuned")]


def test_what_the_goals_need_comes_first_on_all_tasks():
    found = planned()
    core = [stage for stage in found if stage.arm in CORE or stage.kind == "range"]
    assert found[: len(core)] == core
    assert {stage.task for stage in core} == {stage.task for stage in found} == set(TASKS)
    assert len(found) == len(set(found))


def test_an_arm_is_tuned_before_it_is_run_and_every_arm_with_the_same_number_of_runs():
    found = planned("mrpc")
    for place, stage in enumerate(found):
        first = needs(stage.arm)
        if stage.kind == "seeds" and first is not None:
            assert any(s.kind == "tuning" and s.arm == first for s in found[:place]), stage
    tuned = [stage for stage in found if stage.kind == "tuning"]
    assert [stage.arm for stage in tuned] == [
        *("tuned", "adaptive-tuned", "spectral-agreement-tuned", "muon-tuned", "cautious-tuned")
    ]
    assert {stage.runs for stage in tuned} == {24}
    assert {s.steps for s in found if s.arm.endswith("~72")} == {round(0.72 * 160)}


def test_the_tuning_takes_as_many_runs_as_the_plan_says(tmp_path, monkeypatch):
    task = TASKS["mrpc"]
    made: set[tuple[str, int]] = set()

    def sweep(runs, output, **_):
        made.update((run.arm, run.seed) for run in runs)
        worth = [float(len(run.arm) + run.seed) for run in runs]
        return [{"points": [{"metrics": {"eval_loss": value}}]} for value in worth]

    monkeypatch.setattr("hf_adaclip.compare.tuning.run_scripts", sweep)
    study = Study(
        tmp_path,
        task.command(Place(None, tmp_path)),
        (),
        dict(ARMS),
        1,
        1,
        (),
        rates=task.rates,
        coordinates=COORDINATES,
    )
    [stage] = [s for s in planned("mrpc") if s.kind == "tuning" and s.arm == "muon-tuned"]
    run_study.run_stage(stage, study, task)
    assert len(made) == stage.runs == tuning_runs(COORDINATES) == 24
    tried = json.loads((tmp_path / TUNED_FILE).read_text())["muon-tuned"]["tried"]
    assert {entry["--adam_beta2"] for entry in tried} == {0.95, 0.99, 0.999}


def test_the_range_shares_its_runs_with_the_tuning(tmp_path, monkeypatch):
    task, made = TASKS["mrpc"], []

    def sweep(runs, output, **_):
        made.extend(runs)
        return [{"points": [{"metrics": {"eval_loss": 1.0}}]} for _ in runs]

    monkeypatch.setattr("hf_adaclip.compare.tuning.run_scripts", sweep)
    study = Study(
        tmp_path,
        task.command(Place(None, tmp_path)),
        (),
        dict(ARMS),
        1,
        1,
        (),
        rates=task.rates,
        coordinates=COORDINATES,
    )
    tuning, range_stage = (
        next(s for s in planned("mrpc") if s.kind == kind and s.arm == arm)
        for kind, arm in (("tuning", "tuned"), ("range", "stock"))
    )
    run_study.run_stage(tuning, study, task)
    before = {run.digest for run in made}
    made.clear()
    run_study.run_stage(range_stage, study, task)
    assert len({run.digest for run in made} - before) == range_stage.runs
    assert list(UNTUNED) == list(COORDINATES[1:]), (
        "in the order of the tuning, so that the same run is the same command"
    )
    assert len(rates_of_range(task)) * 2 == len(made)


def test_costs_are_those_of_the_runs_that_are_there(tmp_path):
    tasks = [TASKS["mrpc"], TASKS["sst-2"], TASKS["cifar-10"]]

    def finish(task, arm, seconds):
        run = ScriptRun("t", arm, 0, (), ("x.py",), ())
        (tmp_path / task / run.folder).mkdir(parents=True)
        result = {"spec": {"arm": arm}, "points": [{"step": 100}], "wall_seconds": seconds}
        write_result(tmp_path / task / run.folder, result)

    seconds = Measured(tasks, tmp_path, None)
    assert seconds("mrpc", "stock") == TASKS["mrpc"].step_seconds
    finish("mrpc", "stock", 20.0)
    finish("mrpc", "tuning/muon-tuned/learning_rate=1", 30.0)
    seconds = Measured(tasks, tmp_path, None)
    assert (seconds("mrpc", "tuned~72"), seconds("mrpc", "muon")) == (0.2, 0.3)
    assert seconds("sst-2", "muon-tuned~72") == pytest.approx(1.5 * TASKS["sst-2"].step_seconds)
    assert seconds("cifar-10", "muon-tuned~72") == pytest.approx(1.43 * TASKS["cifar-10"].step_seconds)


def test_the_plan_prints_runs_minutes_hours_and_the_runs_of_a_tuned_arm():
    found = planned("mrpc", "cifar-10")
    text = table(found, lambda task, arm: 0.1 if task == "mrpc" else 0.05, 2)
    rows = {line.split()[0]: line.split() for line in text.splitlines()[1:3]}
    runs = {name: sum(s.runs for s in found if s.task == name) for name in ("mrpc", "cifar-10")}
    steps = {name: sum(s.runs * s.steps for s in found if s.task == name) for name in ("mrpc", "cifar-10")}
    assert {name: int(row[1]) for name, row in rows.items()} == runs
    assert int(rows["mrpc"][4]) == round(steps["mrpc"] * 0.1 / 60)
    hours = (steps["mrpc"] * 0.1 + steps["cifar-10"] * 0.05) / 3600
    assert f"{hours:.1f} CPU hours" in text
    assert f"{hours / 2:.1f} hours with 2 runs at a time" in text
    assert "Tuned by 24 runs each on every task" in text


def test_plan_runs_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(run_study, "run_stage", lambda *_: pytest.fail("--plan must run nothing"))
    assert run_study.main(["--plan", "--output", str(tmp_path / "none")]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in TASKS)
    assert not (tmp_path / "none").exists()


def test_raw_results_are_committed_and_nothing_else(tmp_path, monkeypatch):
    import subprocess

    def git(*words):
        return subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    for name, value in (("user.name", "t"), ("user.email", "t@example.com")):
        git("config", name, value)
    (tmp_path / "record").mkdir()
    (tmp_path / "record/a.jsonl").write_text("{}\n")
    (tmp_path / "other.txt").write_text("mine\n")
    git("add", "other.txt")
    monkeypatch.chdir(tmp_path)
    run_study.commit(Path("record"), "mrpc: stock")
    run_study.commit(Path("record"), "nothing new")
    assert git("log", "--format=%s").splitlines() == ["Study: mrpc: stock"]
    assert git("show", "--name-only", "--format=").split() == ["record/a.jsonl"]
    assert git("diff", "--cached", "--name-only").split() == ["other.txt"]
