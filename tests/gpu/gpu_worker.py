"""Run under `torchrun` by test_gpu.py: DDP over nccl, or FSDP2, as Accelerate prepares them, on one GPU."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from tests.loops import make

CONFIG = AdaptiveClipConfig(warmup_observations=10, ceiling_share=1.0)


def whole(model):
    parts = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in parts]).clone()


def main(kind, folder):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap") if kind == "fsdp" else None
    if not dist.is_initialized() and torch.cuda.is_available():
        torch.cuda.set_device(0)
        dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
    accelerator = Accelerator(fsdp_plugin=plugin)
    model, optimizer = make()
    model, optimizer = accelerator.prepare(model, optimizer)
    clipper = AdaptiveClipper(
        CONFIG, accelerator=accelerator, optimizer=optimizer, ledger=folder / "clip_ledger.jsonl"
    )

    def train(first, last):
        for step in range(first, last):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step)).to(accelerator.device)
            factor = {12: float("nan"), 30: 500.0}.get(step, 1.0)
            accelerator.backward((model(x) - 2 * x[:, :1]).square().mean() * factor)
            clipper.clip_(model.parameters())
            optimizer.step()
            optimizer.zero_grad()

    train(0, 20)
    accelerator.save_state(str(folder / "checkpoint"))
    train(20, 40)
    ended, state = whole(model), str(clipper.state)
    clipper.flush()
    counts = clipper.statistics.counts_by_name()
    accelerator.load_state(str(folder / "checkpoint"))
    train(20, 40)
    clipper.close()
    result = {
        "setup": str(accelerator.distributed_type.value),
        "counts": counts,
        "finite": bool(ended.isfinite().all()),
        "resumed": torch.equal(ended, whole(model)) and state == str(clipper.state),
    }
    (folder / "rank0.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
