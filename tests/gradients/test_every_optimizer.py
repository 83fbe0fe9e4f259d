"""A step that is left out in the middle of a run never was: weights, state and counters are those of a run without it, in every optimizer
that is installed."""

import collections
import copy
import enum
import inspect

import numpy as np
import pytest
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper

bitsandbytes = pytest.importorskip("bitsandbytes")
optimi = pytest.importorskip("optimi")
pytorch_optimizer = pytest.importorskip("pytorch_optimizer")

EXCLUDED = {
    **dict.fromkeys(
        ("BSAM", "FriendlySAM", "GSAM", "LookSAM", "SAM", "WSAM"),
        "takes its gradients from a closure, twice a step: clipping has to be within",
    ),
    "LBFGS": "takes its gradients from a closure, many times a step: clipping has to be within",
    **dict.fromkeys(("AdaLOMO", "LOMO"), "steps within the backward pass: there is no gradient left to clip"),
    **dict.fromkeys(("DeMo", "DistributedMuon"), "needs a process group"),
    **dict.fromkeys(("PCGrad", "SafeFP16Optimizer"), "has a backward pass of its own"),
    "SparseAdam": "takes sparse gradients only, which are refused",
    "AdEMAMix32bit": "cannot step on a CPU (bitsandbytes 0.50)",
}
WRAPPERS = ("Lookahead", "Magma", "OrthoGrad", "ScheduleFreeWrapper", "TRAC")
"""Given as `optimizer`, a wrapper is left out as a whole."""
MUONS = ("AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon")
STEPS = 7
BAD = 4


def _names():
    packages = {
        "torch": torch.optim,
        "optimi": optimi,
        "bitsandbytes": bitsandbytes.optim,
        "kozistr": pytorch_optimizer,
    }
    for package, module in packages.items():
        for name in sorted(dir(module)):
            kind = getattr(module, name)
            if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
                # Without a GPU, paged memory is none; and torch's own are offered by others again.
                again = package != "torch" and kind.__module__.startswith("torch.")
                if (
                    name not in EXCLUDED
                    and "Paged" not in name
                    and not again
                    and not name.startswith(("Base", "Optimizer"))
                ):
                    yield pytest.param(kind, id=f"{package}-{name}")


def build(kind):
    torch.manual_seed(0)
    wide = 72 if kind.__module__.startswith("bitsandbytes") else 6  # 8-bit states begin at 4096 numbers
    model = torch.nn.Sequential(
        torch.nn.Linear(wide, wide, bias=False), torch.nn.Tanh(), torch.nn.Linear(wide, 4, bias=False)
    )
    name, known = kind.__name__, inspect.signature(kind.__init__).parameters
    settings = {"lr": 1e-3} if "lr" in known else {}
    if "LARS" in name or (name.startswith("SGD") and kind.__module__.startswith("bitsandbytes")):
        settings["momentum"] = 0.9
    if kind.__module__.startswith("pytorch_optimizer") and name in WRAPPERS:
        return model, wide, kind(torch.optim.AdamW(model.parameters(), lr=1e-3))
    if kind.__module__.startswith("pytorch_optimizer") and name in MUONS:
        first, last = model.parameters()
        groups = [{"params": [first], "use_muon": True}, {"params": [last], "use_muon": False}]
        return model, wide, kind(groups, **settings)
    if name == "AdamMini":
        return model, wide, kind(model, **settings)
    if name == "Ranger21":
        settings["num_iterations"] = 100
    return model, wide, kind(list(model.parameters()), **settings)


def same(a, b):
    """Deep equality of what optimizers keep: tensors, containers, objects of their own, other optimizers."""
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and torch.equal(torch.nan_to_num(a.float()), torch.nan_to_num(b.float()))
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.values(), b.values(), strict=True))
    if isinstance(a, list | tuple | set | collections.deque):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.optim.Optimizer):
        return same(*({k: v for k, v in vars(o).items() if "hooks" not in k and k != "step"} for o in (a, b)))
    if hasattr(a, "__dict__") and not callable(a) and not isinstance(a, enum.Enum):
        return type(a) is type(b) and same(vars(a), vars(b))
    return callable(a) or a == b


def run(kind, steps, factor=1.0):
    model, wide, optimizer = build(kind)
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    torch.manual_seed(1)  # some draw random numbers as they step
    np.random.seed(1)
    config = AdaptiveClipConfig(controller="static", static_threshold=1e6, on_spike="skip")
    clipper = AdaptiveClipper(config, optimizer=optimizer)
    for step in steps:
        x = torch.randn(5, wide, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        (loss * (factor if step == BAD else 1.0)).backward(create_graph=kind.__name__ in ("AdaHessian", "SophiaH"))
        clipper.clip_(model.parameters())
        optimizer.step(*([lambda loss=loss: float(loss)] if kind.__name__ == "AliG" else []))
        for p in model.parameters():
            p.grad = None
    return clipper, copy.deepcopy([p.detach() for p in model.parameters()]), optimizer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(_names()))
def test_a_step_that_is_left_out_never_was(kind):
    _, weights, optimizer = run(kind, [step for step in range(STEPS) if step != BAD])
    for factor in (float("nan"), 1e12):
        clipper, after, used = run(kind, range(STEPS), factor)
        assert clipper.metrics()["clip/skipped"] == 1
        assert same(weights, after)
        assert same(optimizer, used)
        clipper.close()
    _, first, early = run(kind, range(1))
    assert not same(weights, first) or not same(optimizer, early)  # and the other steps were made


def test_no_reason_to_exclude_is_stale():
    offered = {name for module in (torch.optim, bitsandbytes.optim, pytorch_optimizer) for name in dir(module)}
    assert set(EXCLUDED) <= offered
