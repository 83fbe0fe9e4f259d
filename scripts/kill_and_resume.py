"""Kill a training run with SIGKILL at random moments, resume it every time, and compare its end with a run that was left alone.

    python -m scripts.kill_and_resume --kills 20 --output runs/kill

Exit code 0 when weights and controller state are equal bit for bit and the ledger verifies. A checkpoint that the kill tore apart is
passed over: the Trainer writes `trainer_state.json` last, so one without it (or with half of it) is not complete.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from hf_adaclip.audit import verify_ledger
from hf_adaclip.telemetry.progress import Progress

SAVE_STEPS = 4
ROOT = Path(__file__).parent.parent


def train(folder: Path, steps: int) -> None:
    """Train from the last complete checkpoint in the folder, or from the start."""
    from pydoc_data.topics import topics

    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

    from hf_adaclip import AdaptiveClipConfig, AdaptiveClipTrainer

    torch.set_num_threads(1)
    text = np.frombuffer("".join(topics.values()).encode()[: 512 * 32], dtype=np.uint8).reshape(-1, 32)
    rows = text.astype(np.int64)
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_dropout=0.1,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        logging_steps=5,
        save_steps=SAVE_STEPS,
        save_total_limit=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = AdaptiveClipTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        clip=AdaptiveClipConfig(warmup_observations=20, max_pace=2.0),
    )
    set_seed(0)
    checkpoint = last_complete_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    assert trainer.clipper is not None
    assert trainer.model is not None
    end = {
        "weights": {name: p.detach() for name, p in trainer.model.named_parameters()},
        "state": {name: float(v) for name, v in trainer.clipper.state.items()},
    }
    torch.save(end, folder / "end.pt")


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text())
            return path
        except (OSError, ValueError):
            continue
    return None


def start(folder: Path, steps: int) -> "subprocess.Popen[bytes]":
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "scripts.kill_and_resume", "--child", str(folder), "--steps", str(steps)],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )


def run_and_kill(folder: Path, steps: int, kills: int, rng: random.Random) -> tuple[int, int]:
    """Returns how many kills met a running process, and how many checkpoints they tore apart."""
    ledger, done, torn = folder / "clip_ledger.jsonl", 0, 0
    for _ in Progress(range(kills), desc="kills"):
        size = ledger.stat().st_size if ledger.exists() else 0
        process = start(folder, steps)
        while process.poll() is None and (ledger.stat().st_size if ledger.exists() else 0) <= size:
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.6))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            done += 1
        process.wait()
        newest = max(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), default=None)
        torn += newest is not None and newest != last_complete_checkpoint(folder)
        if (folder / "end.pt").exists():
            break
    code = start(folder, steps).wait() if not (folder / "end.pt").exists() else 0
    if code:
        raise SystemExit(f"the last start ended with code {code}; see {folder / 'log.txt'}")
    return done, torn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often the run is killed (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/kill"), help="folder, emptied first (default: runs/kill)"
    )
    parser.add_argument("--steps", type=int, help="length of the run (default: 60, and 20 more for every kill)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        train(options.child, options.steps)
        return 0
    steps = options.steps or 60 + 20 * options.kills
    shutil.rmtree(options.output, ignore_errors=True)
    alone, killed = options.output / "alone", options.output / "killed"
    if start(alone, steps).wait():
        raise SystemExit(f"the run that is left alone failed; see {alone / 'log.txt'}")
    kills, torn = run_and_kill(killed, steps, options.kills, random.Random(options.seed))
    ends = [torch.load(folder / "end.pt", weights_only=True) for folder in (alone, killed)]
    same_weights = all(torch.equal(a, ends[1]["weights"][name]) for name, a in ends[0]["weights"].items())
    same_state = str(ends[0]["state"]) == str(ends[1]["state"])
    report = verify_ledger(killed / "clip_ledger.jsonl")
    result = {
        "kills": kills,
        "checkpoints torn": torn,
        "same weights": same_weights,
        "same controller state": same_state,
        "ledger verifies": report.ok,
        "segments": report.segments,
        "steps recorded": report.steps,
    }
    print(json.dumps(result, indent=2))
    for finding in report.findings:
        print(finding)
    return 0 if same_weights and same_state and report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
