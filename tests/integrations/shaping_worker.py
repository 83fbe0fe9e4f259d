"""Run under `torchrun` by test_shaping_ranks.py: the spectral range and the agreement over ranks, beside the same run in one process."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from hf_adaclip.errors import UnsupportedSetupError
from tests.integrations.launching import leave
from tests.integrations.sharded_worker import shard, whole

CONFIG = AdaptiveClipConfig(
    warmup_observations=10, ceiling_share=1.0, max_pace=1.0, spectral_width=0.3, agreement=True
)
DEFAULT = CONFIG.replace(spectral_width="auto", agreement="auto")
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True, weight_decay=0.1),
    "plain": lambda p: torch.optim.AdamW(
        p, lr=3e-3, foreach=False, weight_decay=0.1
    ),  # for a mix of sharded and plain weights
    "quick": lambda p: torch.optim.AdamW(p, lr=3e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
}


def make():
    torch.manual_seed(0)
    # 7 is not divisible by the number of ranks, and of the last layer one rank has nothing.
    layers = torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 7), torch.nn.Linear(7, 1)
    return torch.nn.Sequential(*layers)


def main(layout, kind, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    plain = make()
    model = DistributedDataParallel(make()) if layout in ("ddp", "loaded") else shard(layout, make())
    config = CONFIG
    if layout == "loaded":  # as `from_pretrained` marks what it loads
        config = DEFAULT
        for parameter in model.parameters():
            parameter._is_hf_initialized = rank == 0  # one rank knowing it is enough
    runs, refused = [], None
    for net, ledger in ((plain, "none"), (model, str(folder / "clip_ledger.jsonl"))):
        optimizer = OPTIMIZERS[kind](net.parameters())
        runs.append((net, optimizer, AdaptiveClipper(config, optimizer=optimizer, model=net, ledger=ledger)))
    shares = {
        "fsdp": (world, rank),
        "ddp": (world, rank),
        "loaded": (world, rank),
        "tp": (1, 0),
        "fsdp+tp": (world // 2, rank // 2),
    }
    parts, mine = shares[layout]
    rows = 128 if layout == "loaded" else 16  # by itself the range acts only where it is worth its work
    for step in range(30):
        x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(step))
        for (net, optimizer, clipper), batch in zip(runs, (x, x.chunk(parts)[mine]), strict=True):
            factor = float("nan") if step == 20 else 1.0
            ((net(batch) - 2 * batch[:, :1]).square().mean() * factor).backward()
            try:
                clipper.clip_(net.parameters(), measure=True)
            except UnsupportedSetupError as error:
                refused = str(error)
                break
            optimizer.step()
            optimizer.zero_grad()
        if refused is not None:
            break
    final = torch.cat([whole(p).detach().flatten() for p in model.parameters()])
    alone = torch.cat([p.detach().flatten() for p in plain.parameters()])
    for _, _, clipper in runs:
        clipper.close()
    (folder / f"rank{rank}.json").write_text(
        json.dumps(
            {
                "refused": refused,
                "distance": float((final - alone).abs().max()),
                "way": float((final - torch.cat([p.detach().flatten() for p in make().parameters()])).abs().max()),
                "weights": final.numpy().tobytes().hex(),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    leave()
