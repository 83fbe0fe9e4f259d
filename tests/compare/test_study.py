"""Comparing runs of a training script: processes, resumption, failures, targets, tuning. The script here trains nothing and is quick."""

import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hf_adaclip.cli import main
from hf_adaclip.compare.runs import ScriptRun, read_run, run_scripts

ROOT = Path(__file__).parent.parent.parent
# The loss after t steps is 1 / (1 + speed t / 100); how fast depends on the arm, the learning rate and the seed.
SCRIPT = """
import argparse, json, os, pathlib, sys
p = argparse.ArgumentParser()
for name, default in (
    ("clip", "stock"), ("learning_rate", "1e-3"), ("max_grad_norm", "1.0"), ("warmup_steps", "0"), ("seed", "0"),
    ("output_dir", "out"), ("break_at", ""),
):
    p.add_argument("--" + name, default=default)
a = p.parse_args()
folder = pathlib.Path(a.output_dir)
with open("starts.txt", "a") as f:
    f.write(f"{a.clip} {a.seed}\\n")
if a.break_at == a.seed:
    print("the disk is on fire"); sys.exit(3)
rate, best = float(a.learning_rate), 4e-3
speed = min(rate, best * best / rate) / best * (1.5 if float(a.max_grad_norm) == 0.3 else 1.0) * (1 + 0.5 * float(a.warmup_steps))
speed *= {"stock": 1.0, "adaptive": 2.0, "median": 0.5}[a.clip] * (1 + 0.01 * (int(a.seed) % 3))
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "convergence.jsonl", "w") as f:
    for step in range(10, 101, 10):
        loss = 1 / (1 + speed * step / 20)
        f.write(json.dumps({"step": step, "samples": step, "tokens": None, "train_seconds": step / 10, "energy_wh": None,
            "energy_source": None, "energy_measured": None, "metrics": {"eval_loss": loss, "eval_accuracy": 1 - loss / 2}}) + "\\n")
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return str(path)


def starts():
    return len(Path("starts.txt").read_text().splitlines()) if Path("starts.txt").is_file() else 0


def compare(script, *options, flags=()):
    return main(["compare", "--output", "study", "--seeds", "3", *options, "--", script, *flags])


def load():
    return json.loads(Path("study/comparison.json").read_text())


def test_arms_and_seeds_of_a_script(script, capsys):
    assert compare(script, "--arms", "stock,adaptive,median", "--quality", "eval_accuracy") == 0
    [task] = load()["tasks"]
    by_arm = {e["arm"]: e for e in task["arms"]}

    assert task["task"] == "train"
    assert [e["reached"] for e in task["arms"]] == [3, 3, 0]
    assert by_arm["adaptive"]["ratio_step"]["median"] == pytest.approx(0.5, abs=0.13)
    assert by_arm["stock"]["median_quality"] > 0.5
    assert starts() == 2 + 9  # two to set the target
    out = capsys.readouterr().out
    assert "never" in out
    for name in ("README.md", "report.html", "curves.png"):
        assert (Path("study") / name).is_file()
    card = Path("study/README.md").read_text()
    assert "Target set on other seeds by the stock arm." in card
    assert "`median`: twice the running median" in card


def test_a_module_is_a_script_too_and_the_perplexity_follows_from_the_loss(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(script).parent)
    options = ["--arms", "stock,adaptive", "--target", "0.3", "--quality", "eval_perplexity"]
    assert compare("-m", *options, flags=["train", "--learning_rate", "2e-3"]) == 0
    comparison = load()
    [task] = comparison["tasks"]
    stock = task["arms"][0]

    assert (task["task"], task["title"], comparison["script"][:2]) == ("train", "train", ["-m", "train"])
    assert stock["median_quality"] == pytest.approx(math.exp(stock["median_final_eval_loss"]))
    assert starts() == 6
    Path(script).write_text(Path(script).read_text() + "# changed\n")
    assert compare("-m", *options, flags=["train", "--learning_rate", "2e-3"]) == 0
    assert starts() == 12, "the module's text decides as a script's does"


@pytest.mark.slow
def test_a_second_call_only_makes_what_is_missing(script):
    assert compare(script, "--arms", "stock,adaptive", "--target", "0.3") == 0
    assert starts() == 6
    assert compare(script, "--arms", "stock,adaptive", "--target", "0.3") == 0
    assert starts() == 6
    Path("study/runs/train/adaptive/seed-1/result.json").unlink()
    assert compare(script, "--arms", "stock,adaptive", "--target", "0.3") == 0
    assert starts() == 7
    assert compare(script, "--arms", "stock,adaptive", "--target", "0.3", flags=["--learning_rate", "2e-3"]) == 0
    assert starts() == 13  # other flags are other runs


def test_a_failed_run_is_shown_and_made_again(script, capsys):
    assert compare(script, "--arms", "stock,adaptive", "--target", "0.3", flags=["--break_at", "1"]) == 1
    [task] = load()["tasks"]
    errors = [s["error"] for e in task["arms"] for s in e["seeds"]]
    assert errors == [None, "exit code 3: the disk is on fire", None] * 2
    assert task["arms"][1]["ratio_step"]["ratios"] != []
    assert "(1 failed)" in capsys.readouterr().out
    before = starts()
    assert compare(script, "--arms", "stock,adaptive", "--target", "0.3", flags=["--break_at", "1"]) == 1
    assert starts() == before + 2


@pytest.mark.slow
def test_the_baseline_is_tuned_coordinate_by_coordinate_on_other_seeds(script):
    assert compare(script, "--arms", "stock,tuned,adaptive-tuned", flags=["--learning_rate", "1e-3"]) == 0
    tuned = json.loads(Path("study/script_tuned.json").read_text())
    assert tuned["tuned"]["chosen"] == {"--max_grad_norm": 0.3, "--warmup_steps": 0.3, "--learning_rate": 4e-3}
    assert len(tuned["tuned"]["tried"]) == len(tuned["adaptive-tuned"]["tried"]) == 5 + 4 + 3
    assert tuned["tuned"]["seeds"] == [100, 101]
    [task] = load()["tasks"]
    stock, best, adaptive = task["arms"]
    assert (stock["reached"], best["reached"], adaptive["reached"]) == (0, 3, 3)  # the target is the tuned arm's
    assert adaptive["median_step"] < best["median_step"]
    assert "Target set on other seeds by the tuned stock arm." in task["baseline"]
    before = starts()
    assert compare(script, "--arms", "stock,tuned,adaptive-tuned", flags=["--learning_rate", "1e-3"]) == 0
    assert starts() == before


def test_the_rates_of_the_tuning_and_the_launcher_can_be_given(script, tmp_path):
    launcher = tmp_path / "launch.sh"
    launcher.write_text(f'#!/bin/sh\necho launched >> launches.txt\nexec {sys.executable} "$@"\n')
    launcher.chmod(0o755)
    options = ["--arms", "stock,tuned", "--seeds", "1", "--rates", "3e-3", "4e-3", "--launcher", f"{launcher} -B"]

    assert main(["compare", "--output", "study", *options, "--", script]) == 0
    tried = json.loads(Path("study/script_tuned.json").read_text())["tuned"]["tried"]
    assert {t["--learning_rate"] for t in tried} == {3e-3, 4e-3}
    assert len(Path("launches.txt").read_text().splitlines()) == starts()


def test_arms_of_ones_own_and_a_metric_that_grows(script):
    options = ["--arms", "stock", "--arm", "fast=--clip adaptive --learning_rate 4e-3"]
    options += ["--target", "0.9", "--target-metric", "eval_accuracy", "--greater-is-better"]
    assert compare(script, *options) == 0
    [task] = load()["tasks"]
    assert [e["arm"] for e in task["arms"]] == ["stock", "fast"]
    assert [e["reached"] for e in task["arms"]] == [0, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arms", "stock,adaptiv"], "'adaptiv' is not"),
        (["--arm", "x"], "`--arm` must be NAME=FLAGS"),
        (
            ["--arms", "stock", "--target-metric", "eval_f1"],
            "must be one of eval_accuracy, eval_loss, but is 'eval_f1'",
        ),
    ],
)
def test_wrong_input_says_what_to_do(script, capsys, options, message):
    assert compare(script, *options) == 2
    assert message in capsys.readouterr().err


def test_a_script_that_is_not_there(script, capsys):
    assert compare("nothing.py") == 2
    assert "`script` must be a file" in capsys.readouterr().err


def test_a_run_that_was_cut_off_goes_on_from_its_checkpoint_and_starts_afresh_without_one(script):
    run = ScriptRun("train", "stock", 0, (sys.executable,), (script,), ())
    folder = Path("study") / run.folder
    [first] = run_scripts([run], Path("study"), jobs=1, quiet=True)
    assert "error" not in first
    (folder / "result.json").unlink()
    (folder / "kept.txt").write_text("")
    run_scripts([run], Path("study"), jobs=1, quiet=True)
    assert not (folder / "kept.txt").exists()
    (folder / "result.json").unlink()
    (folder / "checkpoint-5").mkdir()
    (folder / "kept.txt").write_text("")
    run_scripts([run], Path("study"), jobs=1, quiet=True)
    assert (folder / "kept.txt").exists()


def test_a_stock_trainers_own_log_will_do(tmp_path):
    history = [{"loss": 2.0, "step": 5}, {"eval_loss": 1.5, "eval_accuracy": 0.4, "step": 10}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    [point] = read_run(tmp_path)["points"]
    assert (point["step"], point["train_seconds"], point["metrics"]["eval_loss"]) == (10, None, 1.5)
    (tmp_path / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="the script must evaluate during training"):
        read_run(tmp_path)


@pytest.mark.slow
def test_a_real_script_is_compared(tmp_path, monkeypatch):
    """Through the whole of it: run_clm on Python's manual, two arms."""
    from pydoc_data.topics import topics

    (tmp_path / "notes.txt").write_text("\n".join(" ".join(t.split()) for t in list(topics.values())[:60]))
    shape = "hidden_size=32,intermediate_size=64,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=2"
    flags = ["--train_file", "notes.txt", "--train_tokenizer", "300", "--block_size", "32", "--do_train", "--do_eval"]
    flags += ["--max_steps", "30", "--learning_rate", "3e-3", "--config_overrides", shape, "--eval_strategy", "steps"]
    flags += [
        "--eval_steps",
        "10",
        "--report_to",
        "none",
        "--save_strategy",
        "no",
        "--use_cpu",
        "--disable_tqdm",
        "true",
    ]
    flags += ["--max_eval_samples", "32"]
    command = [
        sys.executable,
        "-m",
        "hf_adaclip.cli",
        "compare",
        "--output",
        "study",
        "--seeds",
        "1",
        "--target",
        "5.4",
    ]
    command += ["--arms", "stock,adaptive", "--", str(ROOT / "scripts/run_clm.py"), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    comparison = json.loads((tmp_path / "study/comparison.json").read_text())
    [task] = comparison["tasks"]
    assert [len(e["seeds"]) for e in task["arms"]] == [1, 1]
    assert all(s["ledger"]["verified"] for s in task["arms"][1]["seeds"])
    assert task["arms"][1]["seeds"][0]["clipped"] is not None
    assert comparison["device"] == "cpu"


@pytest.mark.parametrize(
    ("script", "title"),
    [
        (
            ("a/b/run_glue.py", "--task_name", "rte", "--model_name_or_path", "/data/models/tiny-bert"),
            "run_glue: rte, tiny-bert",
        ),
        (("t.py", "--dataset_name=me/digits", "--lr", "1"), "t: digits"),
        (("/very/long/" + "x" * 200 + "/train.py", "--output_dir", "/y" * 100), "train"),
        (("t.py", "--model_name_or_path", "m" * 100), "t"),
        (("t.py", "--task_name"), "t"),
    ],
)
def test_the_title_is_a_short_name(script, title):
    from hf_adaclip.compare.present import MAX_TITLE
    from hf_adaclip.compare.study import _short_title

    assert _short_title(script) == title
    assert len(title) <= MAX_TITLE


@pytest.mark.parametrize("title", ["run.py --a /some/where/very/far/away --b 3 --c " + "x" * 90, "w " * 70])
def test_long_titles_of_older_comparisons_are_shortened(title):
    from hf_adaclip.compare.present import MAX_TITLE, title_of

    assert 0 < len(title_of({"title": title, "task": "run"})) <= MAX_TITLE


@pytest.mark.parametrize(("quality", "there"), [("loss", False), ("accuracy", True), ("perplexity", True)])
def test_the_loss_has_one_column(quality, there):
    from hf_adaclip.compare.present import columns, table_rows

    seed = {"error": None, "clipped": 1, "skipped": 0, "total_steps": 10}
    entry = {
        **dict.fromkeys(
            ("median_step", "median_train_seconds", "median_energy_wh", "ratio_step", "ratio_train_seconds")
        ),
        "arm": "stock",
        "reached": 1,
        "seeds": [seed],
        "median_final_eval_loss": 0.5,
        "median_quality": 0.5,
    }
    labels = columns({"quality": quality})
    (row,) = table_rows({"quality": quality, "arms": [entry]})

    assert (quality in labels) == there
    assert "final loss" in labels
    assert len(row) == len(labels)
    assert row[labels.index("final loss")] == "0.500"
    assert row[labels.index("clipped")] == "10.0%"
