"""What clipping adds to an optimizer step: ours beside `clip_grad_norm_` and the peers, in one process, interleaved.

    python -m scripts.bench.step                                   # this machine's CPU
    python -m scripts.bench.step --device cuda --json model_cards/speed/cuda.json --plot model_cards/speed/cuda.png

Every round runs every way once, in an order drawn anew; shown are medians over rounds with half the distance between the quartiles. The
*marginal cost* is (way - step alone) / (`clip_grad_norm_(foreach=True)` and step - step alone), per round, 1 for the reference.
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.controllers.numerics.ops import host_number
from hf_adaclip.gradients import scale_
from hf_adaclip.gradients.coordinates import EVERY
from hf_adaclip.run.versions import environment
from hf_adaclip.telemetry.progress import Progress

Way = Callable[[], None]
STEP, REFERENCE = "step alone", "clip_grad_norm_ + step"
RANGE = AdaptiveClipConfig.resolve("guard")  # what shapes the step has a benchmark of its own: spectral.py


def transformer(
    width: int, layers: int, hidden: int, rest: list[tuple[int, ...]], gated: bool = False
) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a transformer: attention, feed-forward, norms, and what comes before and after."""
    bias = [] if gated else [(width,)] * 4 + [(hidden,), (width,)]
    block = [(width, width)] * 4 + [(hidden, width)] * (2 if gated else 1) + [(width, hidden)] + [(width,)] * 2 + bias
    return rest + block * layers


SHAPES: dict[str, list[tuple[int, ...]]] = {
    "vit-base": transformer(768, 12, 3072, [(768, 3, 16, 16), (1, 197, 768), (1000, 768), (1000,)]),
    "bert-base": transformer(768, 12, 3072, [(30522, 768), (512, 768), (2, 768)]),
    "llama-1b": transformer(2048, 16, 8192, [(32000, 2048)], gated=True),
    "many-small": [(64, 16)] * 2000,
    "few-large": [(2048, 4096)] * 8,
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=1e-6, fused=True),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, lr=1e-6, foreach=True, fused=False),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-6, foreach=True),
}


class Holder(torch.nn.Module):
    """Parameters and gradients of given shapes; no forward pass is needed."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device)) for shape in shapes
        )
        for p in self.weights:
            p.grad = torch.randn_like(p) / math.sqrt(sum(math.prod(s) for s in shapes))


def ways(model: Holder, optimizer: torch.optim.Optimizer, *, on_device: bool) -> dict[str, tuple[Way, float]]:
    """What is compared, and the passes over the gradients that each makes besides the step's own reading.

    On a device nobody knows on the host that a step is inside the range, so every step scales: in a pass of its own, or inside the step.
    """
    parameters = list(model.weights)
    ours = {
        "ours, inside the range": (AdaptiveClipConfig(controller="static", static_threshold=1e6), 1.0),
        "ours, adaptive": (RANGE.replace(static_threshold=1e6), 1.0),
        "ours, adaptive per tensor": (RANGE.replace(static_threshold=1e6, granularity="tensor"), 1.0),
        "ours, adaptive with a pace": (RANGE.replace(static_threshold=1e6, max_pace=64.0), 1.0 + 2 / EVERY),
    }
    if on_device:
        ours = {
            "ours, unfolded": (RANGE.replace(static_threshold=1e6, fold="never"), 3.0),
            "ours, folded": (RANGE.replace(static_threshold=1e6), 2.0),
            "ours, adaptive per tensor": (RANGE.replace(static_threshold=1e6, granularity="tensor"), 3.0),
            "ours, adaptive with a pace": (RANGE.replace(static_threshold=1e6, max_pace=64.0), 2.0 + 2 / EVERY),
        }

    def stepping(clip: Callable[[], object]) -> Way:
        def way() -> None:
            clip()
            optimizer.step()

        return way

    found: dict[str, tuple[Way, float]] = {
        STEP: (optimizer.step, 0.0),
        REFERENCE: (stepping(lambda: torch.nn.utils.clip_grad_norm_(parameters, 0.5, foreach=True)), 3.0),
    }
    for name, (config, passes) in ours.items():
        clipper = AdaptiveClipper(config.replace(self_test=False), optimizer=optimizer)

        def clip(clipper: AdaptiveClipper = clipper) -> None:
            clipper.clip_(parameters, measure=False)

        found[name] = (stepping(clip), passes)
    if not on_device:
        # A gradient that has been clipped once is inside the range from then on, so the pass that scales is made here every time.
        clipper = AdaptiveClipper(RANGE.replace(static_threshold=1e6, self_test=False), optimizer=optimizer)
        factor = host_number(1 - 1e-7)

        def clip_and_scale() -> None:
            clipper.clip_(parameters, measure=False)
            scale_([p.grad for p in parameters if p.grad is not None], factor)

        found["ours, clipped every step"] = (stepping(clip_and_scale), 3.0)
    found.update({name: (stepping(call), 3.0) for name, call in peers(model).items()})
    return found


def peers(model: Holder) -> dict[str, Callable[[], object]]:
    """The packages from PyPI that are installed, as their users call them."""
    found: dict[str, Callable[[], object]] = {}
    try:
        from zclip import ZClip

        clip = ZClip()
        found["zclip"] = lambda: clip.step(model)
    except ImportError:
        pass
    try:
        from autoclip.torch import QuantileClip

        quantile = QuantileClip(model.parameters(), global_threshold=True)
        found["autoclip"] = quantile.step
    except ImportError:
        pass
    return found


def timed(way: Way, device: str) -> float:
    """Milliseconds of one call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    way()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def host_reads_and_launches(way: Way) -> tuple[int, int]:
    """Reads of the device by the host, and kernels launched, in one call; CUDA only."""
    import warnings

    from torch.profiler import ProfilerActivity, profile

    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        way()
    torch.cuda.set_sync_debug_mode("default")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        way()
    launches = sum(e.count for e in profiled.key_averages() if e.key in ("cudaLaunchKernel", "cuLaunchKernel"))
    return sum("synchroniz" in str(w.message) for w in caught), launches


def bench(shape: str, dtype: torch.dtype, kind: str, device: str, rounds: int, seed: int = 0) -> dict[str, Any]:
    """All ways on one list of shapes."""
    torch.manual_seed(seed)
    model = Holder(SHAPES[shape], dtype, device)
    optimizer = OPTIMIZERS[kind](model.parameters())
    compared = ways(model, optimizer, on_device=device != "cpu")
    times: dict[str, list[float]] = {name: [] for name in compared}
    order = list(compared)
    for way, _ in compared.values():
        for _ in range(3):
            way()
    rng = random.Random(seed)
    for _ in Progress(range(rounds), desc=f"{shape}, {str(dtype)[6:]}, {kind}", file=sys.stderr, leave=False):
        rng.shuffle(order)
        for name in order:
            times[name].append(timed(compared[name][0], device))
    size = sum(p.numel() for p in model.weights)
    rows = {}
    for name, (way, passes) in compared.items():
        marginal = [
            (t - s) / (r - s) for t, s, r in zip(times[name], times[STEP], times[REFERENCE], strict=True) if r > s
        ]
        low, middle, high = statistics.quantiles(times[name], n=4)
        quartiles = statistics.quantiles(marginal, n=4)
        rows[name] = {
            "milliseconds": middle,
            "spread": (high - low) / 2,
            "marginal": quartiles[1],
            "marginal_spread": (quartiles[2] - quartiles[0]) / 2,
            "bytes_per_parameter": passes * dtype.itemsize,
        }
        if device == "cuda":
            rows[name]["host_reads"], rows[name]["launches"] = host_reads_and_launches(way)
    return {
        "shape": shape,
        "dtype": str(dtype)[6:],
        "optimizer": kind,
        "parameters": size,
        "tensors": len(model.weights),
        "rows": rows,
    }


def show(result: dict[str, Any]) -> None:
    print(
        f"\n{result['shape']} ({result['parameters'] / 1e6:.0f} M in {result['tensors']} tensors), {result['dtype']}, {result['optimizer']}"
    )
    for name, row in result["rows"].items():
        extra = f"  host reads {row['host_reads']}, launches {row['launches']}" if "launches" in row else ""
        print(
            f"  {name:28s} {row['milliseconds']:9.2f} ms (+- {row['spread']:.2f})   marginal {row['marginal']:6.2f} "
            f"(+- {row['marginal_spread']:.2f})   {row['bytes_per_parameter']:4.0f} bytes/parameter{extra}",
            flush=True,
        )


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Marginal costs as bars, a panel for each list of shapes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6 * len(results)), layout="constrained")
    axes = figure.subplots(len(results), 1, squeeze=False)[:, 0]
    for axis, result in zip(axes, results, strict=True):
        rows = {k: v for k, v in result["rows"].items() if k != STEP}
        colours = ["#0072B2" if name.startswith("ours") else "#999999" for name in rows]
        values = [row["marginal"] for row in rows.values()]
        axis.barh(list(rows), values, xerr=[row["marginal_spread"] for row in rows.values()], color=colours)
        axis.axvline(1, color="#D55E00", linewidth=1)
        axis.axvline(1 / 3, color="#009E73", linewidth=1, linestyle="--")
        axis.invert_yaxis()
        axis.set_title(f"{result['shape']}, {result['dtype']}, {result['optimizer']}", loc="left", fontsize=10)
    axes[-1].set_xlabel("marginal cost; 1 = clip_grad_norm_, dashed = one read of the gradients")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def require_device(parser: argparse.ArgumentParser, device: str) -> None:
    """End with a usage error where the device that `--device` names is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be one that is there, but is cuda, and torch finds no CUDA device. Choose cpu.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where (default: %(default)s)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=list(SHAPES),
        default=None,
        help="lists of parameter shapes (default: all that fit; llama-1b needs 18 GB in float32 and is left out on a CPU)",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["float32", "bfloat16"],
        default=["float32", "bfloat16"],
        help="of weights and gradients (default: both)",
    )
    parser.add_argument(
        "--optimizers", nargs="+", choices=list(OPTIMIZERS), default=list(OPTIMIZERS), help="default: all"
    )
    parser.add_argument("--rounds", type=int, default=21, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the results there")
    parser.add_argument(
        "--plot", type=Path, default=None, metavar="PNG", help="draw the marginal costs of fused AdamW into this file"
    )
    arguments = parser.parse_args()
    require_device(parser, arguments.device)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    shapes = arguments.shapes or [s for s in SHAPES if arguments.device == "cuda" or s != "llama-1b"]
    results = []
    for shape in shapes:
        for dtype in arguments.dtypes:
            for kind in arguments.optimizers:
                results.append(bench(shape, getattr(torch, dtype), kind, arguments.device, arguments.rounds))
                show(results[-1])
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(["python -m scripts.bench.step", *sys.argv[1:]]),
            "device": torch.cuda.get_device_name(0) if arguments.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "rounds": arguments.rounds,
            "versions": environment(),
        }
        arguments.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        draw([r for r in results if r["optimizer"] == arguments.optimizers[0]], arguments.plot)


if __name__ == "__main__":
    main()
