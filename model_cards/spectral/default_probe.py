"""A plain loop with `AdaptiveClipper` on four tasks: the runs of `default.jsonl`, by which the parts of the default were chosen.

python model_cards/spectral/default_probe.py --data FOLDER --out results.jsonl JOBS.jsonl

FOLDER holds {wikitext2,tiny_shakespeare,fashion_mnist,sst2}/{train,validation,test}.parquet with the hub's columns. A job is one JSON
object per line: `task`, `seed`, `lr`, `b2`, `thr` (static threshold), `warm` (share of the steps), `hor` (share of the task's steps, the
schedule scaled), `clip` (fields of AdaptiveClipConfig; null: `clip_grad_norm_`), `off` (from this step on `clip_grad_norm_`), `loaded`
(mark the weights as `from_pretrained` does). `moved` of a result: by which share of their size hidden matrices moved in each 16 steps. In
recorded jobs `head` says that the range acted on the head, as it does now in all; `scale` and `sp` multiplied the estimate and set the
start's share.

Tasks: `wiki`, a Llama of 3 layers and width 64 from scratch on WikiText-2, 400 steps of 16 x 48; `ft`, that Llama after 1600 steps,
fine-tuned on tiny_shakespeare, 300 steps; `fashion`, a ViT of 4 layers and width 64 from scratch on Fashion-MNIST, 400 steps of 32;
`sst3`, a pretrained MiniLM (`--encoder`, 3 layers) on SST-2, 240 steps of 16; `sst3m`, the same on 3,400 sentences, 6 epochs of 32.
One thread.
"""

import argparse
import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.gradients.matrices import hidden_matrices
from hf_adaclip.gradients.movement import Movement

LENGTH, VOCABULARY = 48, 768
Loss = Callable[[Any, Tensor], Tensor]


class Task(NamedTuple):
    """What is trained: `loss` of a model on rows by number, `evaluate` on held-out data."""

    count: int
    batch: int
    steps: int
    model: Callable[[int], nn.Module]
    loss: Loss
    evaluate: Callable[[Any], float]


def read(folder: Path, name: str, split: str) -> pd.DataFrame:
    return pd.read_parquet(folder / name / f"{split}.parquet")


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, use_cache=False, **sizes))


def language(folder: Path, text: str, steps: int, start: dict[str, Tensor] | None) -> Task:
    wiki = {s: "".join(read(folder, "wikitext2", s)["text"]) for s in ("train", "validation")}
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([wiki["train"][:2_000_000]], vocab_size=VOCABULARY, show_progress=False)
    if text == "wikitext2":
        parts = wiki["train"][:4_000_000], wiki["validation"][:300_000]
    else:
        shakespeare = {s: read(folder, text, s)["text"][0] for s in ("train", "validation", "test")}
        parts = shakespeare["train"], shakespeare["validation"] + shakespeare["test"]

    def blocks(part: str, most: int) -> Tensor:
        ids = torch.tensor(tokenizer.encode(part).ids)
        count = min(most, len(ids) // LENGTH)
        return ids[: count * LENGTH].view(count, LENGTH).clone()

    train, held_out = blocks(parts[0], 20_000), blocks(parts[1], 192)

    def model(seed: int) -> nn.Module:
        made = llama(seed)
        if start is not None:
            made.load_state_dict(start)
        return made

    def loss(model: Any, ids: Tensor) -> Tensor:
        logits = model.lm_head(model.model(input_ids=ids).last_hidden_state[:, :-1])
        return nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))

    def evaluate(model: Any) -> float:
        return sum(float(loss(model, part)) for part in held_out.split(64)) / 3

    return Task(len(train), 16, steps, model, lambda m, rows: loss(m, train[rows]), evaluate)


def fashion(folder: Path) -> Task:
    def arrays(split: str, count: int) -> tuple[Tensor, Tensor]:
        frame = read(folder, "fashion_mnist", split).head(count)
        images = np.stack([np.asarray(Image.open(io.BytesIO(i["bytes"]))) for i in frame["image"]])
        return (torch.tensor(images, dtype=torch.float32)[:, None] / 255 - 0.5) / 0.5, torch.tensor(
            list(frame["label"])
        )

    (x, y), (x_held, y_held) = arrays("train", 12_000), arrays("test", 1_000)
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=28,
        patch_size=7,
        num_channels=1,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return ViTForImageClassification(config)

    def evaluate(model: Any) -> float:
        logits = torch.cat([model(pixel_values=part).logits for part in x_held.split(250)])
        return float(nn.functional.cross_entropy(logits, y_held))

    def loss(model: Any, rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(pixel_values=x[rows]).logits, y[rows])

    return Task(len(x), 32, 400, model, loss, evaluate)


def sentences(folder: Path, encoder: Path, *, several_epochs: bool) -> Task:
    tokenizer = AutoTokenizer.from_pretrained(encoder)

    def encoded(frame: pd.DataFrame, longest: int) -> list[tuple[list[int], int]]:
        rows = zip(tokenizer(list(frame["sentence"]))["input_ids"], frame["label"], strict=True)
        return [(ids, int(label)) for ids, label in rows if len(ids) <= longest]

    train = encoded(read(folder, "sst2", "train").sample(8_000, random_state=0), 16)
    held_out = sorted(encoded(read(folder, "sst2", "validation"), 20)[:256], key=lambda row: len(row[0]))
    # Rows of the embedding that no sentence uses are left out, which makes steps cheaper and changes none.
    used = sorted({token for ids, _ in train + held_out for token in ids} | {0})
    place = {token: k for k, token in enumerate(used)}

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        made = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
        old = made.get_input_embeddings()
        new = nn.Embedding(len(used), old.embedding_dim)
        new.weight.data.copy_(old.weight.data[used])
        made.set_input_embeddings(new)
        made.bert.encoder.layer = made.bert.encoder.layer[:3]
        return made

    def logits_of(model: Any, rows: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
        width = max(len(ids) for ids, _ in rows)
        ids, mask = torch.full((len(rows), width), place[0]), torch.zeros((len(rows), width), dtype=torch.long)
        for k, (tokens, _) in enumerate(rows):
            ids[k, : len(tokens)], mask[k, : len(tokens)] = torch.tensor([place[t] for t in tokens]), 1
        return model(input_ids=ids, attention_mask=mask).logits, torch.tensor([label for _, label in rows])

    def loss(model: Any, rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(*logits_of(model, [train[i] for i in rows.tolist()]))

    def evaluate(model: Any) -> float:
        parts = [held_out[i : i + 32] for i in range(0, len(held_out), 32)]
        return sum(float(nn.functional.cross_entropy(*logits_of(model, p), reduction="sum")) for p in parts) / len(
            held_out
        )

    if several_epochs:
        return Task(3_400, 32, 6 * (3_400 // 32), model, loss, evaluate)
    return Task(len(train), 16, 240, model, loss, evaluate)


def order(count: int, batch: int, steps: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    batches: list[Tensor] = []
    while len(batches) < steps:
        batches += [b for b in torch.randperm(count, generator=generator).split(batch) if len(b) == batch]
    return batches[:steps]


def schedule(step: int, steps: int, rising: int) -> float:
    return (step + 1) / rising if step < rising else (steps - step) / (steps - rising)


def run(job: dict[str, Any], task: Task) -> dict[str, Any]:
    """One training, evaluated 20 times; milliseconds are processor time of a step."""
    steps = round(task.steps * job.get("hor", 1.0))
    rising = round(steps * job.get("warm", 0.0))
    model = task.model(job["seed"])
    parameters = list(model.parameters())
    if job.get("loaded"):
        for parameter in parameters:
            setattr(parameter, "_is_hf_initialized", True)  # noqa: B010 - a parameter has no such attribute to type
    matrices = {str(number): matrix for number, matrix in enumerate(hidden_matrices([model]))}
    movement, moved = Movement(matrices, delayed=False), []
    movement.begin()
    optimizer = torch.optim.AdamW(
        parameters, lr=job["lr"], betas=(0.9, job.get("b2", 0.999)), weight_decay=0.0, fused=True
    )
    threshold, clipper = job.get("thr", 1.0), None
    if job["clip"] is not None:
        fields = {"incidents": False, "static_threshold": threshold, **job["clip"]}
        config = AdaptiveClipConfig.from_dict(fields).with_pace_start(max(1, round(0.1 * steps) - rising))
        clipper = AdaptiveClipper(config, optimizer=optimizer, model=model)
    torch.manual_seed(job["seed"])
    curve, losses, paces, seconds = [], [], [], 0.0
    every = max(1, steps // 20)
    for step, rows in enumerate(order(task.count, task.batch, steps, job["seed"])):
        if step % (task.count // task.batch) == 0 and clipper is not None:
            clipper.begin_epoch()
        begin = time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = job["lr"] * schedule(step, steps, rising)
        loss = task.loss(model, rows)
        loss.backward()
        if clipper is None or step >= job.get("off", math.inf):
            nn.utils.clip_grad_norm_(parameters, threshold)
        else:
            clipper.clip_(parameters, loss=loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.process_time() - begin
        losses.append(float(loss.detach()))
        if (share := movement.step()) is not None:
            moved.append(round(share, 4))
        if clipper is not None and step % every == 0:
            paces.append(round(float(clipper.metrics()["clip/pace"]), 2))
        if (step + 1) % every == 0 or step + 1 == steps:
            model.eval()
            with torch.no_grad():
                curve.append([step + 1, round(task.evaluate(model), 4)])
            model.train()
            if clipper is not None and job.get("told"):
                clipper.evaluated(curve[-1][1])
    train = [round(sum(losses[i : i + every]) / every, 3) for i in range(0, steps - every + 1, every)]
    found = {
        "final": curve[-1][1],
        "best": min(loss for _, loss in curve),
        "curve": curve,
        "train": train,
        "paces": paces,
        "moved": moved,
    }
    return {**job, "S": steps, **found, "ms": round(seconds / steps * 1e3, 1)}


def pretrained(task: Task) -> dict[str, Tensor]:
    """The Llama that `ft` starts from."""
    model, steps = task.model(0), 1_600
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step, rows in enumerate(order(task.count, task.batch, steps, 0)):
        task.loss(model, rows).backward()
        nn.utils.clip_grad_norm_(parameters, 0.3)
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * schedule(step, steps, 160)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, default=None, help="folder of MiniLM, for sst3 and sst3m")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    data = arguments.data
    makers: dict[str, Callable[[], Task]] = {
        "wiki": lambda: language(data, "wikitext2", 400, None),
        "ft": lambda: language(data, "tiny_shakespeare", 300, pretrained(language(data, "wikitext2", 1_600, None))),
        "fashion": lambda: fashion(data),
        "sst3": lambda: sentences(data, arguments.encoder, several_epochs=False),
        "sst3m": lambda: sentences(data, arguments.encoder, several_epochs=True),
    }
    tasks: dict[str, Task] = {}
    for line in filter(None, map(str.strip, arguments.jobs.read_text(encoding="utf-8").splitlines())):
        job = json.loads(line)
        task = tasks.setdefault(job["task"], makers[job["task"]]()) if job["task"] not in tasks else tasks[job["task"]]
        result = run(job, task)
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(line, "->", result["final"], flush=True)


if __name__ == "__main__":
    main()
