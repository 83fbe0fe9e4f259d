"""The script without a Trainer: the arms, checkpoints, two processes, and what they share with the others."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_adaclip.audit import verify_ledger
from hf_adaclip.errors import TrainingTroubleError
from hf_adaclip.telemetry.point import read_points
from tests.scripts.test_run_images_and_text import LLAMA, text  # noqa: F401 - a fixture

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent


def flags(folder, text, **changes):  # noqa: F811
    settings = {
        "output_dir": folder,
        "train_file": text / "train.txt",
        "train_tokenizer": 300,
        "config_overrides": LLAMA,
        "block_size": 32,
        "do_train": True,
        "do_eval": True,
        "max_steps": 30,
        "eval_steps": 10,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "learning_rate": 3e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return ["--task", "clm", *(str(part) for name, value in settings.items() for part in (f"--{name}", value))]


def run(script, listed, *launcher):
    command = [*(launcher or (sys.executable,)), str(ROOT / "scripts" / script), *listed]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def ledger_steps(folder):
    lines = (folder / "clip_ledger.jsonl").read_text().splitlines()
    return [line["step"] for line in map(json.loads, lines) if line["kind"] == "step"]


@pytest.mark.parametrize("clip", ["stock", "adaptive"])
def test_each_arm_trains_and_leaves_what_the_trainer_leaves(here, tmp_path, text, clip):  # noqa: F811
    here("no_trainer", flags(tmp_path / "out", text, clip=clip, warmup_steps=0.1))
    found = results(tmp_path / "out")
    points = read_points(tmp_path / "out/convergence.jsonl")

    assert [p.step for p in points] == [10, 20, 30]
    assert points[-1].metrics["eval_loss"] < points[0].metrics["eval_loss"] < math.log(300) + 0.2
    assert points[-1].train_seconds > points[0].train_seconds > 0
    assert found["eval_perplexity"] == pytest.approx(math.exp(found["eval_loss"]), rel=1e-6)
    assert found["eval_loss"] == points[-1].metrics["eval_loss"]
    assert (tmp_path / "out/model.safetensors").is_file()
    ledger = tmp_path / "out/clip_ledger.jsonl"
    assert ledger.is_file() == (clip == "adaptive")
    card = (tmp_path / "out/README.md").read_text()
    assert "eval_perplexity" in card
    if clip == "adaptive":
        report = verify_ledger(ledger)
        assert (report.ok, report.steps, report.closed) == (True, 30, True)
        assert "hf-adaclip verify" in card or "Ledger" in card or "ledger" in card


def test_a_run_that_was_cut_off_goes_on_bit_for_bit_where_that_is_asked_for(here, tmp_path, text, caplog):  # noqa: F811
    settings = {
        "save_strategy": "steps",
        "save_steps": 7,
        "gradient_accumulation_steps": 2,
        "clip": "adaptive",
    }
    here("no_trainer", flags(tmp_path / "whole", text, **settings))
    for name in ("cut", "anew"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
    for name in ("checkpoint-28", "checkpoint-21"):
        shutil.rmtree(tmp_path / "cut" / name)
    here("no_trainer", flags(tmp_path / "cut", text, resume_from_checkpoint="last", **settings))
    assert not [r for r in caplog.records if "stays unused" in r.getMessage()]
    here("no_trainer", flags(tmp_path / "anew", text, save_total_limit=1, **settings))

    assert [len(ledger_steps(tmp_path / name)) for name in ("cut", "anew")] == [30 + 16, 30 + 30]
    said = [r.getMessage() for r in caplog.records if "stays unused" in r.getMessage()]
    newest = tmp_path / "anew/checkpoint-28"
    assert said == [f"{newest} stays unused. `--resume_from_checkpoint last` goes on from it."]
    assert newest.is_dir()  # the limit counts what this run saved
    whole = load_file(tmp_path / "whole/model.safetensors")
    for name in ("cut", "anew"):
        end = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(whole[k], end[k]) for k in whole)
        assert results(tmp_path / "whole")["eval_loss"] == results(tmp_path / name)["eval_loss"]
        report = verify_ledger(tmp_path / name / "clip_ledger.jsonl")
        assert report.ok, report.findings
        assert report.segments == 2
        assert [p.step for p in read_points(tmp_path / name / "convergence.jsonl")] == [10, 20, 30]


def test_over_several_epochs_of_a_trained_model_the_pace_goes_by_the_first(here, tmp_path, text, caplog):  # noqa: F811
    batches = {"block_size": 64, "per_device_train_batch_size": 64, "gradient_accumulation_steps": 4}
    epochs = {"max_steps": -1, "clip": "adaptive", "do_eval": False, **batches}
    here("no_trainer", flags(tmp_path / "first", text, num_train_epochs=3, **epochs))
    assert "by the first epoch alone" not in caplog.text
    loaded = flags(tmp_path / "then", text, num_train_epochs=3, model_name_or_path=tmp_path / "first", **epochs)
    made_anew = [loaded.index(flag) for flag in ("--train_tokenizer", "--config_overrides")]
    here("no_trainer", [part for i, part in enumerate(loaded) if not any(0 <= i - at <= 1 for at in made_anew)])

    assert (
        "The pace goes by the first epoch alone and there is no threshold above 1: this run plans 3 or more"
        in caplog.text
    )
    headers = [
        json.loads((tmp_path / name / "clip_ledger.jsonl").read_text().splitlines()[0])["config"]
        for name in ("first", "then")
    ]
    assert [header["max_threshold"] for header in headers] == [None, 1.0]


def test_the_last_checkpoint_of_a_new_folder_is_its_start(here, tmp_path, text):  # noqa: F811
    here("no_trainer", flags(tmp_path / "out", text, resume_from_checkpoint="last", max_steps=4, do_eval=False))
    assert len(ledger_steps(tmp_path / "out")) == 4


@pytest.mark.parametrize(("given", "said"), [([], "but is not given"), (["--task", "gluee"], "but is 'gluee'")])
def test_a_task_that_is_none_is_an_error(here, given, said):
    with pytest.raises(ValueError, match=f"`--task` must be one of glue, clm, image_classification, {said}"):
        here("no_trainer", [*given, "--task_name", "mrpc"])


def test_two_processes(tmp_path, text):  # noqa: F811
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    run(
        "no_trainer.py",
        flags(tmp_path / "out", text, clip="adaptive", per_device_train_batch_size=4),
        *launcher,
    )
    report = verify_ledger(tmp_path / "out/clip_ledger.jsonl")
    header = json.loads((tmp_path / "out/clip_ledger.jsonl").read_text().splitlines()[0])
    assert report.ok, report.findings
    assert (report.segments, report.steps, header["world_size"]) == (1, 30, 2)
    assert results(tmp_path / "out")["eval_loss"] < math.log(300)
    assert [p.samples for p in read_points(tmp_path / "out/convergence.jsonl")] == [80, 160, 240]


def test_a_checkpoint_that_is_none_is_an_error(here, tmp_path, text):  # noqa: F811
    (tmp_path / "weights").mkdir()
    listed = flags(tmp_path / "out", text, resume_from_checkpoint=tmp_path / "weights")
    with pytest.raises(ValueError, match=r"must be a folder checkpoint-N or 'last', but is .*weights"):
        here("no_trainer", listed)
    listed = flags(tmp_path / "out", text, resume_from_checkpoint=tmp_path / "checkpoint-99")
    with pytest.raises(ValueError, match=r"must be a folder checkpoint-N or 'last', but is .*checkpoint-99"):
        here("no_trainer", listed)


def test_the_file_of_the_script_with_a_trainer_does_and_shows_loss_and_clipping(here, tmp_path, text, capsys, caplog):  # noqa: F811
    lines = {
        "train_file": text / "train.txt",
        "train_tokenizer": 300,
        "config_overrides": LLAMA,
        "block_size": 32,
        "do_train": "true",
        "do_eval": "true",
        "max_steps": 10,
        "report_to": "none",
        "save_strategy": '"no"',
        "logging_steps": 5,
        "label_smoothing_factor": 0.1,
        "use_cpu": "true",
        "clip": "zscore",
        "output_dir": tmp_path / "out",
    }
    (tmp_path / "run.yaml").write_text("".join(f"{k}: {v}\n" for k, v in lines.items()))
    here("run_clm", [tmp_path / "run.yaml"])
    shutil.rmtree(tmp_path / "out")
    capsys.readouterr()
    here("no_trainer", ["--task", "clm", tmp_path / "run.yaml"])

    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in shown] == ["step 5/10", "step 10/10", "step 10/10"]
    for name in ("loss", "grad_norm", "learning_rate", "epoch", "clip/threshold", "clip/fraction"):
        assert f"'{name}'" in shown[0]
    assert "eval_loss" in shown[2]
    ignored = [r.getMessage() for r in caplog.records if "does not follow" in r.getMessage()]
    assert ignored == ["This loop does not follow --label_smoothing_factor; the script with a Trainer does."]
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_what_only_records_ends_no_loop(here, tmp_path, text, caplog, monkeypatch):  # noqa: F811
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for name in ("append_point", "write_points", "_write_card"):
        monkeypatch.setattr(f"no_trainer.{name}", full)
    here("no_trainer", flags(tmp_path / "out", text, max_steps=20, save_strategy="steps", save_steps=10))
    said = [r.getMessage() for r in caplog.records if "could not be written" in r.getMessage()]
    assert [line.split()[0] for line in said] == ["convergence.jsonl", "README.md"]
    assert results(tmp_path / "out")["train_loss"] > 0


@pytest.mark.parametrize("script", ["run_clm", "no_trainer", "run_glue", "run_image_classification"])
def test_files_and_sizes_that_are_no_choice_are_refused(here, tmp_path, script):
    (tmp_path / "README.md").write_text("# text\n")
    task = ["--task", "clm"] if script == "no_trainer" else []
    common = [*task, "--output_dir", tmp_path / "out", "--use_cpu", "--config_overrides", "hidden_size=8"]
    with pytest.raises(ValueError, match=r"`--train_file` must end in .*, but .*README\.md ends in \.md"):
        here(script, ["--train_file", tmp_path / "README.md", *common])
    with pytest.raises(ValueError, match=r"`--train_file` must be a file, but .*gone\.parquet is not there"):
        here(script, ["--train_file", tmp_path / "gone.parquet", *common])
    rows = "text,label\n" + "a few words,0\nand some more,1\n" * 40
    (tmp_path / "rows.csv").write_text(rows)
    tokenizer = ["--train_tokenizer", 300] if script in ("run_clm", "no_trainer") else []
    kept = tmp_path / "rows.csv" if "image" not in script else tmp_path / "gone.parquet"
    with pytest.raises(ValueError, match="`--model_name_or_path` or `--config_overrides` must be given"):
        here(script, ["--train_file", kept, *tokenizer, *common[:-2]])


@pytest.mark.parametrize(
    ("given", "expected"), [([], "no"), (["--bf16"], "bf16"), (["--mixed_precision", "bf16"], "bf16")]
)
def test_the_precision_of_a_loop(here, tmp_path, given, expected):
    from transformers import HfArgumentParser

    from scripts.no_trainer_arguments import LoopArguments

    (arguments,) = HfArgumentParser((LoopArguments,)).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", *given]
    )
    assert arguments.mixed_precision == expected
    assert arguments.ignored == []


def test_the_loop_goes_back_and_leaves_out_what_it_is_told(here, tmp_path, text, monkeypatch):  # noqa: F811
    more = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1}

    def planted(self):
        return 22 if self._run.step == 25 and not self.history else None

    monkeypatch.setattr("hf_adaclip.incidents.rewind.Rewinder._agreed", planted)
    saved = {"save_strategy": "steps", "save_steps": 5}
    clip = {"clip": "adaptive:snapshot_steps=5", "clip_on_trouble": "rewind"}
    here("no_trainer", flags(tmp_path / "back", text, **clip, **more, **saved))
    undone = json.loads((tmp_path / "back/skip_batches.json").read_text())["steps"]
    assert undone == [*range(10, 25)]
    names = {path.name for path in (tmp_path / "back").glob("*checkpoint-*")}
    assert names == {f"{'undone-' if 10 < n < 25 else ''}checkpoint-{n}" for n in range(5, 31, 5)}

    (tmp_path / "never").mkdir()
    (tmp_path / "never/skip_batches.json").write_text(json.dumps({"steps": undone}))
    here("no_trainer", flags(tmp_path / "never", text, clip="adaptive", **more))
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("back", "never")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    records = [json.loads(line) for line in (tmp_path / "never/clip_ledger.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r.get("reason") == "LEFT_OUT"] == undone
    for name in ("back", "never"):
        report = verify_ledger(tmp_path / name / "clip_ledger.jsonl")
        assert (report.status, report.steps) == ("verified", 30)

    # Not to go on once more: the good weights are kept, and the script ends with what was tried.
    with pytest.raises(TrainingTroubleError, match=r"`max_rewinds` \(0\) is spent"):
        here(
            "no_trainer",
            flags(tmp_path / "end", text, **{**clip, "clip": "adaptive:snapshot_steps=5,max_rewinds=0"}, **more),
        )
    assert (tmp_path / "end/checkpoint-25").is_dir()
