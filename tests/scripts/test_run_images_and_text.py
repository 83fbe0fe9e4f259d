"""`scripts/run_image_classification.py` and `scripts/run_clm.py`, by real runs on scikit-learn's digits and Python's manual."""

import json
import math
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pictures
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from hf_adaclip.audit import verify_ledger
from scripts import run_clm, run_image_classification
from tests.scripts.conftest import after_ten

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
TRAINING = {
    "max_steps": 30,
    "per_device_train_batch_size": 16,
    "eval_strategy": "steps",
    "eval_steps": 15,
    "save_strategy": "no",
    "report_to": "none",
    "clip": "adaptive",
}
VIT = "image_size=8,patch_size=2,num_channels=1,hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=64"
LLAMA = "hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=2,num_key_value_heads=2"


def flags(output, **settings):
    given = {**TRAINING, "output_dir": output, **settings}
    given["clip"] = after_ten(given["clip"])
    listed = [f"--{k}={v}" for k, v in given.items()]
    return ["--do_train", "--do_eval", "--use_cpu", "--disable_tqdm=True", *listed]


def weights(folder):
    tensors = load_file(folder / "model.safetensors")
    return torch.cat([tensors[k].flatten() for k in sorted(tensors)])


def digits(count, first=0):
    data = load_digits()
    pictures = [Pictures.fromarray((x * 15.9).astype(np.uint8)) for x in data.images[first : first + count]]
    return pictures, data.target[first : first + count].tolist()


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    features = Features({"picture": Image(), "label": ClassLabel(names=[f"digit {i}" for i in range(10)])})
    for name, count, first in (("train", 480, 0), ("validation", 100, 480)):
        pictures, labels = digits(count, first)
        Dataset.from_dict({"picture": pictures, "label": labels}, features=features).to_parquet(
            folder / f"{name}.parquet"
        )
    return {"train_file": folder / "train.parquet", "validation_file": folder / "validation.parquet"}


@pytest.mark.parametrize("clip", ["adaptive", "stock"])
def test_a_vision_transformer_learns_the_digits(tmp_path, parquet, clip):
    settings = {"config_overrides": VIT, "learning_rate": 5e-3, "max_steps": 300, "random_flip": False, "clip": clip}
    results = run_image_classification.main(flags(tmp_path / "out", **parquet, **settings))

    assert results["eval_accuracy"] > 0.35  # chance is 0.1
    assert json.loads((tmp_path / "out/all_results.json").read_text())["eval_accuracy"] == results["eval_accuracy"]
    assert json.loads((tmp_path / "out/config.json").read_text())["id2label"]["3"] == "digit 3"
    if clip == "adaptive":
        assert verify_ledger(tmp_path / "out/clip_ledger.jsonl").ok


def test_images_are_mirrored_by_the_generator_that_a_checkpoint_keeps(parquet):
    rows = run_image_classification.load_splits(
        run_image_classification.DataArguments(train_file=str(parquet["train_file"]))
    )[0]
    making = {"size": 8, "mean": [0.5], "std": [0.5]}
    mirrored = run_image_classification.with_pixels(rows, "picture", "label", making, flip=True)
    torch.manual_seed(0)
    first = mirrored[:32]["pixel_values"]
    torch.manual_seed(0)
    again = mirrored[:32]["pixel_values"]
    plain = run_image_classification.with_pixels(rows, "picture", "label", making, flip=False)[:32]["pixel_values"]
    changed = [not np.array_equal(a, b) for a, b in zip(first, plain, strict=True)]

    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert 5 < sum(changed) < 27
    assert all(np.array_equal(a[..., ::-1], b) for a, b, c in zip(first, plain, changed, strict=True) if c)


def test_a_folder_of_images_per_class_with_nothing_to_evaluate_on(tmp_path):
    for i, (picture, label) in enumerate(zip(*digits(60), strict=True)):
        (tmp_path / f"images/{label}").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / f"images/{label}/{i}.png")
    settings = {"config_overrides": VIT, "train_dir": tmp_path / "images", "max_steps": 4, "eval_steps": 4}
    results = run_image_classification.main(flags(tmp_path / "out", **settings))

    assert results["train_samples"] == 51
    assert results["eval_samples"] == 9  # held out


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    paragraphs = [p for name in sorted(topics) for p in topics[name].split("\n\n") if len(p) > 40]
    (folder / "train.txt").write_text("\n".join(p.replace("\n", " ") for p in paragraphs[:400]))
    rows = [{"question": p.replace("\n", " ")[:60], "answer": p.replace("\n", " ")[60:]} for p in paragraphs[400:460]]
    (folder / "pairs.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_llama_from_scratch_with_a_tokenizer_trained_here_and_then_lora_on_it(tmp_path, text):
    settings = {
        "train_file": text / "train.txt",
        "train_tokenizer": 400,
        "config_overrides": LLAMA,
        "block_size": 32,
        "learning_rate": 3e-3,
        "max_steps": 60,
    }
    results = run_clm.main(flags(tmp_path / "base", **settings))
    assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    assert results["eval_perplexity"] < 200
    assert verify_ledger(tmp_path / "base/clip_ledger.jsonl").ok

    run_clm.main(flags(tmp_path / "again", **settings))
    assert torch.equal(weights(tmp_path / "base"), weights(tmp_path / "again"))  # tokenizer and all

    pytest.importorskip("peft")
    tuning = {
        "model_name_or_path": tmp_path / "base",
        "train_file": text / "pairs.json",
        "text_columns": "question,answer",
        "lora_r": 4,
        "block_size": 16,
    }
    tuned = run_clm.main(flags(tmp_path / "lora", **tuning))
    assert math.isfinite(tuned["eval_loss"])
    assert (tmp_path / "lora/adapter_model.safetensors").is_file()
    assert verify_ledger(tmp_path / "lora/clip_ledger.jsonl").ok


def test_text_resumes_bit_for_bit(tmp_path, text):
    settings = {
        "train_file": text / "train.txt",
        "train_tokenizer": 300,
        "config_overrides": LLAMA,
        "block_size": 32,
        "save_strategy": "steps",
        "save_steps": 15,
    }
    run_clm.main(flags(tmp_path / "whole", **settings))
    checkpoint = tmp_path / "whole/checkpoint-15"
    run_clm.main(flags(tmp_path / "parts", resume_from_checkpoint=checkpoint, **settings))

    assert torch.equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_wrong_arguments_are_refused_with_what_is_right(tmp_path, parquet, text):
    with pytest.raises(ValueError, match="`--label_column_name` must be one of picture, label"):
        run_image_classification.main(flags(tmp_path / "a", label_column_name="y", config_overrides=VIT, **parquet))
    with pytest.raises(ValueError, match="`--text_columns` must be among text, but body is not"):
        run_clm.main(flags(tmp_path / "b", train_file=text / "train.txt", text_columns="body"))
    with pytest.raises(ValueError, match="`--train_tokenizer` or `--tokenizer_name` must be given"):
        run_clm.main(flags(tmp_path / "c", train_file=text / "train.txt"))
    for script in (run_clm, run_image_classification):
        with pytest.raises(ValueError, match="must be given"):
            script.main(["--output_dir=x"])


@pytest.mark.parametrize("name", ["run_clm", "run_image_classification"])
def test_they_run_as_files_from_anywhere_and_explain_themselves(tmp_path, name):
    command = [sys.executable, str(ROOT / f"scripts/{name}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr
    assert "--clip" in done.stdout


def test_images_without_a_trainer(here, tmp_path, parquet):
    settings = {
        "config_overrides": VIT,
        "learning_rate": 5e-3,
        "max_steps": 200,
        "random_flip": False,
        "eval_steps": 100,
    }
    dropped = ("--eval_strategy", "--save_strategy", "--report_to")
    listed = [f for f in flags(tmp_path / "out", **parquet, **settings) if not f.startswith(dropped)]
    listed = ["--task", "image_classification", *listed]

    assert here("no_trainer", listed)["eval_accuracy"] > 0.2  # ten classes
    assert verify_ledger(tmp_path / "out/clip_ledger.jsonl").ok
