"""A plain loop on WikiText-2 with the package's spectral range and agreement: the runs of `convergence.jsonl`.

python model_cards/spectral/probe.py --data FOLDER --out results.jsonl JOBS.jsonl

FOLDER holds wikitext2/{train,validation}.parquet with a column `text`. A job is one JSON object per line: `lr`, `b1`, `b2`, `clip`, `warm`
(share of the steps), `seed`, `hor` (share of the 400 steps, the schedule scaled to it), `width`, `every`, `agree`, and `head` (the range
acts on the head too, which the package leaves alone). One thread.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_adaclip.gradients.agreement import Agreement
from hf_adaclip.gradients.matrices import HiddenMatrices
from hf_adaclip.gradients.norms import collect
from hf_adaclip.gradients.spectral import SpectralRange

LENGTH, BATCH, STEPS, VOCABULARY = 48, 16, 400, 768


def texts(folder: Path) -> tuple[Tensor, Tensor]:
    """Blocks of token ids for training and for evaluation."""
    text = {
        s: "".join(pd.read_parquet(folder / "wikitext2" / f"{s}.parquet")["text"]) for s in ("train", "validation")
    }
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text["train"][:2_000_000]], vocab_size=VOCABULARY, show_progress=False)

    def blocks(part: str, most: int) -> Tensor:
        ids = torch.tensor(tokenizer.encode(part).ids)
        count = min(most, len(ids) // LENGTH)
        return ids[: count * LENGTH].view(count, LENGTH).clone()

    return blocks(text["train"][:4_000_000], 20_000), blocks(text["validation"][:300_000], 192)


def loss_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    hidden = model.model(input_ids=ids).last_hidden_state
    logits = model.lm_head(hidden[:, :-1])
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def order(count: int, steps: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    batches: list[Tensor] = []
    while len(batches) < steps:
        batches += [b for b in torch.randperm(count, generator=generator).split(BATCH) if len(b) == BATCH]
    return batches


class WithHead(HiddenMatrices):
    """The head is a matrix like the others."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__(lambda: [model])
        self._head = model.lm_head.weight

    def among(self, parameters: Sequence[Tensor]) -> list[bool]:
        return [hidden or p is self._head for hidden, p in zip(super().among(parameters), parameters, strict=True)]


def run(job: dict[str, Any], train: Tensor, held_out: Tensor) -> dict[str, Any]:
    """One training; the evaluation every 20 steps is not timed."""
    torch.manual_seed(job["seed"])
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, use_cache=False, **sizes))
    steps = round(STEPS * job.get("hor", 1.0))
    rising = round(steps * job["warm"])
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=job["lr"], betas=(job["b1"], job["b2"]), weight_decay=0.0, fused=True)
    width, counts = job.get("width"), list[Tensor]()
    matrices = WithHead(model) if job.get("head") else HiddenMatrices(lambda: [model])
    spectral = None if width is None else SpectralRange(width, matrices)
    agreement = Agreement(optimizer, counts.append) if job.get("agree") else None
    torch.manual_seed(job["seed"])
    curve, altered, agreed, seconds = [], [], [], 0.0
    for step, batch in enumerate(order(len(train), steps, job["seed"])[:steps]):
        start = time.perf_counter()
        share = (step + 1) / rising if step < rising else (steps - step) / (steps - rising)
        for group in optimizer.param_groups:
            group["lr"] = job["lr"] * share
        loss_of(model, train[batch]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, job["clip"])
        if spectral is not None and step % job.get("every", 1) == 0 and (effect := spectral.act_(collect(parameters))):
            altered.append(round(float(effect.altered), 4))
        optimizer.step()
        if agreement is not None:
            agreement.after()
            agree, there = counts.pop().tolist()
            agreed.append(round(agree / there, 4))
        optimizer.zero_grad()
        seconds += time.perf_counter() - start
        if (step + 1) % 20 == 0 or step + 1 == steps:
            with torch.no_grad():
                curve.append([step + 1, round(sum(float(loss_of(model, part)) for part in held_out.split(64)) / 3, 5)])
    found = {"steps": steps, "final": curve[-1][1], "curve": curve, "altered": altered[::20], "agreed": agreed[::20]}
    return {**job, **found, "ms": round(seconds / steps * 1e3, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    train, held_out = texts(arguments.data)
    for line in filter(None, map(str.strip, arguments.jobs.read_text(encoding="utf-8").splitlines())):
        result = run(json.loads(line), train, held_out)
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(line, "->", result["final"], flush=True)


if __name__ == "__main__":
    main()
