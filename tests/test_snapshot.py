"""What a snapshot keeps and puts back: weights and optimizers in place, random numbers, settings of schedules left alone."""

import copy
import random

import numpy as np
import pytest
import torch

from hf_adaclip.incidents.snapshot import check_optimizer, keep_optimizer, keep_random, keep_weights

TORCH = {
    "SGD": {"momentum": 0.9},
    "Adam": {"amsgrad": True},
    "AdamW": {"fused": True},
    "Adafactor": {},
    "Adagrad": {},
    "Adadelta": {},
    "Adamax": {},
    "ASGD": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "Muon": {},
}
THIRD = [
    ("schedulefree", "AdamWScheduleFree"),
    ("pytorch_optimizer", "Lion"),
    ("pytorch_optimizer", "Prodigy"),
    ("pytorch_optimizer", "SOAP"),
    ("pytorch_optimizer", "AdEMAMix"),
    ("bitsandbytes.optim", "AdamW8bit"),
]


def model_of(bias=True):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 6, bias=bias), torch.nn.Tanh(), torch.nn.Linear(6, 4, bias=bias))


def steps(model, optimizer, numbers):
    for number in numbers:
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def flat(value):
    if isinstance(value, dict):
        return [x for key in value for x in flat(value[key])]
    if isinstance(value, list | tuple):
        return [x for inner in value for x in flat(inner)]
    return [value.clone() if isinstance(value, torch.Tensor) else value]


def alike(a, b):
    pairs = list(zip(flat(a), flat(b), strict=True))
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def goes_back(optimizer_of, before):
    """After the snapshot the same steps give the same again, from the same tensors."""
    model = model_of(bias=False)
    optimizer = optimizer_of(model)
    check_optimizer(optimizer)
    if hasattr(optimizer, "train"):
        optimizer.train()
    steps(model, optimizer, range(before))
    backs = [keep_weights(list(model.parameters()))[0], keep_optimizer(optimizer)[0]]
    kept = copy.deepcopy((optimizer.state_dict()["state"], [p.detach() for p in model.parameters()]))
    places = {id(p): p.data_ptr() for p in model.parameters()}
    for _ in range(2):
        steps(model, optimizer, range(before, before + 5))
        ahead = copy.deepcopy([p.detach() for p in model.parameters()])
        for group in optimizer.param_groups:
            group["lr"] *= 0.5  # a schedule
        for put_back in backs:
            put_back()
        assert alike(kept, (optimizer.state_dict()["state"], [p.detach() for p in model.parameters()]))
        assert {id(p): p.data_ptr() for p in model.parameters()} == places
        for group in optimizer.param_groups:
            group["lr"] *= 2
        steps(model, optimizer, range(before, before + 5))
        assert alike(ahead, [p.detach() for p in model.parameters()])
        for put_back in backs:
            put_back()


@pytest.mark.parametrize("before", [0, 4])
@pytest.mark.parametrize("name", TORCH)
def test_optimizers_of_torch_go_back(name, before):
    goes_back(lambda model: getattr(torch.optim, name)(model.parameters(), lr=1e-2, **TORCH[name]), before)


@pytest.mark.parametrize("before", [0, 4])
@pytest.mark.parametrize(("package", "name"), THIRD)
def test_optimizers_of_others_go_back(package, name, before):
    module = pytest.importorskip(package)
    goes_back(lambda model: getattr(module, name)(model.parameters(), lr=1e-2), before)


def test_a_rate_that_a_schedule_has_set_stays():
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1)
    put_back, size = keep_optimizer(optimizer)
    assert size == 0
    optimizer.param_groups[0].update(lr=0.5, betas=(0.8, 0.9), weight_decay=0.2, eps=1.0, swapped=True)
    put_back()
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.5, (0.8, 0.9), 0.2, 1e-8)
    assert "swapped" not in group


def test_random_numbers_go_back():
    put_back = keep_random([torch.device("cpu")])
    first = (random.random(), np.random.rand(), torch.rand(3).tolist())
    for _ in range(2):
        put_back()
        assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == first


def test_the_size_that_is_told_is_that_of_what_is_held():
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters())
    steps(model, optimizer, range(2))
    numbers = sum(p.numel() for p in model.parameters())
    assert keep_weights(list(model.parameters()))[1] == 4 * numbers
    assert keep_optimizer(optimizer)[1] == 8 * numbers + 4 * len(list(model.parameters()))
