"""Run under `torchrun` by test_sharded.py: a sharded run beside the same run unsharded, on every rank."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.gradients import coordinates
from hf_adaclip.gradients.norms import global_norm, tensor_norms
from tests.integrations.launching import leave
from tests.lanes import on_lane

CONFIG = AdaptiveClipConfig.resolve("guard:warmup_observations=10,ceiling_share=1.0")
STEPS = 40
RULES = {"3.*": {"controller": "static", "static_threshold": 0.05}, "*.bias": "exclude"}
FAULTS = {20: float("nan"), 30: 500.0}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02),  # shows an error of scale, which Adam hides
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
}


def make():
    torch.manual_seed(0)
    # 7 is not divisible by the number of ranks, and of the last layer one rank has nothing.
    layers = torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 7), torch.nn.Linear(7, 1)
    return torch.nn.Sequential(*layers)


def shard(layout, model):
    world = dist.get_world_size()
    if layout == "fsdp":
        fully_shard(model[2])
        return fully_shard(model)
    if layout == "hsdp":
        return fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copy", "shard")))
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp"]) if layout == "fsdp+tp" else model


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model):
    return [p.grad for p in model.parameters()]


def step(model, optimizer, clipper, x, factor):
    loss = (model(x) - 2 * x[:, :1]).square().mean() * factor
    loss.backward()
    before = tensor_norms(gradients(model))
    norm = clipper.clip_(model.parameters(), measure=True)
    optimizer.step()
    optimizer.zero_grad()
    return before, norm


def paced(layout, folder, rank, world):
    """Pace of every step of an unsharded and of a sharded run, the distance estimate taken on all coordinates of both."""
    setattr(coordinates, "EVERY", 1)  # noqa: B010
    setattr(coordinates, "_BLOCK", 10**9)  # noqa: B010
    config = CONFIG.replace(max_pace=8.0, pace_start=5)
    found = []
    for sharded in (False, True):
        model = shard(layout, make()) if sharded else make()
        # torch 2.13: a fused step with its rate in a tensor takes no mix of sharded and plain weights.
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=layout != "tp", foreach=False)
        clipper, paces = AdaptiveClipper(config, optimizer=optimizer), []
        for s in range(STEPS):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(s))
            shards = world if layout in ("fsdp", "hsdp") else 1 if layout == "tp" else world // 2
            part = rank if layout in ("fsdp", "hsdp") else 0 if layout == "tp" else rank // 2
            step(model, optimizer, clipper, x.chunk(shards)[part] if sharded else x, FAULTS.get(s, 1.0))
            paces.append(float(clipper.state["pace"]))
        clipper.save_state(folder)
        clipper.close()
        found.append(paces)
    return found


def main(layout, kind, granularity, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    config = CONFIG.replace(**({"parameter_rules": RULES} if granularity == "rules" else {"granularity": granularity}))
    plain, sharded = make(), shard(layout, make())
    runs = []
    for model, ledger in ((plain, "none"), (sharded, str(folder / "ledger.jsonl"))):
        optimizer = OPTIMIZERS[kind](model.parameters())
        runs.append((model, optimizer, AdaptiveClipper(config, optimizer=optimizer, model=model, ledger=ledger)))
    batches_differ = layout != "tp"
    worst = {"norm": 0.0, "norms": 0.0, "weights": 0.0}
    for s in range(STEPS):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(s))
        shards = world if layout in ("fsdp", "hsdp") else world // 2 if batches_differ else 1
        mine = x.chunk(shards)[rank if layout in ("fsdp", "hsdp") else rank // 2 if batches_differ else 0]
        factor = FAULTS.get(s, 1.0)
        norms, norm = step(*runs[0], x, factor)
        norms_sharded, norm_sharded = step(*runs[1], mine, factor)
        if factor == factor:
            worst["norm"] = max(worst["norm"], abs(float(norm_sharded / norm) - 1))
            worst["norms"] = max(worst["norms"], float((norms_sharded / norms - 1).abs().max()))
    for a, b in zip(plain.parameters(), sharded.parameters(), strict=True):
        worst["weights"] = max(worst["weights"], float((a - whole(b)).detach().abs().max()))
    (sharded(mine)).square().mean().backward()
    reduced = []
    original = dist.all_reduce

    def counting(tensor, *args, **kwargs):
        reduced.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counting
    clipper = runs[1][2]
    mode = CommDebugMode()
    with mode:
        clipper.clip_(sharded.parameters(), measure=False)
    dist.all_reduce = original
    calls = mode.get_total_counts()
    for _, _, done in runs:
        done.close()

    paces = paced(layout, folder, rank, world)

    # A pending sum: every rank holds a summand, and the norm is that of the sum.
    mesh = init_device_mesh("cpu", (world,))
    summand = torch.full((3,), float(rank + 1))
    pending = DTensor.from_local(summand, mesh, [Partial()])
    partial = float(global_norm(tensor_norms([pending])))
    expected = float(torch.full((3,), sum(range(1, world + 1)), dtype=torch.float32).norm())
    (folder / f"rank{rank}.json").write_text(
        json.dumps(
            {
                "worst": worst,
                "state": {k: v.tolist() for k, v in clipper.state.items()},
                "counts": clipper.statistics.counts_by_name(),
                "plain counts": runs[0][2].statistics.counts_by_name(),
                "reduced": reduced,
                "other collectives": calls - len(reduced),
                "partial": partial / expected,
                "paces": paces,
                "finite": all(bool(whole(p).isfinite().all()) for p in sharded.parameters()),
            }
        )
    )


if __name__ == "__main__":
    with on_lane(sys.argv[4]):
        main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[5]))
    leave()
