"""The launch configurations, and a script on two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from hf_adaclip.audit import verify_ledger
from tests.scripts.test_run_images_and_text import LLAMA, flags, text  # noqa: F401 - a fixture

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "scripts/accelerate_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_accelerate_reads_it_and_its_command_names_it(path):
    config = load_config_from_file(str(path))
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}
    expected["cpu_two_processes"] = "MULTI_GPU"  # whose launcher starts more than one process

    assert config.distributed_type == expected.get(path.stem, "NO")
    assert config.mixed_precision == ("fp16" if "fp16" in path.stem else "no" if "cpu" in path.stem else "bf16")
    command = path.read_text().splitlines()[0].split()
    assert f"scripts/accelerate_configs/{path.name}" in command
    assert (ROOT / next(word for word in command if word.endswith(".py"))).is_file()
    if "deepspeed" in path.stem:
        assert config.deepspeed_config["gradient_clipping"] > 0
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


def test_there_is_one_for_every_setup_that_is_documented():
    assert len(CONFIGS) == 7


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_script_on_two_processes(tmp_path, text, launcher):  # noqa: F811
    settings = {
        "train_file": text / "train.txt",
        "train_tokenizer": 300,
        "config_overrides": LLAMA,
        "block_size": 32,
        "per_device_train_batch_size": 8,
    }
    if launcher == "torchrun":
        settings["ddp_backend"] = "gloo"
    listed = [str(f) for f in flags(tmp_path / "out", **settings)]
    command = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        "accelerate": [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", "scripts/accelerate_configs/cpu_two_processes.yaml", "--main_process_port", "0"),
        ],
    }[launcher]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "scripts/run_clm.py", *listed],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    ledger = tmp_path / "out/clip_ledger.jsonl"
    assert json.loads(ledger.read_text().splitlines()[0])["world_size"] == 2
    report = verify_ledger(ledger)
    assert report.ok, report.findings
    assert (report.segments, report.steps) == (1, 30)
    assert "eval_perplexity" in json.loads((tmp_path / "out/all_results.json").read_text())
