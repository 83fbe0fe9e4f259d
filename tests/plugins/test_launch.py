"""Any script, torchrun, accelerate launch and the TRL command line under `hf-adaclip run` and `HF_ADACLIP`, in processes of their own."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.plugins.launched import PYTHON, RUN, TIGHT, TRAIN, saved_weights, verified
from tests.plugins.tiny import save_tiny

pytestmark = [pytest.mark.plugins, pytest.mark.slow]


def weights(folder):
    return torch.load(folder / "weights.pt", weights_only=True)


def test_the_variable_alone_does_the_same_and_a_resumed_run_ends_as_the_whole_one(start, tmp_path):
    whole = start(PYTHON, "train.py", folder=tmp_path / "whole", HF_ADACLIP=TIGHT)
    assert "hf-adaclip: attached to MyTrainer" in whole.stderr
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "out/checkpoint-20")
    (cut / "weights.pt").unlink()
    start(PYTHON, "train.py", "resume", folder=cut, HF_ADACLIP=TIGHT)

    assert torch.equal(weights(cut), weights(tmp_path / "whole"))
    verified(cut / "out/clip_ledger.jsonl")


def test_children_of_a_launcher_are_attached_and_one_of_them_says_so(start, tmp_path):
    torchrun = (PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py")
    done = start(*RUN, "--clip", TIGHT, "--", *torchrun)
    assert done.stderr.count("hf-adaclip: attached to MyTrainer") == 1
    assert done.stdout.count("class AdaptiveClipMyTrainer") == 2
    verified(tmp_path / "out/clip_ledger.jsonl", steps=20)


def test_accelerate_launch_too(start, tmp_path):
    accelerate = (PYTHON, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "train.py")
    done = start(*RUN, "--clip", TIGHT, "--", *accelerate)
    assert "hf-adaclip: attached to MyTrainer" in done.stderr
    verified(tmp_path / "out/clip_ledger.jsonl", steps=20)


def test_nothing_is_active_otherwise(start, tmp_path):
    done = start(PYTHON, "train.py")
    assert "hf-adaclip" not in done.stderr
    assert "class MyTrainer" in done.stdout
    look = (
        "import sys, torch, transformers.trainer as t;"
        "print(hasattr(t.Trainer.train, '_hf_adaclip'), 'hf_adaclip' in sys.modules, len(sys.meta_path))"
    )
    bare = "import sys; print(len(sys.meta_path))"
    assert start(PYTHON, "-c", look).stdout.split()[:2] == ["False", "False"]
    assert start(PYTHON, "-c", look, HF_ADACLIP="").stdout.split()[:2] == ["False", "False"]
    hooked = start(PYTHON, "-c", look, HF_ADACLIP="adaptive").stdout.split()
    assert hooked[:2] == ["True", "False"]  # the package itself is only imported once a Trainer trains
    assert hooked[2] == start(PYTHON, "-c", look).stdout.split()[2], bare  # and the finder has gone again


def test_what_cannot_be_done_is_refused_and_ends_the_command(start, tmp_path):
    done = start(*RUN, "--", PYTHON, "train.py", NORM="0", check=1)
    assert "hf-adaclip: MyTrainer is refused: `max_grad_norm` must be above 0" in done.stderr
    assert not (tmp_path / "weights.pt").exists()


def test_a_trainer_with_clipping_of_its_own_is_left_as_it_is(start, tmp_path):
    code = TRAIN.replace(
        "class MyTrainer(Trainer)", "from hf_adaclip import AdaptiveClipTrainer\nclass MyTrainer(AdaptiveClipTrainer)"
    )
    (tmp_path / "own.py").write_text(code)
    done = start(*RUN, "--clip", TIGHT, "--", PYTHON, "own.py")
    assert "MyTrainer clips adaptively by itself (adaptive): left as it is" in done.stderr
    assert re.search("class MyTrainer$", done.stdout, re.MULTILINE)


def test_a_second_train_of_an_attached_trainer_says_nothing_again(start, tmp_path):
    (tmp_path / "twice.py").write_text(TRAIN + "\ntrainer.train()\n")
    done = start(*RUN, "--clip", TIGHT, "--", PYTHON, "twice.py")
    assert done.stderr.count("hf-adaclip:") == 1
    verified(tmp_path / "out/clip_ledger.jsonl")


def test_the_trl_command_line_by_its_own_yaml(start, tmp_path):
    save_tiny(tmp_path / "model", tmp_path / "data.jsonl")
    (tmp_path / "sft.yaml").write_text(
        "model_name_or_path: model\noutput_dir: out\nmax_steps: 6\nuse_cpu: true\nmax_length: 32\nper_device_train_batch_size: 2\n"
        "report_to: none\nlogging_steps: 1\nbf16: false\nsave_strategy: 'no'\nactivation_checkpointing: false\ndtype: float32\n"
        "datasets:\n  - path: json\n    data_files: data.jsonl\n    columns: [text]\n"
    )
    trl = (Path(PYTHON).parent / "trl", "sft", "--config", "sft.yaml")
    done = start(*RUN, "--clip", TIGHT, "--", *trl)
    assert "hf-adaclip: attached to SFTTrainer" in done.stderr
    verified(tmp_path / "out/clip_ledger.jsonl", steps=6)
    tight = saved_weights(tmp_path / "out")
    start(*trl, "--output_dir", "stock")
    start(*trl, "--output_dir", "stock-tight", "--max_grad_norm", "0.05")
    assert torch.equal(tight, saved_weights(tmp_path / "stock-tight"))
    assert not torch.equal(tight, saved_weights(tmp_path / "stock"))


def test_a_script_is_attached_without_being_edited_and_the_weights_show_it(start, tmp_path):
    start(PYTHON, "train.py", folder=tmp_path / "stock")
    start(PYTHON, "train.py", folder=tmp_path / "stock-tight", NORM="0.05")
    same = start(*RUN, "--clip", "static", "--", PYTHON, "train.py", folder=tmp_path / "same")
    tight = start(*RUN, "--clip", TIGHT, "--", PYTHON, "train.py", folder=tmp_path / "tight")

    assert "hf-adaclip: attached to MyTrainer: controller static, ledger out/clip_ledger.jsonl" in same.stderr
    assert "class AdaptiveClipMyTrainer" in tight.stdout
    # `static` at the Trainer's own threshold is the stock run, bit for bit, and so it is at another: this clipping acted, and no other.
    assert torch.equal(weights(tmp_path / "same"), weights(tmp_path / "stock"))
    assert torch.equal(weights(tmp_path / "tight"), weights(tmp_path / "stock-tight"))
    assert not torch.equal(weights(tmp_path / "tight"), weights(tmp_path / "stock"))
    verified(tmp_path / "tight/out/clip_ledger.jsonl", steps=20)
    assert not (tmp_path / "stock/out/clip_ledger.jsonl").exists()


@pytest.mark.parametrize("order", ["import transformers.trainer, torch", "import torch, transformers.trainer"])
def test_the_hook_is_found_in_every_order_of_imports(start, order):
    code = f"{order}; from transformers import Trainer; print(hasattr(Trainer.train, '_hf_adaclip'))"
    assert start(PYTHON, "-c", code, HF_ADACLIP="adaptive").stdout.split() == ["True"]
