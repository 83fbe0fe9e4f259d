"""A small, noisy regression in a plain PyTorch loop, with faults planted where a test wants them."""

import contextlib
from unittest import mock

import torch

from hf_adaclip.drivers.clipping import ClippingDriver


class HostReads(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what makes the host wait for a tensor's value: operations, and methods that read the memory of a CPU tensor with none."""

    NAMES = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal", "aten::masked_select")
    METHODS = ("numpy", "tolist")  # `numpy.asarray` calls the first

    def __init__(self):
        super().__init__()
        self.count = 0
        self._patches = contextlib.ExitStack()

    def __enter__(self):
        for name in self.METHODS:
            self._patches.enter_context(
                mock.patch.object(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))
            )
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._patches.close()

    def _counted(self, method):
        def read(tensor, *args, **kwargs):
            before = self.count
            value = method(tensor, *args, **kwargs)
            self.count = before + 1  # once, whatever it calls
            return value

        return read

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in self.NAMES:
            self.count += 1
        return func(*args, **(kwargs or {}))


def make(seed=0, **adamw):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    return model, torch.optim.AdamW(model.parameters(), **{"lr": 3e-3, "fused": True, **adamw})


def train(model, optimizer, clip, steps, *, start=0, factors=None):
    """Run steps `start` to `start + steps`; batches depend on the step alone. `factors[step]` multiplies a step's loss.

    `clip(model, loss)` is called in place of clipping. Returns the norms before clipping.
    """
    norms = []
    for step in range(start, start + steps):
        g = torch.Generator().manual_seed(step)
        x = torch.randn(16, 8, generator=g)
        y = x[:, :1] * 2 + 0.1 * torch.randn(16, 1, generator=g)
        loss = torch.nn.functional.mse_loss(model(x), y) * (factors or {}).get(step, 1.0)
        loss.backward()
        norms.append(float(clip(model, loss.detach())))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def guards_of(clipper):
    """What stands before the steps of the clipper's optimizers."""
    assert isinstance(clipper._driver, ClippingDriver)
    return clipper._driver.guards
