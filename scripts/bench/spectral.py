"""What the spectral range and the agreement cost on a CPU, in milliseconds and as a share of forward and backward.

python -m scripts.bench.spectral
python -m scripts.bench.spectral --only llama-study vit-study --json out.json

Everything of one setup is timed in one process and in turns, so that what else the machine does falls on all of it alike. Times are those
of the process on its one thread, which is wall-clock time where nothing else runs; the figure is the median over rounds. `whole step` is
forward, backward, clipping and a fused AdamW. The last setups have no model: they are a matrix of a Llama 7B and the factors of a LoRA on
it, beside the time that the multiply-adds of forward and backward would take.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_adaclip.gradients.agreement import Agreement
from hf_adaclip.gradients.matrices import HiddenMatrices
from hf_adaclip.gradients.newton_schulz import quintics, smallest_value
from hf_adaclip.gradients.norms import collect
from hf_adaclip.gradients.spectral import SpectralRange

KINDS = {"width 0": (0.0, 0.9), "a step alone": (0.0, 0.0), "width 0.25": (0.25, 0.9), "width 1": (1.0, 0.9)}
"""Width and memory of the ranges that are timed; the first is the default."""


@dataclass
class Setup:
    """A model and what it computes.

    Attributes:
        model: The model.
        loss: Forward pass of one batch.
        tokens: Rows that a hidden matrix sees in a step.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    tokens: int


def llama() -> Setup:
    """The Llama of the study: 16 x 48 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=768, max_position_embeddings=64, use_cache=False, **sizes))
    ids = torch.randint(0, 768, (16, 48))
    return Setup(model, lambda: model(input_ids=ids, labels=ids).loss, 16 * 48)


def small_vit() -> Any:
    """The ViT of the study on Fashion-MNIST, with random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    images: dict[str, Any] = {"image_size": 28, "patch_size": 7, "num_channels": 1, "num_labels": 10}
    return ViTForImageClassification(ViTConfig(**sizes, **images))


def vit() -> Setup:
    """That ViT: 32 images of 17 tokens."""
    model = small_vit()
    pixels, labels = torch.randn(32, 1, 28, 28), torch.randint(0, 10, (32,))
    return Setup(model, lambda: model(pixel_values=pixels, labels=labels).loss, 32 * 17)


def minilm() -> Setup:
    """Three layers of MiniLM as the study fine-tunes them: 16 sentences of 16 tokens, 384 wide."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, Any] = {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 3,
        "num_attention_heads": 12,
    }
    model = BertForSequenceClassification(BertConfig(vocab_size=4000, **sizes))
    ids, labels = torch.randint(0, 4000, (16, 16)), torch.randint(0, 2, (16,))
    return Setup(model, lambda: model(input_ids=ids, labels=labels).loss, 16 * 16)


def lora() -> Setup:
    """Factors of rank 8 on the four attention matrices of the study's Llama."""
    import peft

    whole = llama()
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = peft.get_peft_model(whole.model, config)
    ids = torch.randint(0, 768, (16, 48))
    return Setup(model, lambda: model(input_ids=ids, labels=ids).loss, whole.tokens)


SETUPS: dict[str, Callable[[], Setup]] = {
    "llama-study": llama,
    "vit-study": vit,
    "minilm-study": minilm,
    "lora-study": lora,
}
SHAPES = {
    "llama-7b-layer": [(4096, 11008)],
    "lora-7b-factors": [(8, 4096), (4096, 8)] * 32,
}


def in_turns(
    calls: dict[str, Callable[[], object]], *, rounds: int, before: Callable[[], object], warm: int = 2
) -> dict[str, float]:
    """Median milliseconds of each call; `before` is called, untimed, before each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + warm):
        for name, call in calls.items():
            before()
            start = time.process_time()
            call()
            if number >= warm:
                times[name].append((time.process_time() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One setup with a model."""
    torch.manual_seed(0)
    setup = SETUPS[name]()
    model, parameters = setup.model, [p for p in setup.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    matrices = HiddenMatrices(lambda: [model])
    agreement = Agreement(optimizer, lambda counts: None)

    def backward() -> None:
        optimizer.zero_grad()
        setup.loss().backward()

    backward()
    optimizer.step()
    drawn = [p.grad.clone() for p in parameters if p.grad is not None]
    with_gradient = [p for p in parameters if p.grad is not None]

    def restore() -> None:
        for p, g in zip(with_gradient, drawn, strict=True):
            p.grad = g.clone() if p.grad is None else p.grad.copy_(g)

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    calls: dict[str, Callable[[], object]] = {"forward and backward": backward, "clip and step": clip_and_step}
    for kind, (width, memory) in KINDS.items():
        one = SpectralRange(width, matrices, memory)
        calls[f"spectral, {kind}"] = lambda one=one: one.act_(collect(parameters))  # type: ignore[misc]
    calls["agreement"] = agreement.after
    found = in_turns(calls, rounds=rounds, before=restore)
    hidden = sum(name is not None for name in matrices.among(parameters))
    return {"tokens": setup.tokens, "matrices": hidden, **_shares(found)}


def _shares(found: dict[str, float]) -> dict[str, Any]:
    work = found["forward and backward"]
    step = work + found["clip and step"]
    added = {name: ms for name, ms in found.items() if name not in ("forward and backward", "clip and step")}
    together = {f"{name} + agreement": ms + added["agreement"] for name, ms in added.items() if name != "agreement"}
    return {
        "milliseconds": {name: round(ms, 3) for name, ms in {**found, "whole step": step}.items()},
        "share of forward and backward": {name: round(ms / work, 4) for name, ms in added.items()},
        "share of a whole step": {name: round(ms / step, 4) for name, ms in {**added, **together}.items()},
    }


def measure_shapes(name: str, rounds: int, tokens: int) -> dict[str, Any]:
    """Matrices alone; forward and backward by the time that this machine takes for as many multiply-adds of the same matrix."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape)) for shape in SHAPES[name]]
    for w in weights:
        w.grad = torch.randn_like(w)
    rows = torch.randn(256, weights[0].shape[1])

    class All(HiddenMatrices):
        def among(self, parameters: Any) -> list[str | None]:
            return [f"matrix {n}" for n in range(len(parameters))]

    calls: dict[str, Callable[[], object]] = {
        "256 tokens through the first matrix": lambda: rows @ weights[0].detach().T
    }
    kinds = dict(list(KINDS.items())[: None if rounds > 1 else 1])  # the large matrix is timed once
    for kind, (width, memory) in kinds.items():
        one = SpectralRange(width, All(list), memory)
        calls[f"spectral, {kind}"] = lambda one=one: one.act_(collect(weights))  # type: ignore[misc]
    found = in_turns(calls, rounds=rounds, before=lambda: None, warm=2 if rounds > 1 else 0)
    products = {f"{w:g}": len(quintics(smallest_value(w, min(SHAPES[name][0])))) for w, _ in kinds.values()}
    size = sum(w.numel() for w in weights)
    work = found["256 tokens through the first matrix"] * (tokens / 256) * 3 * size / weights[0].numel()
    return {
        "shapes": [list(shape) for shape in sorted(set(SHAPES[name]))],
        "matrices": len(weights),
        "iterations": products,
        "milliseconds": {k: round(v, 2) for k, v in found.items()},
        f"share of forward and backward at {tokens} tokens": {
            k: round(v / work, 5) for k, v in found.items() if k.startswith("spectral")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[*SETUPS, *SHAPES], choices=[*SETUPS, *SHAPES], metavar="SETUP")
    parser.add_argument("--tokens", type=int, default=16_000, help="of a step, for the matrices without a model")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, one thread",
        "rounds": arguments.rounds,
        "setups": {},
    }
    for name in arguments.only:
        if name in SETUPS:
            results["setups"][name] = measure(name, arguments.rounds)
        else:
            large = name == "llama-7b-layer"
            results["setups"][name] = measure_shapes(name, 1 if large else arguments.rounds, arguments.tokens)
        print(name, json.dumps(results["setups"][name], indent=1), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
