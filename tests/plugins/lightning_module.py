"""A small model for Lightning, also by class path from YAML, and the script that `LightningCLI` and DDP run."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Regression(pl.LightningModule):
    """Its batches hold one that is far too large, at `spike`, and one that is not finite, at `nan`."""

    def __init__(self, lr: float = 0.05, spike: int = 15, nan: int = -1, fused: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
        self.lr, self.spike, self.nan, self.fused = lr, spike, nan, fused
        self.seen = 0

    def loss(self, batch):
        x, y = batch
        return torch.nn.functional.mse_loss(self.net(x), y)

    def training_step(self, batch, batch_idx):
        factor = 100.0 if batch_idx == self.spike else float("nan") if batch_idx == self.nan else 1.0
        return self.loss(batch) * factor

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, fused=self.fused)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(320, 8, generator=generator)
        return DataLoader(TensorDataset(x, x[:, :1] * 2), batch_size=8, shuffle=False)


class TwoOptimizers(Regression):
    """Manual optimization: an optimizer for each layer, and accumulation over two batches for the second."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        first.step()
        first.zero_grad()
        if batch_idx % 2:
            second.step()
            second.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.AdamW(self.net[i].parameters(), lr=self.lr) for i in (0, 2)]


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


def ddp(folder):
    from hf_adaclip.integrations.lightning import AdaptiveClip

    callback = AdaptiveClip("adaptive:warmup_observations=5,ceiling_share=1.0")
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=15,
        callbacks=[callback],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Regression(spike=10)
    trainer.fit(module)
    state = {name: float(value) for name, value in callback.clippers[0].state.items()}
    torch.save({"weights": flat(module), "state": state}, Path(folder) / f"rank{trainer.global_rank}.pt")


def cli():
    from lightning.pytorch.cli import LightningCLI

    command = LightningCLI(Regression)
    torch.save(flat(command.model), "weights.pt")


if __name__ == "__main__":
    if "--ddp" in sys.argv:
        ddp(sys.argv[-1])  # left there, for the process that Lightning starts with the same arguments
    else:
        cli()
