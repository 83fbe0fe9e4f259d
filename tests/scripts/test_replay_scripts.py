"""`hf-adaclip incident RUN STEP --replay` with the scripts of this repository: a damaged text is named."""

import json
import random
import shutil
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from transformers import TrainingArguments

from hf_adaclip.cli import main
from hf_adaclip.incidents.folder import find_incidents
from tests.scripts.test_run_images_and_text import LLAMA

pytestmark = pytest.mark.slow
SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
SENTENCE = "the cat sat on the mat and the dog ran to the door while a bird sang in the tree"
NOISE = "QXZJKVWqxzjkvw0123456789#@%&*"


def flags(folder, output, **changes):
    settings = {
        "output_dir": output,
        "train_file": folder / "train.txt",
        "validation_file": folder / "valid.txt",  # or the text is shuffled, and a part of it held out
        "train_tokenizer": 300,
        "config_overrides": LLAMA,
        "block_size": 64,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 60,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 20,
        "report_to": "none",
        "clip": "guard",
        **changes,
    }
    return ["--do_train", "--use_cpu", "--disable_tqdm=True", *(f"--{k}={v}" for k, v in settings.items())]


@pytest.mark.skipif(
    "train_sampling_strategy" not in TrainingArguments.__dataclass_fields__, reason="the order cannot be chosen"
)
def test_a_damaged_text_is_named_by_a_script_with_a_trainer_and_by_one_without(tmp_path, here, capsys):
    words = SENTENCE.split()
    texts = [" ".join(words[(i + j) % len(words)] for j in range(64)) for i in range(480)]
    texts[400] = "".join(random.Random(0).choices(NOISE, k=400))
    (tmp_path / "train.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "valid.txt").write_text("\n".join(texts[:20]) + "\n")
    listed = flags(tmp_path, tmp_path / "clm", train_sampling_strategy="sequential")
    here("run_clm", listed)
    *before, incident = find_incidents(tmp_path / "clm")
    assert incident.kind == "spike"
    assert [b.step for b in before] in ([], [incident.step - 1])  # the text may begin in the batch before
    alone = ["--task", "clm", *flags(tmp_path, tmp_path / "loop")]
    here("no_trainer", alone)
    shutil.copytree(tmp_path / "clm/incidents", tmp_path / "loop/incidents", dirs_exist_ok=True)

    for script, run, given in (("run_clm.py", "clm", listed), ("no_trainer.py", "loop", alone)):
        capsys.readouterr()
        AcceleratorState._reset_state(True)
        where = [str(tmp_path / run), str(incident.step)]
        assert main(["incident", *where, "--bisect", "--json", "--replay", str(SCRIPTS / script), *given]) == 0
        found = json.loads(capsys.readouterr().out)
        assert Path(found["weights"]).name == "checkpoint-40"
        assert found["micro_batches"] == 2
        if run == "clm":
            assert found["replayed"]["norm"] > 10 * found["recorded"]["usual_norm"]
        noise = [sum(letter in NOISE for letter in one["text"]) > 20 for one in found["samples"]]
        assert len(noise) == 8
        assert 0 < sum(noise) < 8
        assert noise == sorted(noise, reverse=True)  # all of the damaged text stands before all others
