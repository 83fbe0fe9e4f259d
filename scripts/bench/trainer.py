"""Is a whole `Trainer.train()` slower with adaptive clipping? Stock and ours in turns, in one process.

    python -m scripts.bench.trainer --json model_cards/speed/trainer_cpu.json

A ViT-tiny from scratch on random images, batch 8, the defaults of both Trainers (ours with ledger and self-test). Each pair gives one
ratio of training times; shown are their median and quartiles. 1.00 or less within the spread is the aim.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipTrainer
from hf_adaclip.run.versions import environment
from hf_adaclip.telemetry.progress import Progress
from scripts.bench.step import require_device

ARMS: dict[str, AdaptiveClipConfig | None] = {
    "stock": None,
    "adaptive": AdaptiveClipConfig.resolve("guard"),
    "adaptive per tensor": AdaptiveClipConfig.resolve("guard").replace(granularity="tensor"),
}


class Images(torch.utils.data.Dataset[dict[str, Any]]):
    """Random images; what is in them does not matter to the clock."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 224, 224, generator=generator), "labels": index % 10}


def train(arm: str, steps: int, device: str) -> float:
    """Seconds of one training run, without its first three steps."""
    set_seed(0)
    shape = ViTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768)
    shape.num_labels = 10
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=device == "cpu",
        )
        clip = ARMS[arm]
        ingredients: dict[str, Any] = {
            "model": ViTForImageClassification(shape),
            "args": args,
            "train_dataset": Images(),
        }
        trainer = Trainer(**ingredients) if clip is None else AdaptiveClipTrainer(**ingredients, clip=clip)
        trainer.remove_callback(PrinterCallback)
        begin = time.perf_counter()
        trainer.train()
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=10, help="runs of every arm (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of a run (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the results there")
    arguments = parser.parse_args()
    require_device(parser, arguments.device)
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    order = list(ARMS)
    train("adaptive", 3, arguments.device)
    for number in Progress(range(arguments.pairs), file=sys.stderr):
        random.Random(number).shuffle(order)
        for arm in order:
            times[arm].append(train(arm, arguments.steps, arguments.device))
    ratios = {a: [t / s for t, s in zip(times[a], times["stock"], strict=True)] for a in ARMS if a != "stock"}
    print(f"stock: {statistics.median(times['stock']):.2f} s for {arguments.steps} steps")
    rows = {}
    for arm, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        rows[arm] = {"ratio": middle, "quartiles": [low, high], "ratios": values}
        print(f"{arm:22s} {middle:.3f} of stock (quartiles {low:.3f} to {high:.3f}, {len(values)} pairs)")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(["python -m scripts.bench.trainer", *sys.argv[1:]]),
            "device": torch.cuda.get_device_name(0) if arguments.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "steps": arguments.steps,
            "versions": environment(),
        }
        arguments.json.write_text(
            json.dumps({**about, "seconds": times, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
