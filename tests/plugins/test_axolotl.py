"""Axolotl's own command on its own YAML, with the plugin in it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.plugins.launched import PYTHON, execute, saved_weights, verified
from tests.plugins.tiny import save_tiny

pytestmark = [pytest.mark.plugins, pytest.mark.slow]
AXOLOTL = (PYTHON, "-m", "axolotl.cli.train")
PLUGIN = "plugins: [hf_adaclip.integrations.axolotl.AdaptiveClipPlugin]\n"
YAML = """
base_model: model
datasets: [{path: data.jsonl, ds_type: json, type: completion, field: text}]
dataset_prepared_path: prepared
output_dir: out
sequence_len: 128
micro_batch_size: 2
gradient_accumulation_steps: 2
max_steps: 12
save_steps: 6
learning_rate: 0.001
lr_scheduler: constant
optimizer: adamw_torch
attn_implementation: sdpa
special_tokens: {pad_token: <pad>}
bf16: false
fp16: false
tf32: false
val_set_size: 0
logging_steps: 1
save_first_step: false
seed: 1
dataloader_num_workers: 0
"""


@pytest.fixture
def train(tmp_path):
    save_tiny(tmp_path / "model", tmp_path / "data.jsonl")

    def trained(name, lines, *, check=0):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for given in ("model", "data.jsonl"):
            if not (folder / given).exists():
                (folder / given).symlink_to(tmp_path / given)
        (folder / "config.yaml").write_text(YAML + lines)
        variables = {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": ""}
        return folder, execute((*AXOLOTL, "config.yaml"), folder, check=check, **variables)

    return trained


def test_a_run_from_yaml_is_clipped_recorded_and_resumed(train):
    stock, _ = train("stock", "max_grad_norm: 1.0\n")
    tight_stock, _ = train("stock-tight", "max_grad_norm: 0.05\n")
    keys = PLUGIN + "adaclip_controller: static\nadaclip_static_threshold: 0.05\n"
    ours, done = train("ours", keys)

    assert "hf-adaclip: attached to AxolotlTrainer: controller static" in done.stdout + done.stderr
    assert torch.equal(saved_weights(ours / "out"), saved_weights(tight_stock / "out"))
    assert not torch.equal(saved_weights(ours / "out"), saved_weights(stock / "out"))
    verified(ours / "out/clip_ledger.jsonl", steps=12)
    logged = json.loads((ours / "out/checkpoint-12/trainer_state.json").read_text())["log_history"]
    assert any("clip/threshold" in entry for entry in logged)

    whole = saved_weights(ours / "out")
    shutil.rmtree(ours / "out/checkpoint-12")
    for path in (ours / "out").glob("*.safetensors"):
        path.unlink()
    train("ours", keys + "resume_from_checkpoint: out/checkpoint-6\n")
    assert torch.equal(saved_weights(ours / "out"), whole)
    verified(ours / "out/clip_ledger.jsonl")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("adaclip_controler: zscore\n", "Did you mean `adaclip_controller`?"),
        ("adaclip_z_threshold: -1\n", "`z_threshold` must be"),
        ("adaclip_z_threshold: wide\n", "`adaclip_z_threshold` must be otherwise"),
        ("expert_parallel_size: 2\n", "`expert_parallel_size` must be 1"),
    ],
)
def test_wrong_keys_end_the_run_before_anything_is_loaded(train, lines, words):
    folder, done = train("wrong", PLUGIN + lines, check=1)
    assert words in done.stdout + done.stderr
    assert not (folder / "out").exists()


def test_no_static_threshold_is_refused(train):
    _, done = train("zero", PLUGIN + "max_grad_norm: 0\n", check=1)
    assert "`max_grad_norm` must be above 0" in done.stdout + done.stderr


def test_all_in_one_key(train):
    folder, _ = train("text", PLUGIN + "adaclip_clip: zscore:z_threshold=3,warmup_observations=4\n")
    header = json.loads((folder / "out/clip_ledger.jsonl").read_text().splitlines()[0])
    assert header["config"]["controller"] == "zscore"
    assert header["config"]["z_threshold"] == 3


def test_the_plugin_is_one_of_axolotls():
    from axolotl.integrations.base import BasePlugin, load_plugin

    plugin = load_plugin("hf_adaclip.integrations.axolotl.AdaptiveClipPlugin")
    assert isinstance(plugin, BasePlugin)
    assert Path(plugin.get_input_args().replace(".", "/")).name == "AdaclipArgs"
