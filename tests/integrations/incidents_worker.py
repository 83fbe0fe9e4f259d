"""Run on several ranks by test_incidents.py: one batch of one rank is bad, in a Trainer or in a loop of Accelerate that accumulates."""

import json
import os
import sys
from pathlib import Path

import torch

from hf_adaclip import AdaptiveClipper, AdaptiveClipTrainer
from tests.integrations.launching import leave
from tests.integrations.trainers import arguments, build, run
from tests.lanes import on_lane
from tests.loops import make

AT = 30


class Planted(AdaptiveClipTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("fed", {}).setdefault(self.state.global_step, []).append(inputs["input_ids"].tolist())
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        bad = self.state.global_step == AT and self.args.process_index == 1
        return loss * float("nan") if bad else loss


def trainer(folder):
    made = build(Planted, folder, args=arguments(folder, per_device_train_batch_size=8))
    run(made)
    return made.clipper, made.fed[AT]


def loop(folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = make()
    data = torch.utils.data.TensorDataset(torch.randn(1280, 8, generator=torch.Generator().manual_seed(0)))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    clipper = AdaptiveClipper("adaptive", accelerator=accelerator, optimizer=optimizer, output_dir=folder)
    fed = []
    for number, (x,) in enumerate(clipper.watched(loader)):
        with accelerator.accumulate(model):
            bad = number == 2 * AT + 1 and accelerator.process_index == 1
            loss = torch.nn.functional.mse_loss(model(x), x[:, :1] * 2) * (float("nan") if bad else 1.0)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                clipper.clip_(model.parameters(), loss=loss)
            optimizer.step()
            optimizer.zero_grad()
        if number // 2 == AT:
            fed.append(x.tolist())
    clipper.close()
    return clipper, fed


def main(kind, folder):
    torch.set_num_threads(1)
    clipper, fed = {"trainer": trainer, "loop": loop}[kind](folder)
    found = [[i.step, i.kind, i.folder.name] for i in clipper.incidents]
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps({"found": found, "fed": fed}))


if __name__ == "__main__":
    with on_lane(sys.argv[2]):
        main(sys.argv[1], Path(sys.argv[3]))
    leave()
