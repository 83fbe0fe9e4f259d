"""Run under `torchrun` by test_sharded.py: FSDP2 as Accelerate and the Trainer prepare it, over gloo.

On a CPU, Accelerate turns a request for FSDP into DDP. Everything after that choice works there too, so only the choice is put right.
"""

import json
import sys
from pathlib import Path

import accelerate
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType
from packaging.version import Version
from torch.distributed.tensor import DTensor

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, AdaptiveClipTrainer
from tests.integrations.deepspeed_worker import kept_of
from tests.integrations.launching import leave

CONFIG = AdaptiveClipConfig(warmup_observations=10, ceiling_share=1.0)
RESUMES = Version(accelerate.__version__) >= Version("1.15")
_init = AcceleratorState.__init__


def _init_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
    if self.__dict__.get("fsdp_plugin") is not None:
        self.distributed_type = DistributedType.FSDP


AcceleratorState.__init__ = _init_fsdp


def whole(model):
    return torch.cat(
        [(p.full_tensor() if isinstance(p, DTensor) else p).detach().flatten() for p in model.parameters()]
    )


def loop(folder):
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    from tests.loops import make

    accelerator = Accelerator(
        cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    )
    model, optimizer = make()
    model, optimizer = accelerator.prepare(model, optimizer)
    clipper = AdaptiveClipper(
        CONFIG, accelerator=accelerator, optimizer=optimizer, ledger=folder / "clip_ledger.jsonl"
    )
    rank, world = accelerator.process_index, accelerator.num_processes

    def train(first, last):
        for step in range(first, last):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))[rank::world]
            clipper.watch({"x": x, "step": step})
            factor = {12: float("nan"), 30: 500.0}.get(step, 1.0)
            accelerator.backward((model(x) - 2 * x[:, :1]).square().mean() * factor)
            clipper.clip_(model.parameters())
            optimizer.step()
            optimizer.zero_grad()

    train(0, 20)
    accelerator.save_state(str(folder / "checkpoint"))
    train(20, 40)
    ended, state = whole(model), str(clipper.state)
    if RESUMES:
        accelerator.load_state(str(folder / "checkpoint"))
        train(20, 40)
    clipper.close()
    return {
        "rank": rank,
        "sharded": isinstance(next(model.parameters()), DTensor),
        "resumed": (torch.equal(ended, whole(model)) and state == str(clipper.state)) if RESUMES else None,
        "finite": bool(ended.isfinite().all()),
        "incidents": kept_of(
            clipper, lambda step: torch.randn(16, 8, generator=torch.Generator().manual_seed(step))[rank::world]
        ),
        "counts": clipper.statistics.counts_by_name(),
        "setup": clipper.explain(),
    }


def trainer(folder):
    from tests.integrations.trainers import arguments, build, run

    def one(name, **kwargs):
        fsdp = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        changes = {"fsdp": "full_shard", "fsdp_config": fsdp, "ddp_backend": "gloo", "max_steps": 30}
        args = arguments(folder / name, save_strategy="steps", save_steps=15, **changes)
        part = build(AdaptiveClipTrainer, folder / name, args=args, clip=CONFIG)
        run(part, **kwargs)
        return part

    whole_run = one("run")
    resumed = one("run", resume_from_checkpoint=str(folder / "run/checkpoint-15")) if RESUMES else None
    return {
        "rank": dist.get_rank(),
        "sharded": isinstance(next(whole_run.model.parameters()), DTensor),
        "resumed": torch.equal(whole(whole_run.model), whole(resumed.model)) if resumed else None,
        "finite": True,
        "incidents": [],
        "counts": whole_run.clipper.statistics.counts_by_name(),
        "setup": whole_run.clipper.explain(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = (loop if sys.argv[1] == "loop" else trainer)(Path(sys.argv[2]))
    (Path(sys.argv[2]) / f"rank{result['rank']}.json").write_text(json.dumps(result))
    leave()
