"""Other kinds of models from scratch, in a plain loop: `clip_grad_norm_` at four learning rates beside the default at the same rates.

    python -m scripts.study.families --data DATA            run what is missing: from parquet files or the hub
    python -m scripts.study.families --only resnet,lstm     some of them
    python -m scripts.study.families --costs --data DATA    measure what a step costs, side by side: on an idle machine
    python -m scripts.study.families --page                 only make the page of what is recorded

Nothing of the package was chosen by these runs. Each is one line of model_cards/families/runs.jsonl; a run that is there is not made again.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any, Final

import torch
from torch import nn

from hf_adaclip import AdaptiveClipper
from scripts.docs.readme_section import ROOT, write_section
from scripts.study.small_models import task_of

FOLDER: Final = ROOT / "model_cards" / "families"
RATES: Final = (3e-4, 1e-3, 4e-3, 1e-2)
STEPS, EVALUATIONS = 300, 10
BLOCK, BLOCKS = 15, 5
"""Steps of an arm at a time, and how often, where the cost of a step is measured."""
FIRST: Final = 0
"""The seed on which the best rate of the stock arm is looked for."""
SEEDS: Final = (1, 2, 3)
"""Those that are compared at that rate."""
ARMS: Final = ("stock", "adaptive")
KINDS: Final = {
    "gpt2": "GPT-2 with dropout, tiny_shakespeare",
    "llama-tied": "Llama with tied embeddings, 10 epochs of 30,000 characters",
    "bert": "BERT, masked characters",
    "t5": "T5, second half of 64 characters from the first",
    "lstm": "LSTM of two layers, tiny_shakespeare",
    "resnet": "ResNet with BatchNorm, CIFAR-10",
    "resnet-small": "that ResNet, 5 epochs of 2,000 images",
    "vit-small": "ViT, 5 epochs of 2,000 images of Fashion-MNIST",
    "mlp": "MLP, Fashion-MNIST",
    "unet": "U-Net, noise in CIFAR-10",
}


class Training:
    """One kind of model under one arm, with AdamW and a rate that falls to 0."""

    def __init__(self, kind: str, rate: float, seed: int, arm: str, data: Path | None) -> None:
        torch.manual_seed(seed)
        self.task = task_of(kind, data)
        self._parameters = list(self.task.model.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=rate, weight_decay=0.0)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: 1 - step / STEPS)
        stock = arm == "stock"
        self._clipper = None if stock else AdaptiveClipper(arm, optimizer=self._optimizer, model=self.task.model)
        self._generator = torch.Generator().manual_seed(1000 + seed)

    def step(self) -> float:
        """One step; its seconds of processor time."""
        began = time.process_time()
        loss = self.task.loss(self._generator)
        loss.backward()
        if self._clipper is None:
            nn.utils.clip_grad_norm_(self._parameters, 1.0)
        else:
            self._clipper.clip_(self._parameters, loss=loss)
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        return time.process_time() - began

    def evaluate(self) -> float:
        """The loss on what is held out."""
        self.task.model.eval()
        with torch.no_grad():
            found = float(self.task.evaluate())
        self.task.model.train()
        return found

    def close(self) -> None:
        """Let go of the optimizer."""
        if self._clipper is not None:
            self._clipper.close()


def run(kind: str, rate: float, seed: int, arm: str, data: Path | None) -> dict[str, Any]:
    """One run; a line of the record."""
    training, losses = Training(kind, rate, seed, arm, data), []
    for step in range(1, STEPS + 1):
        training.step()
        if step % (STEPS // EVALUATIONS) == 0:
            losses.append(round(training.evaluate(), 4))
    training.close()
    return {"kind": kind, "rate": rate, "seed": seed, "arm": arm, "losses": losses}


def cost(kind: str, rate: float, data: Path | None) -> dict[str, Any]:
    """What a step takes with the default over one without, block by block of both in turn; the first blocks are left out."""
    trainings = [Training(kind, rate, FIRST, arm, data) for arm in ARMS]
    blocks = [[sum(training.step() for _ in range(BLOCK)) for training in trainings] for _ in range(BLOCKS + 1)]
    for training in trainings:
        training.close()
    return {"kind": kind, "rate": rate, "steps": BLOCK, "ratios": [round(b / a, 3) for a, b in blocks[1:]]}


def recorded(path: Path) -> list[dict[str, Any]]:
    """All runs that were made."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def best_rate(runs: list[dict[str, Any]], kind: str) -> float | None:
    """Of the stock arm on the first seed; None before all its rates were run."""
    found = {r["rate"]: r["losses"][-1] for r in runs if (r["kind"], r["seed"], r["arm"]) == (kind, FIRST, "stock")}
    finite = {rate: loss for rate, loss in found.items() if math.isfinite(loss)}
    return min(finite, key=lambda rate: finite[rate]) if found.keys() == set(RATES) and finite else None


def planned(kind: str, path: Path) -> Iterator[tuple[float, int, str]]:
    """Rate, seed and arm of all runs: the rates on one seed, and once they are recorded the best of them on the others."""
    for rate in RATES:
        yield from ((rate, FIRST, arm) for arm in ARMS)
    best = best_rate(recorded(path), kind)
    assert best is not None, f"{kind}: no rate of {RATES} ends with a finite loss."
    yield from ((best, seed, arm) for seed in SEEDS for arm in ARMS)


def table(runs: list[dict[str, Any]], costs: list[dict[str, Any]]) -> str:
    """A row for each kind of model that was run to its end.

    Args:
        runs: Their record.
        costs: What steps cost; the last line of a kind counts.
    """
    ratios = {line["kind"]: sorted(line["ratios"]) for line in costs}
    lines = [
        "| model and data | final loss at 3e-4, 1e-3, 4e-3, 1e-2 | with the default | at the best of these rates, 3 other seeds | "
        "with the default | steps to that loss | a step costs |",
        "| --- " * 7 + "|",
    ]
    for kind, title in KINDS.items():
        best = best_rate(runs, kind)
        by = {(r["rate"], r["seed"], r["arm"]): r for r in runs if r["kind"] == kind}
        if best is None or any((best, seed, arm) not in by for seed in SEEDS for arm in ARMS):
            continue
        cells = [", ".join(f"{by[rate, FIRST, arm]['losses'][-1]:.3f}" for rate in RATES) for arm in ARMS]
        pairs = [(by[best, seed, "stock"], by[best, seed, "adaptive"]) for seed in SEEDS]
        ends = [f"{mean(pair[place]['losses'][-1] for pair in pairs):.3f}" for place in (0, 1)]
        shares = ", ".join(f"{share:.1f}" if share < math.inf else "never" for share in map(_sooner, pairs))
        found = ratios.get(kind)
        price = "-" if found is None else f"{median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f})"
        lines.append(f"| {title} | {' | '.join([*cells, *ends, shares, price])} |")
    return "\n".join([*lines, "", *_facts(runs)])


def _facts(runs: list[dict[str, Any]]) -> list[str]:
    """In how many pairs of runs that differ in nothing else the default ends lower."""
    ends = {(r["kind"], r["rate"], r["seed"], r["arm"]): r["losses"][-1] for r in runs}
    facts = []
    for where, seeds in (("on seed 0, over all rates", (FIRST,)), ("on the other seeds, at the best rate", SEEDS)):
        pairs = [
            (ends[kind, rate, seed, "stock"], ours)
            for (kind, rate, seed, arm), ours in ends.items()
            if arm == "adaptive" and seed in seeds and (kind, rate, seed, "stock") in ends
        ]
        facts.append(
            f"- {sum(ours < stock for stock, ours in pairs)} of {len(pairs)} pairs end lower with the default {where}."
        )
    return facts


def _sooner(pair: tuple[dict[str, Any], dict[str, Any]]) -> float:
    """The part of the steps after which the second run has the final loss of the first."""
    stock, ours = pair
    at = (place for place, loss in enumerate(ours["losses"], start=1) if loss <= stock["losses"][-1])
    return next(at, math.inf) / EVALUATIONS


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, and make the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="a folder with a folder of parquet files per data set")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of models (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="run nothing")
    parser.add_argument(
        "--costs", action="store_true", help="only measure what a step costs, one block of each arm in turn"
    )
    parser.add_argument("--record", type=Path, default=FOLDER, help="folder of the runs (default: %(default)s)")
    arguments = parser.parse_args(argv)
    path, costs = arguments.record / "runs.jsonl", arguments.record / "costs.jsonl"
    kinds = arguments.only.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--only must name kinds of {', '.join(KINDS)}, but {', '.join(sorted(unknown))} is none.")
    torch.set_num_threads(1)
    for kind in kinds if arguments.costs else ():
        best = best_rate(recorded(path), kind)
        line = cost(kind, RATES[1] if best is None else best, arguments.data)
        with costs.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{kind}: {median(line['ratios']):.2f} times a step without", flush=True)
    for kind in () if arguments.page or arguments.costs else kinds:
        for rate, seed, arm in planned(kind, path):
            known = {(r["kind"], r["rate"], r["seed"], r["arm"]) for r in recorded(path)}
            if (kind, rate, seed, arm) in known:
                continue
            line = run(kind, rate, seed, arm, arguments.data)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{kind}, rate {rate:g}, seed {seed}, {arm}: {line['losses'][-1]}", flush=True)
    if arguments.record.resolve() == FOLDER:
        write_section("families", table(recorded(path), recorded(costs)), FOLDER / "README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
