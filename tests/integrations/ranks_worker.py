"""Run under `torchrun` by test_ranks.py: a data-parallel loop in which one rank is made to see other gradients than the other."""

import json
import os
import sys
from pathlib import Path

import torch

from hf_adaclip import AdaptiveClipper, RankDisagreementError
from tests.integrations.launching import leave
from tests.lanes import on_lane
from tests.loops import make


def main(kind, folder):
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    model, optimizer = make()
    if kind == "plain":
        torch.distributed.init_process_group("gloo")
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        clipper = AdaptiveClipper("adaptive", optimizer=optimizer, model=wrapped)
    else:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        clipper = AdaptiveClipper("adaptive", accelerator=accelerator, optimizer=optimizer)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
    stopped = None
    for step in range(170):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))[rank::2]
        torch.nn.functional.mse_loss(wrapped(x), x[:, :1] * 2).backward()
        for parameter in model.parameters():
            if rank == 1 and kind in ("larger", "plain") and step >= 60:
                parameter.grad *= 1.5
            if rank == 1 and kind == "one-nan" and step == 63:
                parameter.grad *= float("nan")
        try:
            clipper.clip_(wrapped.parameters())
            if step % 20 == 19:
                clipper.flush()
        except RankDisagreementError:
            stopped = step
            break
        optimizer.step()
        optimizer.zero_grad()
    (folder / f"rank{rank}.json").write_text(json.dumps({"stopped": stopped}))


if __name__ == "__main__":
    with on_lane(sys.argv[2]):
        main(sys.argv[1], Path(sys.argv[3]))
    leave()
