"""Run under `torchrun` by test_deepspeed.py: ZeRO over gloo, with a hand-written loop or a Trainer.

Accelerate has no DeepSpeed on CPUs of its own: with DS_ACCELERATOR=cpu the engine is real, but every rank believes that it is process 0.
So batches are dealt out by the rank that torch.distributed knows.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, AdaptiveClipTrainer, ConfigError
from hf_adaclip.incidents.contents import load_batch
from tests.integrations.launching import leave

CONFIG = AdaptiveClipConfig(warmup_observations=10, ceiling_share=1.0)
STEPS = 40
CLIP = 0.5


def settings(stage, bf16):
    return {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16, "check_grad_overflow": False},
    }


def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def batch(step, rank, world):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
    return x, 2 * x[:, :1]


def weights(engine):
    import deepspeed

    parts = []
    for p in engine.module.parameters():
        with deepspeed.zero.GatheredParameters([p]):
            parts.append(p.detach().float().flatten().clone())
    return torch.cat(parts)


def unclipped_norm(model, step, factor):
    """Norm of the mean gradient over the whole batch, computed without DeepSpeed."""
    x, y = batch(step, 0, 1)
    ((model(x) - y).square().mean() * factor).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    model.zero_grad()
    return float(norm)


def loop(stage, bf16, clip, folder):
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings(stage, bf16)))
    rank, world = dist.get_rank(), dist.get_world_size()
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0 if clip == "static" else 0.05)
    clipper = AdaptiveClipper(
        clip if clip == "static" else CONFIG.replace(controller=clip),
        accelerator=accelerator,
        optimizer=optimizer,
        ledger=folder / "clip_ledger.jsonl",
    )
    engine, optimizer = accelerator.prepare(model, optimizer)
    faults = {20: float("nan"), 30: 500.0}
    told, moved, norms = [], [], []

    def train(first, last):
        for step in range(first, last):
            x, y = batch(step, rank, world)
            before = weights(engine)
            clipper.watch({"x": x, "step": step})
            # One rank alone has the fault.
            factor = faults.get(step, 1.0) if rank == world - 1 else 1.0
            loss = (engine(x.to(torch.bfloat16 if bf16 else torch.float32)).float() - y).square().mean() * factor
            told.append(engine.optimizer.clip_grad)
            accelerator.backward(loss)
            norms.append(float(clipper.clip_(engine.parameters(), loss=loss)))
            optimizer.step()
            moved.append(float((weights(engine) - before).norm()))

    train(0, 25)
    accelerator.save_state(str(folder / "checkpoint"))
    train(25, STEPS)
    ended = weights(engine)
    accelerator.load_state(str(folder / "checkpoint"))
    engine.optimizer.clip_grad = 123.0  # what an old checkpoint would bring along
    train(25, STEPS)
    again = weights(engine)
    clipper.close()
    (folder / f"rank{rank}.json").write_text(
        json.dumps(
            {
                "told": told,
                "moved": moved,
                "norms": norms,
                "incidents": kept_of(clipper, lambda step: batch(step, rank, world)[0]),
                "counts": clipper.statistics.counts_by_name(),
                "state": {k: float(v).hex() for k, v in clipper.state.items()},
                "same after resuming": torch.equal(ended, again),
                "expected first norm": unclipped_norm(make(), 0, 1.0),
                "finite": bool(ended.isfinite().all()),
            }
        )
    )


def kept_of(clipper, expected):
    """Step, kind and folder of every incident, and whether its batch is what this rank was fed."""
    found = []
    for incident in clipper.incidents:
        [kept] = load_batch(incident.folder / incident.facts["batch"]["file"])
        right = kept["step"] == incident.step and torch.equal(kept["x"], expected(incident.step))
        found.append([incident.step, incident.kind, incident.folder.name, right, incident.facts.get("modules")])
    return found


def trainer(stage, folder):
    from tests.integrations.trainers import arguments, build, run

    config = {**settings(stage, bf16=False), "gradient_clipping": "auto", "zero_allow_untested_optimizer": True}
    config["train_micro_batch_size_per_gpu"] = "auto"
    changes = {"deepspeed": config, "use_cpu": False, "save_strategy": "steps", "save_steps": 20, "max_grad_norm": 0.7}
    with contextlib.suppress(ConfigError):
        build(AdaptiveClipTrainer, folder, args=arguments(folder, **changes), clip=CONFIG.replace(max_pace=2.0))
        raise AssertionError("a pace must be refused as the Trainer is made")
    part = build(
        AdaptiveClipTrainer,
        folder,
        args=arguments(folder, **changes),
        clip=CONFIG.replace(ledger=str(folder / "clip_ledger.jsonl")),
    )
    run(part)
    rank = dist.get_rank()
    engine = part.model_wrapped
    (folder / f"rank{rank}.json").write_text(
        json.dumps(
            {
                "counts": part.clipper.statistics.counts_by_name(),
                "state file": os.path.exists(folder / "checkpoint-20/clip_state.safetensors"),
                "told": engine.optimizer.clip_grad,
                "explain": part.clipper.explain(),
                "grad_norm": [h["grad_norm"] for h in part.state.log_history if "grad_norm" in h],
            }
        )
    )


def compile_nothing():
    """Ranks speak by gloo. DeepSpeed's own communication on a CPU takes a minute to compile, and is not what is tested."""
    import deepspeed

    deepspeed.ops.__compatible_ops__.clear()


if __name__ == "__main__":
    torch.set_num_threads(1)
    compile_nothing()
    kind, stage, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[-1])
    if kind == "trainer":
        trainer(stage, folder)
    else:
        loop(stage, kind == "bf16", sys.argv[3], folder)
    leave()
