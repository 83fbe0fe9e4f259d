"""LLaMA-Factory's own command on its own YAML: it has no hook, so it is run by `hf-adaclip run`."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.plugins.launched import PYTHON, RUN, TIGHT, execute, saved_weights, verified
from tests.plugins.tiny import save_tiny

pytestmark = [pytest.mark.plugins, pytest.mark.slow]
COMMAND = (Path(PYTHON).parent / "llamafactory-cli", "train", "config.yaml")
YAML = """
model_name_or_path: model
stage: sft
do_train: true
finetuning_type: full
template: empty
dataset: rows
dataset_dir: .
cutoff_len: 64
output_dir: out
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
max_steps: 12
save_steps: 6
learning_rate: 0.001
lr_scheduler_type: constant
logging_steps: 1
report_to: none
use_cpu: true
preprocessing_num_workers: 1
dataloader_num_workers: 0
seed: 1
"""


@pytest.fixture
def train(tmp_path):
    save_tiny(tmp_path / "model", tmp_path / "data.jsonl")
    # It imports torchaudio at the top of a module, uses it for audio only, and no build of it goes with a CPU build of torch 2.13.
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in/torchaudio.py").touch()
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "data.jsonl"}}))

    def trained(name, lines, *launcher, **variables):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for given in ("model", "data.jsonl", "dataset_info.json"):
            if not (folder / given).exists():
                (folder / given).symlink_to(tmp_path / given)
        (folder / "config.yaml").write_text(YAML + lines)
        quiet = {"DISABLE_VERSION_CHECK": "1", "CUDA_VISIBLE_DEVICES": ""}
        return folder, execute((*launcher, *COMMAND), folder, tmp_path / "stand-in", **quiet, **variables)

    return trained


def test_a_run_from_yaml_is_clipped_recorded_and_resumed(train):
    stock, _ = train("stock", "max_grad_norm: 1.0\n")
    tight_stock, _ = train("stock-tight", "max_grad_norm: 0.05\n")
    ours, done = train("ours", "", *RUN, "--clip", TIGHT, "--")

    assert "hf-adaclip: attached to CustomSeq2SeqTrainer: controller static" in done.stderr
    assert torch.equal(saved_weights(ours / "out"), saved_weights(tight_stock / "out"))
    assert not torch.equal(saved_weights(ours / "out"), saved_weights(stock / "out"))
    verified(ours / "out/clip_ledger.jsonl", steps=12)

    whole = saved_weights(ours / "out")
    shutil.rmtree(ours / "out/checkpoint-12")
    for path in (ours / "out").glob("*.safetensors"):
        path.unlink()
    train("ours", "resume_from_checkpoint: out/checkpoint-6\n", HF_ADACLIP=TIGHT)
    assert torch.equal(saved_weights(ours / "out"), whole)
    verified(ours / "out/clip_ledger.jsonl")


def test_its_torchrun_child_is_attached(train):
    launched = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "1"}
    folder, done = train("child", "", *RUN, "--clip", TIGHT, "--", **launched)
    assert "hf-adaclip: attached to CustomSeq2SeqTrainer" in done.stderr
    verified(folder / "out/clip_ledger.jsonl", steps=12)
