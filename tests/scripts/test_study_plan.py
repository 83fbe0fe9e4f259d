"""The plan of the study: what it would run, in which order, with how many runs for each tuned arm, and what that costs."""

import json
import time
from pathlib import Path

import pytest

from hf_adaclip.compare.arms import Study
from hf_adaclip.compare.runs import ScriptRun, write_result
from hf_adaclip.compare.tuning import TUNED_FILE, setting_name, tuning_runs
from scripts.study import run as run_study
from scripts.study.arms import ABLATIONS, ARMS, COORDINATES, CORE, RANGE_ARMS, REST, UNTUNED, base_of, is_arm, needs
from scripts.study.plan import Measured, in_order, order, stages, table
from scripts.study.results import rates_of_range
from scripts.study.tasks import TASKS, Place
from scripts.study.watch import Watch

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


def test_from_scratch_comes_before_fine_tuning_and_the_encoders_last():
    names = [task.name for task in in_order(TASKS.values())]
    scratch = [TASKS[name].scratch for name in names]
    assert scratch == sorted(scratch, reverse=True)
    assert {TASKS[name].kind for name in names[-3:]} == {"glue"}
    _, tasks = run_study.parse([])
    assert list(tasks) == names


def test_both_baselines_and_the_default_are_run_on_all_tasks_before_any_ablation():
    found = planned()
    waves = [stage.wave for stage in found]
    assert waves == sorted(waves)
    first = [stage for stage in found if stage.wave == 1]
    assert {(s.task, s.arm) for s in first if s.kind == "seeds"} == {
        (task, arm) for task in TASKS for arm in ("stock", "tuned", "adaptive", "adaptive@tuned")
    }
    assert not {s.arm for s in first} & {*ABLATIONS, "muon", "cautious"}


def test_all_arms_of_a_wave_get_their_first_seeds_before_any_gets_more():
    found = [s for s in planned(seeds=5) if s.kind == "seeds"]
    for wave in {s.wave for s in found}:
        ours = [s for s in found if s.wave == wave]
        assert [s.first for s in ours] == sorted(s.first for s in ours)
        for first in (0, 2, 4):
            assert {(s.task, s.arm) for s in ours if s.first == first} == {(s.task, s.arm) for s in ours}
    seeds: dict[tuple[str, str], list[int]] = {}
    for stage in found:
        seeds.setdefault((stage.task, stage.arm), []).extend(stage.seeds)
    assert all(each == [0, 1, 2, 3, 4] for each in seeds.values())
    assert {s.runs for s in planned(seeds=1) if s.kind == "seeds"} == {1}


def test_the_order_is_printed_with_cpu_hours_and_their_sum():
    found = planned("mrpc", "cifar-10")

    def seconds(task, arm):
        return 0.1 if task == "mrpc" else 0.05

    heads, *rows = [
        line.split() for line in order(found, seconds, lambda s: s.runs if s.arm == "stock" else 0).splitlines()
    ]
    assert heads[-4:] == ["h", "left", "sum", "left"]
    assert [row[1:3] for row in rows[:4]] == [
        ["mrpc", arm] for arm in ("stock", "tuned", "adaptive", "adaptive@tuned")
    ]
    hours = sum(s.runs * s.steps * seconds(s.task, s.arm) for s in found if s.arm != "stock") / 3600
    assert float(rows[-1][-1]) == pytest.approx(hours, abs=0.01)
    assert rows[0][-5:] == ["7", "7", f"{7 * 160 * 0.1 / 3600:.2f}", "0.00", "0.00"]
    assert any(row[2:4] == ["stock:", "range"] for row in rows)


def test_what_is_there_is_counted_by_stage(tmp_path):
    task = TASKS["mrpc"]
    found = {(s.kind, s.arm, s.first): s for s in planned("mrpc")}

    def finish(arm, seed):
        run = ScriptRun("run_glue", arm, seed, (), ("run_glue.py",), ())
        (tmp_path / "mrpc" / run.folder).mkdir(parents=True)
        write_result(tmp_path / "mrpc" / run.folder, {})

    rates = rates_of_range(task)
    for arm, seed in (("stock", 0), ("stock", 3), ("target/stock", 100), ("tuning/tuned/learning_rate=1", 100)):
        finish(arm, seed)
    for rate in rates[:-1]:
        for seed in (100, 101):
            finish(f"tuning/tuned/{setting_name({**UNTUNED, '--learning_rate': rate})}", seed)

    def there(*place):
        return run_study._there(found[place], task, tmp_path)

    assert [there("seeds", "stock", first) for first in (0, 2, 4)] == [1, 1, 0]
    assert (there("target", "stock", 0), there("tuning", "tuned", 0), there("seeds", "guard", 0)) == (1, 17, 0)
    assert there("range", "stock", 0) == found["range", "stock", 0].runs - 2


def test_it_says_where_it_is_once_a_minute(tmp_path, capsys):
    found = planned("mrpc", arms=("stock", "guard"), range_arms=())
    seconds = Measured([TASKS["mrpc"]], tmp_path, None)
    with Watch(found, seconds, lambda stage: 0, jobs=1, every=0.05) as watch:
        watch.begin(2)
        time.sleep(0.4)
    lines = capsys.readouterr().out.splitlines()
    assert 3 <= len(lines) <= 9
    assert f"stage 3 of {len(found)} (wave 1): {found[2].label}, 0 of {found[2].runs} runs. About" in lines[-1]


def test_a_run_on_the_cpu_has_one_thread_however_many_there_are_at_a_time(tmp_path):
    for jobs in ("1", "2"):
        arguments, tasks = run_study.parse(["--output", str(tmp_path), "--tasks", "mrpc", "--jobs", jobs])
        assert run_study.make_study(tasks["mrpc"], Place(None, tmp_path), arguments).pooling["threads"] == 1


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
    assert {stage.runs for stage in tuned} == {32}
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
    assert len(made) == stage.runs == tuning_runs(COORDINATES) == 32
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
    assert list(UNTUNED) == list(COORDINATES[1:-1]), (
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
    assert "Tuned by 32 runs each on every task" in text


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
