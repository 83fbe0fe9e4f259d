"""Copies between devices: one place makes them, and what the host reads has landed."""

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hf_adaclip
from hf_adaclip.controllers.numerics.ops import SCALAR, TensorOps
from hf_adaclip.gradients.observe import to_value
from hf_adaclip.gradients.transfer import HOST, copy_into, moved
from hf_adaclip.run.ring import COLUMNS, HostRing

PACKAGE = Path(hf_adaclip.__file__).parent
TRANSFER = PACKAGE / "gradients" / "transfer.py"
# Of `torch`, what makes a tensor out of nothing or of numbers of the host.
FACTORIES = {
    "arange",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "logspace",
    "ones",
    "rand",
    "randint",
    "randn",
}
FACTORIES |= {"randperm", "scalar_tensor", "tensor", "as_tensor", "asarray", "zeros"}


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node, node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def copies_between_devices(path):
    """Lines that may copy between devices: `.to(...)` of anything but a dtype of torch, `.cpu()`, `.cuda()`, and what does not wait."""
    for node, name in calls(path):
        given = {k.arg: k.value for k in node.keywords}
        to_dtype = name == "to" and all(ast.unparse(a).startswith("torch.") for a in (*node.args, *given.values()))
        if (name == "to" and not to_dtype) or name in ("cpu", "cuda", "pin_memory") or "non_blocking" in given:
            yield f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("x.to(torch.float32)", 0),
        ("x.to(device)", 1),
        ("x.to('cpu', non_blocking=True)", 1),
        ("x.to(device=d)", 1),
        ("x.to(other, torch.float32)", 1),
        ("x.cpu()", 1),
        ("torch._foreach_copy_(a, b, non_blocking=True)", 1),
    ],
)
def test_the_search_finds_what_it_is_for(tmp_path, monkeypatch, line, found):
    monkeypatch.setattr("tests.gradients.test_transfer.PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text(line)
    assert len(list(copies_between_devices(tmp_path / "a.py"))) == found


def test_no_other_place_copies_between_devices():
    assert [c for path in PACKAGE.rglob("*.py") if path != TRANSFER for c in copies_between_devices(path)] == []
    assert len(list(copies_between_devices(TRANSFER))) == 3


def test_every_tensor_that_is_made_names_its_dtype_and_device():
    """Neither is left to `torch.set_default_dtype` and `torch.set_default_device`, which belong to the user."""
    left_open = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"
        for path in PACKAGE.rglob("*.py")
        for node, name in calls(path)
        if name in FACTORIES
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and not {"dtype", "device"} <= {k.arg for k in node.keywords}
    ]
    assert left_open == []


class Elsewhere:
    """A tensor that says it is on an accelerator, and notes how it is copied."""

    def __init__(self, device="cuda:0"):
        self.device = torch.device(device)
        self.asked = []

    def to(self, device, *, non_blocking=False):
        self.asked.append((device.type, non_blocking))
        return torch.tensor(3.0) if device.type == "cpu" else Elsewhere(device)


def test_a_copy_to_the_host_is_waited_for_and_one_to_an_accelerator_is_not():
    there: Any = Elsewhere()
    moved(there, HOST)
    moved(there, torch.device("cuda", 1))
    same: Any = moved(there, torch.device("cuda", 0))
    assert same is there
    here: Any = Elsewhere("cpu")
    moved(here, torch.device("cuda", 0))
    assert there.asked == [("cpu", False), ("cuda", True)]
    assert here.asked == [("cuda", True)]


def test_a_number_for_the_host_is_fetched_from_where_it_is():
    there: Any = Elsewhere()
    assert to_value(there, SCALAR) == np.float32(3)
    assert there.asked == [("cpu", False)]


def test_a_number_for_an_accelerator_is_brought_there():
    """Another gradient may be the first one than in the first step, and be elsewhere: the run's numbers stay where they are."""
    here: Any = Elsewhere("cpu")
    value: Any = to_value(here, TensorOps(torch.device("cuda", 0)))
    assert value.device == torch.device("cuda", 0)
    assert here.asked == [("cuda", True)]
    assert to_value(value, TensorOps(torch.device("cuda", 0))) is value


def test_a_measured_norm_is_fetched_too():
    ring = HostRing(4)
    ring.append((np.float32(1),) * (len(COLUMNS) - 1))
    there: Any = Elsewhere()
    ring.set_applied(there)
    assert ring.drain().values[0][-1] == 3.0
    assert there.asked == [("cpu", False)]


def test_many_copies_at_once_wait_by_where_their_targets_are(monkeypatch):
    asked = []
    original = torch._foreach_copy_

    def noting(targets, sources, *, non_blocking):
        asked.append(non_blocking)
        original(targets, sources, non_blocking=non_blocking)

    monkeypatch.setattr(torch, "_foreach_copy_", noting)
    target = torch.zeros(3)
    copy_into([target], [torch.ones(3, dtype=torch.float64)])
    copy_into([torch.zeros(3, device="meta")], [torch.zeros(3, device="meta")])
    assert target.tolist() == [1, 1, 1]
    assert asked == [False, True]


def test_gradients_of_several_kinds_are_fetched_in_one_copy_for_each_kind(monkeypatch):
    from hf_adaclip.gradients import norms

    copies = []

    def noting(tensor, device):
        copies.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr(norms, "moved", noting)
    gradients = [torch.ones(n, dtype=t) for n in (1, 2, 3) for t in (torch.float32, torch.bfloat16, torch.float64)]
    found = norms.tensor_norms(gradients)
    assert found.tolist() == pytest.approx([n**0.5 for n in (1, 2, 3) for _ in range(3)])
    assert copies == [(3,)] * 3
