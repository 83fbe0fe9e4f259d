"""Run under `torchrun` by test_ddp.py: one rank of a data-parallel run, with a Trainer or with a hand-written loop."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, AdaptiveClipTrainer
from tests.integrations.launching import leave

CONFIG = AdaptiveClipConfig(warmup_observations=10, ceiling_share=1.0, max_pace=2.0)
DIVERGING = CONFIG.replace(divergence_spreads=2.0, divergence_steps=5, on_trouble="fallback", max_pace=1.0)
RULED = CONFIG.replace(parameter_rules={"2.*": {"static_threshold": 5.0}, "*.bias": "exclude"}, max_pace=1.0)
CONFIGS = {"diverging": DIVERGING, "ruled": RULED}


def loop(kind, folder):
    from accelerate import Accelerator

    from tests.loops import make, weights

    accelerator = Accelerator(cpu=True)
    model, optimizer = make()
    clipper = AdaptiveClipper(
        CONFIGS.get(kind, CONFIG),
        accelerator=accelerator,
        optimizer=optimizer,
        ledger=folder / "clip_ledger.jsonl",
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    rank, world = accelerator.process_index, accelerator.num_processes

    def train(first, last):
        for step in range(first, last):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))[rank::world]
            # Rank 1 alone gets the faults: a NaN at step 20, a spike at step 30.
            fault = {20: float("nan"), 30: 500.0}.get(step, 1.0) if rank == world - 1 else 1.0
            if kind == "diverging":
                fault = 1.0
            loss = torch.nn.functional.mse_loss(model(x), x[:, :1] * 2) * fault
            if kind == "diverging" and rank == world - 1:
                loss = loss + 3.0 * step  # only this rank sees its loss rise
            accelerator.backward(loss)
            clipper.clip_(model.parameters(), loss=loss)
            optimizer.step()
            optimizer.zero_grad()

    if kind == "resumed":
        train(0, 25)
        accelerator.save_state(str(folder / "checkpoint"))
        train(25, 40)
        first = weights(accelerator.unwrap_model(model)), str(clipper.state)
        accelerator.load_state(str(folder / "checkpoint"))
        train(25, 40)
        again = weights(accelerator.unwrap_model(model)), str(clipper.state)
        resumed = torch.equal(first[0], again[0]) and first[1] == again[1]
    else:
        train(0, 40)
        resumed = None
    clipper.close()
    return clipper, weights(accelerator.unwrap_model(model)), rank, resumed


def main(kind, folder):
    torch.set_num_threads(1)
    if kind == "trainer":
        from tests.integrations.trainers import arguments, build, run, weights

        # As many examples per step as one process has alone.
        batch = 16 // int(os.environ["WORLD_SIZE"])
        saving = {"save_strategy": "steps", "save_steps": 15}
        args = arguments(folder, max_steps=30, per_device_train_batch_size=batch, ddp_backend="gloo", **saving)
        trainer = build(AdaptiveClipTrainer, folder, args=args, clip=CONFIG)
        for layer in trainer.model.model.layers:
            layer.self_attn.attention_dropout = 0.0  # every rank would draw its own
        checkpoint = folder / "checkpoint-15"
        run(trainer, resume_from_checkpoint=str(checkpoint) if checkpoint.exists() else None)
        clipper, final, rank, resumed = trainer.clipper, weights(trainer), args.process_index, None
    else:
        clipper, final, rank, resumed = loop(kind, folder)
    (folder / f"rank{rank}.json").write_text(
        json.dumps(
            {
                "state": {k: np.asarray(v, dtype=np.float32).tobytes().hex() for k, v in clipper.state.items()},
                "counts": clipper.statistics.counts_by_name(),
                "weights": final.double().sum().item().hex(),
                "norm": final.norm().item(),
                "resumed": resumed,
                "has_ledger": clipper._run.recorder.ledger is not None,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    leave()
