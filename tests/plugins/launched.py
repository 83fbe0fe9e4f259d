"""Starting commands as a user does: in a folder of their own, with or without `HF_ADACLIP`, and looking at what they leave."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from hf_adaclip.audit.verify import verify_ledger

ROOT = Path(__file__).parent.parent.parent
PYTHON = sys.executable
RUN = (PYTHON, "-m", "hf_adaclip.cli", "run")
TIGHT = "static:static_threshold=0.05"
"""Clips every step of these tiny runs, and is the stock run at `max_grad_norm=0.05`, bit for bit."""

TRAIN = """
import os, sys, torch
from tests.integrations.trainers import arguments, build, run, weights
from transformers import Trainer
class MyTrainer(Trainer):
    def train(self, *args, **kwargs):
        return super().train(*args, **kwargs)
torch.set_num_threads(1)
saving = {"save_strategy": "steps", "save_steps": 10}
args = arguments("out", max_steps=20, max_grad_norm=float(os.environ.get("NORM", "1.0")), **saving)
trainer = build(MyTrainer, "out", args=args)
run(trainer, resume_from_checkpoint=len(sys.argv) > 1 or None)
if trainer.is_world_process_zero():
    torch.save(weights(trainer), "weights.pt")
print("class", type(trainer).__name__)
"""


def environment(*site, **variables):
    """The variables of this process without ours; `site` are folders to be put on the path."""
    path = os.pathsep.join([*map(str, site), str(ROOT), os.environ.get("PYTHONPATH", "")])
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_ADACLIP")}
    programs = os.pathsep.join([str(Path(PYTHON).parent), os.environ.get("PATH", "")])
    own = {
        "PATH": programs,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
    }
    return {**kept, **own, **variables}


def execute(command, folder, *site, check=0, **variables):
    """Run a command in a folder; its exit status has to be `check`."""
    folder.mkdir(exist_ok=True, parents=True)
    done = subprocess.run(
        [str(c) for c in command],
        cwd=folder,
        env=environment(*site, **variables),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == check, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def verified(ledger, *, steps=None):
    """The ledger's report, which has to be without a finding."""
    report = verify_ledger(ledger)
    assert report.ok, report
    assert steps is None or report.steps == steps
    return report


def saved_weights(folder):
    """All tensors of a model folder."""
    from safetensors.torch import load_file

    found = sorted(folder.glob("*.safetensors"))
    tensors = {k: v for path in found if not path.name.startswith("clip_state") for k, v in load_file(path).items()}
    assert tensors, folder
    return torch.cat([tensors[k].float().flatten() for k in sorted(tensors)])
