"""What the static threshold keeps alive is not lost: plain SGD at rates that are far too high, in a Trainer and in a loop."""

import itertools
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, AdaptiveClipTrainer

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
X = RNG.normal(size=(512, 16)).astype("f4")
Y = (np.tanh(X[:, 0] * X[:, 1]) + 0.3 * X[:, 2]).astype("f4")


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        sizes = (16, 64, 64)
        layers = [m for a, b in itertools.pairwise(sizes) for m in (torch.nn.Linear(a, b), torch.nn.ReLU())]
        self.net = torch.nn.Sequential(*layers, torch.nn.Linear(64, 1))

    def forward(self, x=None, labels=None):
        out = self.net(x).squeeze(-1)
        return {"loss": (out - labels).square().mean(), "logits": out}


def final_loss(tmp_path, clip, *, rate, seed, steps, momentum=0.0):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        learning_rate=rate,
        per_device_train_batch_size=8,
        optim="sgd",
        optim_args=f"momentum={momentum}" if momentum else None,
        logging_steps=1000,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    set_seed(seed)
    model = Mlp()
    data = Dataset.from_dict({"x": X.tolist(), "labels": Y.tolist()})
    own = {} if clip is None else {"clip": AdaptiveClipConfig(controller=clip, ledger="none")}
    trainer = (Trainer if clip is None else AdaptiveClipTrainer)(
        model=model, args=arguments, train_dataset=data, **own
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    with torch.no_grad():
        return float((model.net(torch.tensor(X)).squeeze(-1) - torch.tensor(Y)).square().mean())


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("rate", [1.5, 2.0])
def test_sgd_at_rates_that_are_far_too_high_ends_as_the_stock_trainer_does(tmp_path, rate, seed):
    stock = final_loss(tmp_path / "a", None, rate=rate, seed=seed, steps=1000)
    ours = final_loss(tmp_path / "b", "adaptive", rate=rate, seed=seed, steps=1000)
    print(f"rate {rate} seed {seed}: stock {stock:.4f}, adaptive {ours:.4f}")
    assert math.isfinite(ours)
    assert ours < max(4 * stock, 0.05)


@pytest.mark.parametrize("known", [True, False], ids=["loss", "no loss"])
def test_a_loop_of_2000_steps_is_not_lost(known):
    """Rate 1.5, eight samples a step: the range that followed whatever agreed ended at 1e35, static clipping ends at 0.004."""
    torch.manual_seed(1)
    model, x, y = Mlp(), torch.tensor(X), torch.tensor(Y)
    optimizer = torch.optim.SGD(model.parameters(), 1.5)
    clipper = AdaptiveClipper("adaptive", optimizer=optimizer)
    generator = torch.Generator().manual_seed(1)
    order: list[int] = []
    for step in range(2000):
        order = order if len(order) >= 8 else torch.randperm(512, generator=generator).tolist()
        batch, order = order[:8], order[8:]
        loss = model(x[batch], y[batch])["loss"]
        optimizer.zero_grad()
        loss.backward()
        clipper.clip_(model.parameters(), loss=loss.detach() if known else None)
        optimizer.param_groups[0]["lr"] = 1.5 * (1 - step / 2000)
        optimizer.step()
    clipper.close()
    with torch.no_grad():
        assert float(model(x, y)["loss"]) < 0.03
