"""Digits in epochs, in a plain loop that calls nothing but `clip_`: the default beside `clip_grad_norm_`, with and without a schedule.

python model_cards/pace/constant_rate.py FILE    a line per pair of runs; nothing is downloaded, 10 minutes on one core
"""

import json
import logging
import sys
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from hf_adaclip import AdaptiveClipper


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(32), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.first(x.view(-1, 1, 8, 8))), 2)
        out: Tensor = self.head(functional.max_pool2d(functional.relu(self.norm(self.second(x))), 2).flatten(1))
        return out


class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.GRU(8, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x.view(-1, 8, 8))[0][:, -1])
        return out


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def mlp_with_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10))


def one_layer() -> nn.Module:
    return nn.Linear(64, 10)


KINDS: dict[str, Callable[[], nn.Module]] = {
    "MLP": mlp,
    "CNN": Cnn,
    "GRU": Gru,
    "MLP with BatchNorm": mlp_with_norm,
    "one layer": one_layer,
}
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
ROWS, BATCH = 1200, 32


def final(kind: str, rate: float, seed: int, steps: int, *, schedule: bool, default: bool) -> tuple[float, float]:
    """Final loss and accuracy on rows that were held out."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:ROWS], order[ROWS:]
    torch.manual_seed(seed)
    model, batches = KINDS[kind](), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if schedule else None
    clipper = AdaptiveClipper(optimizer=optimizer, model=model) if default else None
    per_epoch = ROWS // BATCH
    for step in range(steps):
        if step % per_epoch == 0:
            epoch = train[torch.randperm(ROWS, generator=batches)]
        rows = epoch[step % per_epoch * BATCH :][:BATCH]
        loss = functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        if clipper is None:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        else:
            clipper.clip_(model.parameters(), loss=loss)
        optimizer.step()
        optimizer.zero_grad()
        if cosine is not None:
            cosine.step()
    model.eval()
    with torch.no_grad():
        out = model(x[held_out])
    right = (out.argmax(1) == y[held_out]).float().mean()
    return round(float(functional.cross_entropy(out, y[held_out])), 4), round(float(right), 4)


def main() -> None:
    torch.set_num_threads(1)
    logging.disable()
    jobs = [(kind, rate, 370, schedule) for schedule in (False, True) for kind in KINDS for rate in RATES]
    jobs += [("MLP", 1e-3, 1480, False), ("MLP with BatchNorm", 1e-3, 1480, False)]
    with open(sys.argv[1], "a", encoding="utf-8") as file:
        for kind, rate, steps, schedule in jobs:
            for seed in range(3):
                runs = {
                    name: final(kind, rate, seed, steps, schedule=schedule, default=name == "default")
                    for name in ("clip_grad_norm_", "default")
                }
                line = {"kind": kind, "rate": rate, "steps": steps, "schedule": "cosine" if schedule else "constant"}
                file.write(json.dumps({**line, "seed": seed, **runs}) + "\n")
                file.flush()


if __name__ == "__main__":
    main()
