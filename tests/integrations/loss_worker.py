"""Run under `torchrun` by test_ranks.py: a data-parallel loop in which not every rank knows its loss in every step."""

import json
import os
import sys
from pathlib import Path

import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from tests.integrations.launching import leave
from tests.loops import make, weights


def main(kind, folder):
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    model, optimizer = make()
    guard = {"divergence_spreads": 6.0} if kind == "guard" else {}
    config = AdaptiveClipConfig(warmup_observations=8, ceiling_share=1.0, **guard)
    if kind == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        clipper = AdaptiveClipper(config, accelerator=accelerator, optimizer=optimizer)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
    else:
        torch.distributed.init_process_group("gloo")
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        clipper = AdaptiveClipper(config, optimizer=optimizer, model=None if kind == "guard" else wrapped)
    seen = []
    for step in range(30):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))[rank::2]
        loss = torch.nn.functional.mse_loss(wrapped(x), x[:, :1] * 2)
        loss.backward()
        knows = rank == 0 if kind != "sometimes" else (step + rank) % 3 > 0
        clipper.clip_(wrapped.parameters(), loss=loss if knows else None)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(clipper.state["loss_seen"]))
    clipper.close()
    (folder / f"rank{rank}.json").write_text(json.dumps({"seen": seen, "weights": weights(model).sum().item().hex()}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    leave()
