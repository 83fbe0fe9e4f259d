"""`scripts/run_glue.py`, by real runs on generated sentences with a model that is made from a config."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_adaclip.audit import verify_ledger
from hf_adaclip.integrations.script_args import run_script
from hf_adaclip.telemetry.point import read_points
from scripts import run_glue
from tests.scripts.conftest import after_ten

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
WORDS = ["good", "bad", "film", "plot", "a", "the", "very", "not", "actor", "end"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    return folder


def rows(task, count, seed):
    """Sentences whose label is whether they say 'good' more often than 'bad' (for stsb: how much more)."""
    rng = np.random.default_rng(seed)
    result = []
    for i in range(count):
        texts = [" ".join(rng.choice(WORDS, 8)) for _ in range(2)]
        margin = sum(t.split().count("good") - t.split().count("bad") for t in texts)
        label = float(np.clip(2.5 + margin, 0, 5)) if task == "stsb" else int(margin > 0)
        if task == "mnli":
            label = int(margin > 0) + int(margin > 1)
        first, second = run_glue.SENTENCES[task]
        result.append({first: texts[0], **({second: texts[1]} if second else {}), "label": label, "idx": i})
    return result


@pytest.fixture
def files(tmp_path):
    def write(task, kind="json"):
        paths = []
        for name, count, seed in (("train", 256, 0), ("validation", 64, 1)):
            path = tmp_path / f"{task}-{name}.{kind}"
            data = rows(task, count, seed)
            if kind == "csv":
                lines = [",".join(data[0]), *(",".join(map(str, row.values())) for row in data)]
                path.write_text("\n".join(lines) + "\n")
            else:
                path.write_text("".join(json.dumps(row) + "\n" for row in data))
            paths.append(str(path))
        return paths

    return write


def flags(tokenizer, files, output, **changes):
    settings = {
        "tokenizer_name": str(tokenizer),
        "model_type": "bert",
        "config_overrides": "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32",
        "train_file": files[0],
        "validation_file": files[1],
        "max_seq_length": 24,
        "output_dir": str(output),
        "max_steps": 24,
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-3,
        "eval_strategy": "steps",
        "eval_steps": 12,
        "save_strategy": "no",
        "report_to": "none",
        "clip": "adaptive",
        **changes,
    }
    settings["clip"] = after_ten(settings["clip"])
    listed = [f"--{k}={v}" for k, v in settings.items() if v is not None]
    return ["--do_train", "--do_eval", "--use_cpu", "--disable_tqdm=True", *listed]


@pytest.mark.parametrize("clip", ["adaptive", "zscore", "static", "stock", "none"])
def test_every_arm_trains_and_leaves_its_files(tmp_path, tokenizer, files, clip):
    results = run_glue.main(flags(tokenizer, files("sst2"), tmp_path / "out", clip=clip, task_name="sst2"))
    saved = json.loads((tmp_path / "out/all_results.json").read_text())

    assert saved["eval_accuracy"] == results["eval_accuracy"]
    assert {p.step for p in read_points(tmp_path / "out/convergence.jsonl")} >= {12, 24}
    assert (tmp_path / "out/README.md").is_file()
    ledger = tmp_path / "out/clip_ledger.jsonl"
    assert ledger.is_file() == (clip not in ("stock", "none"))
    if ledger.is_file():
        report = verify_ledger(ledger)
        assert report.ok, report.findings
        assert json.loads(ledger.read_text().splitlines()[0])["controller"] == clip


@pytest.mark.parametrize("task", sorted(run_glue.SENTENCES))
def test_all_nine_tasks_measure_what_glue_measures(tmp_path, tokenizer, files, task):
    short = {"max_steps": 4, "eval_steps": 4, "task_name": task}
    results = run_glue.main(flags(tokenizer, files(task), tmp_path / "out", **short))
    names = {"pearson_spearman": ("pearson", "spearman")}
    expected = {f"eval_{n}" for metric in run_glue.METRICS[task] for n in names.get(metric, (metric,))}

    assert expected <= set(results)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert len(config.get("id2label", "01")) == {"stsb": 1, "mnli": 3}.get(task, 2)


def test_the_same_command_gives_the_same_numbers_bit_for_bit(tmp_path, tokenizer, files):
    data = files("sst2")
    ends = []
    for name in ("a", "b"):
        run_glue.main(
            flags(
                tokenizer, data, tmp_path / name, clip="adaptive:max_pace=2,warmup_observations=10", task_name="sst2"
            )
        )
        lines = [json.loads(x) for x in (tmp_path / name / "clip_ledger.jsonl").read_text().splitlines()]
        steps = [{k: v for k, v in x.items() if k != "time"} for x in lines if x["kind"] == "step"]
        ends.append((steps, (tmp_path / name / "model.safetensors").read_bytes()))
    assert ends[0] == ends[1]


def test_it_resumes_from_the_last_checkpoint_of_its_folder(tmp_path, tokenizer, files):
    data = files("sst2", "csv")
    saving = {"save_strategy": "steps", "save_steps": 12}
    whole = run_glue.main(flags(tokenizer, data, tmp_path / "whole", **saving))
    run_glue.main(flags(tokenizer, data, tmp_path / "parts", **saving))
    for path in sorted((tmp_path / "parts/checkpoint-24").rglob("*"), reverse=True):
        path.unlink()
    (tmp_path / "parts/checkpoint-24").rmdir()
    parts = run_glue.main(flags(tokenizer, data, tmp_path / "parts", **saving))

    assert parts["eval_loss"] == whole["eval_loss"]
    report = verify_ledger(tmp_path / "parts/clip_ledger.jsonl")
    assert report.ok, report.findings
    assert (report.segments, report.steps) == (2, 36)


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_arguments_may_stand_in_a_file(tmp_path, tokenizer, files, kind):
    listed = flags(tokenizer, files("sst2"), tmp_path / "out", max_steps=4, eval_steps=4)
    settings = {}
    for flag in listed:
        key, _, value = flag.removeprefix("--").partition("=")
        settings[key] = value if not value.replace(".", "").replace("e-", "").isdigit() else float(value)
        if value == "" or value == "True":
            settings[key] = True
        elif value.isdigit():
            settings[key] = int(value)
    path = tmp_path / f"settings.{kind}"
    path.write_text(json.dumps(settings))  # every JSON is YAML
    assert "eval_accuracy" in run_glue.main([str(path)])


def test_wrong_arguments_are_refused_with_what_is_right(tmp_path, tokenizer, files):
    with pytest.raises(ValueError, match="`--task_name` must be one of cola"):
        run_glue.main(["--task_name=imdb", "--output_dir=x"])
    with pytest.raises(ValueError, match="must be given, but none is"):
        run_glue.main(["--output_dir=x"])
    with pytest.raises(ValueError, match="`--clip` must be one of stock, none, adaptive"):
        run_glue.main(flags(tokenizer, files("sst2"), tmp_path / "out", clip="adaptiv"))


def test_it_runs_as_a_file_from_anywhere_and_explains_itself(tmp_path):
    command = [sys.executable, str(ROOT / "scripts/run_glue.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr
    for flag in (
        "--clip",
        "--clip_max_threshold",
        "--task_name",
        "--train_file",
        "--config_overrides",
        "--max_grad_norm",
    ):
        assert flag in done.stdout


@pytest.mark.parametrize("task", ["mrpc", "stsb"])
def test_without_a_trainer(here, tmp_path, tokenizer, files, task):
    settings = {"task_name": task, "eval_strategy": None, "save_strategy": None, "report_to": None}
    found = here("no_trainer", ["--task", "glue", *flags(tokenizer, files(task), tmp_path / "out", **settings)])

    expected = {"mrpc": {"eval_accuracy", "eval_f1"}, "stsb": {"eval_pearson"}}[task]
    assert expected <= set(found), found
    assert found == json.loads((tmp_path / "out/all_results.json").read_text())
    assert [p.step for p in read_points(tmp_path / "out/convergence.jsonl")] == [12, 24]
    assert verify_ledger(tmp_path / "out/clip_ledger.jsonl").ok


@pytest.mark.parametrize("script", ["run_glue", "no_trainer"])
def test_a_log_that_is_no_terminal_has_lines_and_no_bars(here, capfd, tmp_path, tokenizer, files, script):
    listed = flags(tokenizer, files("cola"), tmp_path / "out", task_name="cola", logging_steps=12)
    task = ["--task", "glue"] if script == "no_trainer" else []
    here(script, [*task, *(f for f in listed if not f.startswith("--disable_tqdm"))])
    shown = "".join(capfd.readouterr())
    assert "\r" not in shown
    assert "clip/norm_max" in shown
    assert "eval_loss" in shown
    assert len(shown.splitlines()) < 60


def test_a_tokenizer_without_padding_pads_with_its_end(here, tmp_path, tokenizer, files):
    folder = tmp_path / "unpadded"
    words = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer, unk_token="[UNK]", eos_token="[SEP]"
    ).save_pretrained(folder)
    results = here(
        "run_glue", flags(folder, files("cola"), tmp_path / "out", task_name="cola", max_steps=4, eval_steps=4)
    )
    assert results["eval_loss"] > 0
    saved = json.loads((tmp_path / "out/config.json").read_text())
    assert saved["pad_token_id"] == words.convert_tokens_to_ids("[SEP]")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"task_name": "mrpc"},
            r"`--task_name` must name columns of the data \(sentence, label, idx\), but 'sentence1' is none",
        ),
        (
            {"config_overrides": "hiden_size=32"},
            "a setting of bert .*'hiden_size=32' is none. Did you mean `hidden_size`",
        ),
        ({"config_overrides": "hidden_size"}, "must name NAME=VALUE in each piece"),
        ({"config_overrides": "hidden_size=small"}, "must give hidden_size a value of its kind"),
        ({"clip": "zclip"}, "zclip is here 'zscore'"),
        ({"tokenizer_name": None}, "`--tokenizer_name` must be given"),
    ],
)
def test_wrong_settings_end_a_script_with_one_sentence(
    capsys, monkeypatch, tmp_path, tokenizer, files, changes, words
):
    listed = flags(tokenizer, files("sst2"), tmp_path / "out", **{"task_name": "sst2", **changes})
    monkeypatch.setattr(sys, "argv", ["run_glue.py", *listed])
    with pytest.raises(SystemExit, match="2"):
        run_script(run_glue.main)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("run_glue.py: ")
    assert re.search(words, said)
