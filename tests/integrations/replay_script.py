"""A training script with one bad sample, for test_replay.py: run by itself it trains, and under `--replay` it answers.

python replay_script.py KIND FOLDER [key=value ...]
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import SequentialSampler
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, ViTConfig, set_seed
from transformers import ViTForImageClassification as ViT

from hf_adaclip import AdaptiveClipMixin, AdaptiveClipper, attach
from hf_adaclip.incidents.replay import replay_if_asked
from tests.integrations.launching import leave

BATCH, AT, PLACE = 8, 40, 5
"""Samples of a step, the bad step, and the bad sample's place in it."""
BAD = BATCH * AT + PLACE
SENTENCE = b"the cat sat on the mat and the dog ran to the door. "


class Bytes:
    """All of a tokenizer that matters here."""

    def decode(self, ids):
        return bytes(ids).decode("latin-1")

    def save_pretrained(self, folder):
        pass


class InOrder(Trainer):
    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)


class Ours(AdaptiveClipMixin, InOrder):
    pass


def texts(count=480):
    from datasets import Dataset

    rows = [np.frombuffer((SENTENCE * 2)[i % 52 :][:32], dtype=np.uint8).astype(np.int64) for i in range(count)]
    rows[BAD] = np.full(32, 200)
    return Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")


def images(count=480):
    from datasets import Dataset

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, count)
    pictures = rng.normal(0, 0.3, (count, 1, 8, 8)) + labels[:, None, None, None] / 2
    pictures[BAD, 0, 3, 3] = np.nan  # a damaged file
    return Dataset.from_dict({"pixel_values": pictures.astype(np.float32), "labels": labels}).with_format("torch")


def llama(dropout=0.0):
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=256, attention_dropout=dropout, bos_token_id=None, eos_token_id=None, **sizes)
    )


def vit():
    set_seed(0)
    sizes: dict[str, Any] = {
        "num_labels": 4,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return ViT(ViTConfig(image_size=8, patch_size=2, num_channels=1, **sizes))


def make_trainer(kind, folder, clip="guard", **changes):
    task = "vit" if "vit" in kind else "llama"
    settings = {
        "output_dir": str(folder),
        "max_steps": 50,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 2e-2,
        "save_strategy": "steps",
        "save_steps": 40,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    ours = {} if kind.startswith(("attach", "stock")) else {"clip": clip}
    trainer = (Ours if ours else InOrder)(
        model=vit() if task == "vit" else llama(),
        args=TrainingArguments(**settings),
        train_dataset=images() if task == "vit" else texts(),
        processing_class=None if task == "vit" else Bytes(),
        data_collator=lambda rows: {k: torch.stack([r[k] for r in rows]) for k in rows[0]},
        **ours,
    )
    return attach(trainer, clip=clip) if kind.startswith("attach") else trainer


def train_in_a_loop(folder):
    """A loop without a Trainer, and the line that it has for replays."""
    model, rows = llama(), texts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)

    def load(checkpoint):
        model.load_state_dict(torch.load(Path(checkpoint) / "model.pt"))

    replay_if_asked(model, lambda model, batch: model(**batch).loss, load)
    with AdaptiveClipper(optimizer=optimizer, model=model, ledger=folder / "clip_ledger.jsonl") as clipper:
        for step in range(50):
            if step == AT:
                (folder / f"checkpoint-{step}").mkdir()
                torch.save(model.state_dict(), folder / f"checkpoint-{step}/model.pt")
            places = list(range(BATCH * step, BATCH * (step + 1)))
            batch = clipper.watch(rows[places], places, processing_class=Bytes())
            loss = model(**batch).loss
            loss.backward()
            clipper.clip_(model.parameters(), loss=loss.detach())
            optimizer.step()
            optimizer.zero_grad()


def main(kind, folder, *changes):
    if kind == "nothing":
        return
    if kind == "loop":
        train_in_a_loop(Path(folder))
        return
    if kind == "stubborn":
        (parameter := torch.nn.Parameter(torch.zeros(1))).grad = torch.ones(1)
        torch.optim.SGD([parameter]).step()
        Path(folder, "trained").write_text("")
        return
    if kind == "ranks":
        folder = Path(folder)
        make_trainer("llama", folder, per_device_train_batch_size=BATCH // 2, ddp_backend="gloo").train()
        (folder / f"rank{os.environ['RANK']}.json").write_text("{}")
        leave()
    pairs = (text.split("=") for text in changes)
    make_trainer(kind, Path(folder), **{k: int(v) if v.isdigit() else v for k, v in pairs}).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
