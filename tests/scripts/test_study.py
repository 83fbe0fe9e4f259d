"""The study: its tasks name flags that the scripts know, its runs are recorded, and a run in a forked process is the run of a fresh one."""

import itertools
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.compare.arms import Study
from hf_adaclip.compare.runs import ScriptRun, revision_that_counts, run_scripts, write_result
from hf_adaclip.compare.tuning import TUNED_FILE
from hf_adaclip.controllers.adaptive import AdaptiveController
from hf_adaclip.integrations.script_args import parse_arguments
from hf_adaclip.ledger.schema import LEDGER_FILE
from scripts import run_clm, run_glue, run_image_classification
from scripts.study import records as study_records
from scripts.study import run as run_study
from scripts.study.arms import ARMS, base_of, needs
from scripts.study.records import record
from scripts.study.tasks import FIRST, RETIRED, TASKS, Place, base_command
from scripts.study.tasks_cuda import CUDA_TASKS

SCRIPTS = {"run_clm.py": run_clm, "run_glue.py": run_glue, "run_image_classification.py": run_image_classification}


@pytest.mark.parametrize("data", [None, Path("data")], ids=["hub", "files"])
@pytest.mark.parametrize("task", [*TASKS.values(), *CUDA_TASKS.values()], ids=lambda task: task.name)
def test_every_task_is_a_command_that_its_script_understands(task, data, tmp_path):
    script, *flags = task.command(Place(data, tmp_path / "base"))
    module = SCRIPTS[Path(script).name]
    parsed = parse_arguments(
        [*flags, "--use_cpu", "--clip", "stock", "--output_dir", str(tmp_path)],
        module.ModelArguments,
        module.DataArguments,
        module.OptimizerArguments,
    )
    assert Path(script).is_file()
    remote = parsed[1].train_file is not None and parsed[1].train_file.startswith("https://")
    assert (parsed[1].train_file is None or remote) == (data is None)
    assert parsed[3].max_steps == task.steps
    assert parsed[3].max_steps % parsed[3].eval_steps == 0
    assert task.rate <= min(task.rates) * 4, "the rate as it comes is inside or below the grid of the tuning"
    assert parse_arguments(
        [*base_command(Place(data, tmp_path))[1:], "--output_dir", "x"], run_clm.ModelArguments, run_clm.DataArguments
    )


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_every_arm_of_every_task_has_flags_that_its_script_takes_and_that_say_what_the_arm_is(task, tmp_path):
    best = {"--max_grad_norm": 0.3, "--warmup_steps": 0.1, "--adam_beta2": 0.95, "--learning_rate": task.rates[2]}
    tuned = {needs(arm): {"chosen": best} for arm in run_study.ALL_ARMS if needs(arm)}
    (tmp_path / TUNED_FILE).write_text(json.dumps(tuned))
    script, *flags = task.command(Place(Path("data"), tmp_path / "base"))
    module, study = SCRIPTS[Path(script).name], Study(tmp_path, (script,), (), dict(ARMS), 1, 1, ())
    parts = {"max_pace": 1.0, "spectral_width": None, "agreement": False}
    wanted = {
        "guard": parts,
        "pace": {**parts, "max_pace": 64.0},
        "spectral": {**parts, "spectral_width": 0.0},
        "agreement": {**parts, "agreement": True},
        "spectral-agreement": {**parts, "spectral_width": 0.0, "agreement": True},
    }
    for arm in run_study.ALL_ARMS:
        own = run_study.flags_of(study, arm, task)
        _, _, optimizer, training, clip = parse_arguments(
            [*flags, *own, "--use_cpu", "--output_dir", str(tmp_path)],
            module.ModelArguments,
            module.DataArguments,
            module.OptimizerArguments,
        )
        config, base = clip.resolve(), base_of(arm)
        assert training.max_steps == (round(0.72 * task.steps) if arm.endswith("~72") else task.steps), arm
        if needs(arm):
            found = (training.max_grad_norm, training.warmup_steps, training.adam_beta2, training.learning_rate)
            assert found == pytest.approx(tuple(best.values())), arm
        assert optimizer.optimizer == {"muon": "muon", "cautious": "cautious_adamw"}.get(base), arm
        if base in ("stock", "muon", "cautious"):
            assert config is None, arm
        elif base in wanted:
            assert {name: getattr(config, name) for name in parts} == wanted[base], arm
            assert config.controller == "adaptive", arm
        else:
            assert config == AdaptiveClipConfig(controller=base), arm


def test_what_judges_is_not_what_rules_were_chosen_on(tmp_path):
    data: dict[str, set[str]] = {"development": set(), "confirmation": set()}
    for task in TASKS.values():
        command = task.command(Place(tmp_path, tmp_path / "base"))
        data[task.group].update(v for k, v in itertools.pairwise(command) if k.endswith("_file"))

    groups = [task.group for task in TASKS.values()]
    assert groups.count("development") == groups.count("confirmation") == len(TASKS) / 2
    assert data["development"]
    assert not data["development"] & data["confirmation"]


def test_the_study_has_the_kinds_of_task_that_the_first_lacked():
    assert TASKS["sst-2-epochs"].epochs >= 4
    assert TASKS["wikitext-2-long"].steps == 720
    for name, flag, value in (("cifar-10-decay", "--weight_decay", "0.1"), ("shakespeare-lora", "--lora_r", "8")):
        command = TASKS[name].command(Place(None, Path("base")))
        assert command[command.index(flag) + 1] == value
    assert "rte" not in TASKS
    assert {name for name in FIRST if name not in TASKS} == set(RETIRED)
    assert {task.name for task in TASKS.values() if task.scratch} == {
        *("fashion-mnist", "wikitext-2", "wikitext-2-long", "cifar-10", "cifar-10-decay")
    }


def test_an_unknown_task_is_named(capsys):
    with pytest.raises(SystemExit):
        run_study.main(["--tasks", "sst2", "--plan"])
    assert "must be among fashion-mnist" in capsys.readouterr().err


def test_without_a_gpu_there_is_no_study_on_one(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        run_study.main(["--device", "cuda"])
    assert "`--device cuda` must find a GPU" in capsys.readouterr().err


def test_with_a_gpu_its_tasks_are_the_larger_ones(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    arguments, tasks = run_study.parse(["--device", "cuda", "--budget", "25m"])
    assert list(tasks) == list(CUDA_TASKS)
    assert (arguments.budget, arguments.jobs, arguments.range_arms) == (1500.0, 1, "")
    _, tasks = run_study.parse(["--device", "cuda", "--kind", "clm"])
    assert list(tasks) == ["llama-110m-bf16", "llama-110m-fp16"]


@pytest.mark.parametrize("text", ["25", "m", "-3m", "soon"])
def test_a_budget_is_a_duration(text, capsys):
    with pytest.raises(SystemExit):
        run_study.parse([f"--budget={text}"])
    assert "must be a duration such as 90s, 25m or 2h" in capsys.readouterr().err


def test_a_budget_begins_no_stage_that_would_end_after_it(monkeypatch, tmp_path, capsys):
    clock, begun = [0.0], []

    def run_stage(stage, study, task, steps):
        begun.append(stage.label)
        clock[0] += 50.0

    monkeypatch.setattr(run_study, "run_stage", run_stage)
    monkeypatch.setattr(run_study, "minutes", lambda stage, *_: 40 / 60)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    options = ["--tasks", "sst-2,mrpc", "--arms", "stock,guard", "--range-arms", "", "--budget", "190s"]
    run_study.main(["--output", str(tmp_path), *options])
    assert begun == [
        *(f"{task}: {what}" for task in ("sst-2", "mrpc") for what in ("stock, seeds 0 to 1", "target of stock"))
    ]
    said = capsys.readouterr().out
    assert "The budget is spent before sst-2: stock, seeds 2 to 3. The same command goes on." in said


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Scikit-learn's digits in the place of Fashion-MNIST."""
    digits = load_digits()
    pixels = [np.kron(image, np.ones((4, 4)))[:28, :28].astype(np.uint8) * 16 for image in digits.images[:200]]
    from datasets import ClassLabel, Features, Image
    from PIL import Image as Pictures

    rows = {"image": [Pictures.fromarray(p) for p in pixels], "label": digits.target[:200].tolist()}
    data = Dataset.from_dict(rows, features=Features({"image": Image(), "label": ClassLabel(10)}))
    folder = tmp_path_factory.mktemp("data") / "fashion_mnist"
    folder.mkdir()
    data.select(range(160)).to_parquet(folder / "train.parquet")
    data.select(range(160, 200)).to_parquet(folder / "test.parquet")
    return folder.parent


@pytest.mark.slow
def test_every_arm_changes_the_weights_and_the_range_alone_does_not_where_nothing_happens(images, here, tmp_path):
    script, *flags = TASKS["fashion-mnist"].command(Place(images, tmp_path), steps=30, evaluations=1)

    def weights(arm):
        own = run_study.flags_of(Study(tmp_path, (script,), (), dict(ARMS), 1, 1, ()), arm, TASKS["fashion-mnist"])
        here(Path(script).stem, [*flags, *own, "--use_cpu", "--seed", "3", "--output_dir", tmp_path / arm])
        return load_file(tmp_path / arm / "model.safetensors")

    arms = ("stock", "guard", "adaptive", "pace", "spectral", "agreement", "spectral-agreement", "muon", "cautious")
    found = {arm: weights(arm) for arm in arms}

    def same(one, other):
        return all(torch.equal(found[one][name], found[other][name]) for name in found[one])

    alike = {frozenset(pair) for pair in itertools.combinations(arms, 2) if same(*pair)}
    assert study_records._departures(tmp_path / "guard" / LEDGER_FILE) == 0
    assert {"stock", "guard"} in alike
    default = AdaptiveClipConfig()
    alone = (default.max_pace, default.spectral_width, default.agreement) == (1.0, None, False)
    assert len(alike) == (3 if alone else 1), "no two other arms are the same"
    assert ({"stock", "adaptive"} in alike) == alone


def short_study(images, folder, record, *more):
    options = ["--tasks", "fashion-mnist", "--arms", "stock,adaptive", "--seeds", "1", "--steps", "4", "--jobs", "1"]
    places = ["--output", str(folder), "--data", str(images), "--record", str(record)]
    assert run_study.main([*places, *options, "--range-arms", "", *more]) == 0
    return [json.loads(line) for line in (record / "fashion-mnist.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_short_study_is_recorded_gives_the_same_numbers_again_and_goes_on_from_its_record(images, tmp_path, capsys):
    def numbers(lines):
        return {(r["arm"], r["seed"]): [[p[0], *p[2:]] for p in r["points"]] for r in lines}

    lines = short_study(images, tmp_path / "a", tmp_path / "raw")
    first = numbers(lines)
    assert set(first) == {("stock", 0), ("adaptive", 0), ("target/stock", 100), ("target/stock", 101)}
    assert all(len(points) == 4 for points in first.values())
    assert numbers(short_study(images, tmp_path / "b", tmp_path / "again")) == first
    assert {(line["clock"], line["jobs"]) for line in lines} == {("cpu", 1)}
    assert all(0 < line["points"][-1][1] < line["wall_seconds"] for line in lines)
    assert not list((tmp_path / "a").rglob("*.safetensors")), "weights are not kept"

    kept = [line for line in lines if line["arm"] != "adaptive"]
    stale = {**kept[0], "arm": "zscore", "flags": "--clip zscore", "key": "of other settings"}
    older = {**stale, "arm": "guard", "flags": " ".join(ARMS["guard"].flags), "revision": 1}
    assert [line["alarms"] for line in lines if line["arm"] == "adaptive"] == [[0, 0]]
    (tmp_path / "raw/fashion-mnist.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*kept, stale, older])
    )
    capsys.readouterr()
    longer = tmp_path / "c/fashion-mnist/runs/run_image_classification/median/seed-0"
    shutil.copytree(next((tmp_path / "a").rglob("stock/seed-0")), longer)
    spoiled = json.loads((longer / "result.json").read_text())
    spoiled["spec"]["script"][spoiled["spec"]["script"].index("--max_steps") + 1] = "8"
    (longer / "result.json").write_text(json.dumps(spoiled))
    again = short_study(images, tmp_path / "c", tmp_path / "raw", "--restore")
    said = capsys.readouterr().out
    now = revision_that_counts("adaptive", AdaptiveController.revision, paced=False)
    assert f"3 runs restored. 1 refused: of other settings. 1 refused: of revision 1 (now {now})." in said
    assert numbers(again) == first
    assert not list((tmp_path / "c").rglob("stock/seed-0/convergence.jsonl")), "a restored run is not run"
    assert list((tmp_path / "c").rglob("adaptive/seed-0/convergence.jsonl"))


def test_what_was_run_is_recorded_though_the_study_ends_early(monkeypatch, tmp_path):
    recorded = []
    monkeypatch.setattr(run_study, "run_stage", lambda *_: 1 / 0)
    monkeypatch.setattr(run_study, "record", lambda output, folder, tasks, steps: recorded.extend(tasks))
    with pytest.raises(ZeroDivisionError):
        run_study.main(["--output", str(tmp_path), "--record", str(tmp_path), "--tasks", "mrpc"])
    assert recorded == ["mrpc"]


def test_what_a_recorded_run_was_cut_beyond_the_stock_threshold(tmp_path):
    config = AdaptiveClipConfig(
        warmup_observations=4, static_threshold=1.0, ceiling_share=1.0, ledger=str(tmp_path / "l.jsonl")
    )
    weight = torch.nn.Parameter(torch.zeros(1))
    with AdaptiveClipper(config) as clipper:
        for norm in (
            0.5,
            0.5,
            0.5,
            0.5,
            0.5,
            2.0,
            0.5,
            30.0,
        ):  # both spikes are cut back to about 0.5, where static clipping leaves 1
            weight.grad = torch.full((1,), norm)
            clipper.clip_([weight])
    assert study_records._alarms(tmp_path / "l.jsonl") == [2, 4]
    config = config.replace(controller="static", ledger=str(tmp_path / "m.jsonl"))
    with AdaptiveClipper(config) as clipper:
        for norm in (0.5, 0.5, 2.0, 30.0):
            weight.grad = torch.full((1,), norm)
            clipper.clip_([weight])
    assert study_records._alarms(tmp_path / "m.jsonl") == [0, 4]


def test_the_perplexity_is_restored_where_it_was_measured():
    task = TASKS["gsm8k"]
    run = ScriptRun("t", "stock", 0, (), task.command(Place(None, Path("base"))), ("--clip", "stock"))
    line = {
        "points": [[15, 1.0, 5.0, None], [30, 2.0, 4.0, 54.6]],
        "verified": None,
        "clipped": None,
        "alarms": None,
        "skipped": None,
    }
    points = study_records._result(task, run, line)["points"]
    assert [p["metrics"] for p in points] == [{"eval_loss": 5.0}, {"eval_loss": 4.0, "eval_perplexity": 54.6}]


def test_a_run_that_failed_before_its_first_block_is_recorded(tmp_path):
    task = TASKS["fashion-mnist"]
    flags = {"task": "t", "arm": "adaptive", "seed": 0, "launcher": (), "flags": ("--clip", "adaptive")}
    run = ScriptRun(**flags, script=task.command(Place(None, Path("base"))))
    folder = tmp_path / "out/fashion-mnist" / run.folder
    folder.mkdir(parents=True)
    (folder / "clip_ledger.jsonl").write_text("")
    write_result(folder, {"spec": asdict(run), "digest": run.digest, "error": "exit code 1: out of memory"})
    record(tmp_path / "out", tmp_path / "raw", {"fashion-mnist": task})
    [line] = [json.loads(text) for text in (tmp_path / "raw/fashion-mnist.jsonl").read_text().splitlines()]
    assert (line["error"], line["alarms"], line["points"]) == ("exit code 1: out of memory", None, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arms", "stock,nonsense"], "`--arms` must be among stock, tuned, adaptive"),
        (["--arms", "stock,tuned,nonsense@tuned"], "nonsense@tuned is not"),
        (["--arms", "stock,adaptive@tuned"], "must have `tuned` among them"),
        (["--range-arms", "stok"], "`--range-arms` must be among"),
    ],
)
def test_a_wrong_arm_is_named_before_anything_runs(options, message, capsys):
    with pytest.raises(SystemExit):
        run_study.parse(options)
    assert message in capsys.readouterr().err


def test_an_arm_has_its_own_flags_what_its_tuning_chose_and_the_shorter_run(tmp_path):
    chosen = {"--max_grad_norm": 0.3, "--warmup_steps": 0.1, "--adam_beta2": 0.95, "--learning_rate": 2e-3}
    other = {**chosen, "--learning_rate": 4e-3}
    (tmp_path / TUNED_FILE).write_text(json.dumps({"tuned": {"chosen": chosen}, "muon-tuned": {"chosen": other}}))
    study = Study(tmp_path, ("train.py",), (), dict(ARMS), 1, 1, ())
    task = TASKS["fashion-mnist"]
    best = ("--max_grad_norm", "0.3", "--warmup_steps", "0.1", "--adam_beta2", "0.95", "--learning_rate", "0.002")
    found = {arm: run_study.flags_of(study, arm, task) for arm in ("guard", "pace@tuned", "muon-tuned~72", "tuned~72")}
    assert found["guard"] == ("--clip", "adaptive:max_pace=1,spectral_width=None,agreement=false")
    assert found["pace@tuned"] == ("--clip", "adaptive:max_pace=64,spectral_width=None,agreement=false", *best)
    muon = ("--clip", "stock", "--optimizer", "muon", *best[:-1], "0.004")
    assert found["muon-tuned~72"] == (*muon, "--max_steps", "288")
    assert found["tuned~72"] == ("--clip", "stock", *best, "--max_steps", "288")


def test_restore_needs_a_record(capsys):
    with pytest.raises(SystemExit):
        run_study.parse(["--restore"])
    assert "`--restore` must be given with `--record`" in capsys.readouterr().err


@pytest.mark.slow
def test_a_forked_run_is_the_run_of_a_fresh_process(images, tmp_path):
    place = Place(images, tmp_path)
    command = TASKS["fashion-mnist"].command(place, steps=6)
    runs = [ScriptRun("t", "stock", 0, (sys.executable,), command, ("--clip", "stock"))]
    warm = run_scripts(runs, tmp_path / "warm", jobs=1, quiet=True, warm=True)[0]
    fresh = run_scripts(runs, tmp_path / "fresh", jobs=1, quiet=True)[0]

    def metrics(result):
        return [(p["step"], p["metrics"]["eval_loss"], p["metrics"]["eval_accuracy"]) for p in result["points"]]

    assert metrics(warm) == metrics(fresh)


@pytest.mark.slow
def test_a_forked_run_that_fails_says_why(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("print('hello')\nraise RuntimeError('the disk is on fire')\n")
    runs = [ScriptRun("t", "stock", 0, (sys.executable,), (str(script),), ())]
    [result] = run_scripts(runs, tmp_path / "out", jobs=1, quiet=True, warm=True)
    assert result["error"] == "exit code 1: RuntimeError: the disk is on fire"
