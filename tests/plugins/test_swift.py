"""ms-swift's own command on its own YAML, with the callback in it."""

import json
import shutil
import subprocess

import pytest
import torch

from tests.plugins.launched import PYTHON, execute, saved_weights, verified
from tests.plugins.tiny import save_tiny

pytestmark = [pytest.mark.plugins, pytest.mark.slow]
YAML = """
model: model
model_type: llama
template: chatml
tuner_type: full
dataset: [data.jsonl]
output_dir: out
add_version: false
max_length: 128
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
max_steps: 12
save_steps: 6
save_strategy: steps
learning_rate: 0.001
lr_scheduler_type: constant
logging_steps: 1
torch_dtype: float32
attn_impl: sdpa
report_to: none
use_cpu: true
use_hf: true
eval_strategy: 'no'
split_dataset_ratio: 0
dataset_num_proc: 1
dataloader_num_workers: 0
gradient_checkpointing: false
seed: 1
"""


@pytest.fixture
def train(tmp_path):
    save_tiny(tmp_path / "model", tmp_path / "rows.jsonl")
    plugin = subprocess.run(
        [PYTHON, "-m", "hf_adaclip.integrations.swift_plugin"], capture_output=True, text=True, check=True
    ).stdout.strip()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    with (tmp_path / "data.jsonl").open("w") as file:
        for row in rows:
            turns = [("user", row["instruction"]), ("assistant", row["output"])]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")

    def trained(name, lines, *, ours=False, check=0, clip=None):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for given in ("model", "data.jsonl"):
            if not (folder / given).exists():
                (folder / given).symlink_to(tmp_path / given)
        keys = f"external_plugins: [{plugin}]\ncallbacks: [adaclip]\n" if ours else ""
        keys += f"ENV:\n  HF_ADACLIP: '{clip}'\n" if clip else ""
        (folder / "config.yaml").write_text(YAML + keys + lines)
        variables = {"CUDA_VISIBLE_DEVICES": "", "MODELSCOPE_CACHE": str(tmp_path / "cache")}
        command = (PYTHON, "-m", "swift.cli.main", "sft", "config.yaml")
        return folder, execute(command, folder, check=check, **variables)

    return trained


def test_a_run_from_yaml_is_clipped_recorded_and_resumed(train):
    stock, _ = train("stock", "max_grad_norm: 1.0\n")
    tight_stock, _ = train("stock-tight", "max_grad_norm: 0.05\n")
    tight = {"ours": True, "clip": "static:static_threshold=0.05"}
    ours, done = train("ours", "", **tight)

    assert (done.stdout + done.stderr).count("hf-adaclip: ") == 1
    end = "out/checkpoint-12"
    assert torch.equal(saved_weights(ours / end), saved_weights(tight_stock / end))
    assert not torch.equal(saved_weights(ours / end), saved_weights(stock / end))
    verified(ours / "out/clip_ledger.jsonl", steps=12)
    logged = json.loads((ours / end / "trainer_state.json").read_text())["log_history"]
    assert any("clip/threshold" in entry for entry in logged)

    whole = saved_weights(ours / end)
    shutil.rmtree(ours / end)
    train("ours", "resume_from_checkpoint: out/checkpoint-6\n", **tight)
    assert torch.equal(saved_weights(ours / end), whole)
    verified(ours / "out/clip_ledger.jsonl")


def test_a_wrong_setting_is_refused(train):
    _, done = train("wrong", "", ours=True, clip="zscore:z_treshold=3", check=1)
    assert "Did you mean `z_threshold`?" in done.stdout + done.stderr
