"""Where the spectral range acts, the distance estimate goes by the gradients that the optimizer reads."""

import copy
import json
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from hf_adaclip import AdaptiveClipper
from hf_adaclip.gradients.coordinates import EVERY, grid_of, sample_of
from tests.lanes import LANES, on_lane

LR = 1e-3


class Step(NamedTuple):
    """Over all parameters, float64."""

    weights: torch.Tensor
    raw: torch.Tensor
    read: torch.Tensor


def flat(tensors: Any) -> torch.Tensor:
    return torch.cat([t.detach().flatten().double() for t in tensors])


def train(folder, *, lane="host", steps=40, resumed=None, broken=None, spike=None, fused=False, **settings):
    """A small regression, whose gradients one direction rules; what was seen in each step, and the ledger's records."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
    x = torch.randn(48, 24) * torch.tensor([9.0] + [0.3] * 23)
    y = torch.randn(48, 4)
    given = {"controller": "adaptive", "spectral_width": 0.0, "agreement": False, "pace_start": 1, **settings}
    seen, path = [], folder / "clip_ledger.jsonl"

    def begin(ledger):
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=fused)
        with on_lane(lane):
            clipper = AdaptiveClipper(given, optimizer=optimizer, model=model, ledger=ledger)
        return optimizer, clipper

    optimizer, clipper = begin(path)
    for step in range(steps):
        if step == resumed:
            clipper.save_state(folder)
            kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            clipper.close()
            optimizer, clipper = begin(folder / "after.jsonl")
            model.load_state_dict(kept[0])
            optimizer.load_state_dict(kept[1])
            clipper.load_state(folder)
        some = (torch.arange(8) + step * 8) % 48
        loss = (model(x[some]) - y[some]).square().mean()
        (loss * {broken: float("nan"), spike: 300.0}.get(step, 1.0)).backward()
        weights, raw = flat(model.parameters()), flat(p.grad for p in model.parameters())
        clipper.clip_(model.parameters(), loss=loss)
        seen.append(Step(weights, raw, flat(p.grad for p in model.parameters())))
        optimizer.step()
        optimizer.zero_grad()
    clipper.close()
    files = [path] if resumed is None else [path, folder / "after.jsonl"]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return model, seen, [row for row in rows if row["kind"] == "step"]


def reference(model, seen, paces, which):
    """The reach that each step goes by: the formulas of `hf_adaclip.gradients.distance`, one after another, in float64."""
    begin, numbered = 0, []
    for p in model.parameters():
        index = torch.arange(begin, begin + p.numel()).reshape(p.shape)
        numbered.append(sample_of(index, grid_of(index.numel(), EVERY)).reshape(-1))
        begin += p.numel()
    picks = torch.cat(numbered)
    r, s, answers, d = 0.0, torch.zeros(len(picks), dtype=torch.float64), [0.0], 0.0
    for number, step in enumerate(seen):
        gradient = which(step)
        weight = 0.0 if number == 0 else paces[number - 1] ** 2 / float(gradient.norm())
        r = 0.98 * r + weight * float(gradient[picks] @ (seen[0].weights - step.weights)[picks])
        s = 0.98 * s + weight * gradient[picks]
        d = r / (float(s.abs().sum()) + 1e-30) / LR
        answers.append(d)
    return answers


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("lane", LANES)
def test_equals_the_formulas_one_step_late(tmp_path, lane, fused):
    model, seen, records = train(tmp_path, lane=lane, fused=fused)
    found, paces = [row["reach"] for row in records], [row["pace"] for row in records]
    read = reference(model, seen, paces, lambda step: step.read)
    assert found[1:] == pytest.approx(read[1:-1], rel=2e-3, abs=1e-5)
    assert max(found) > 3
    # The raw gradients, one direction of which rules, say something else.
    raw = reference(model, seen, paces, lambda step: step.raw)
    assert max(abs(a - b) for a, b in zip(read, raw, strict=True)) > 0.1 * max(found)


@pytest.mark.parametrize(
    "off", [{"spectral_width": None}, {"shadow": True, "max_pace": 64.0}, {"spectral_width": float("inf")}]
)
def test_where_the_range_changes_nothing_the_step_itself_counts(tmp_path, off):
    model, seen, records = train(tmp_path, **off)
    paces = [1.0 if off.get("shadow") else row["pace"] for row in records]
    raw = reference(model, seen, paces, lambda step: step.raw)
    assert [row["reach"] for row in records] == pytest.approx(raw[1:], rel=2e-3, abs=1e-5)


def test_a_run_that_goes_on_is_the_one_that_was_never_stopped(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    one, _, whole = train(tmp_path / "whole")
    other, _, parts = train(tmp_path / "parts", resumed=17)
    assert [(row["reach"], row["pace"]) for row in parts] == [(row["reach"], row["pace"]) for row in whole]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("lane", LANES)
def test_a_step_that_is_not_finite_teaches_nothing(tmp_path, lane):
    _, _, records = train(tmp_path, lane=lane, steps=16, broken=12)
    reach = [row["reach"] for row in records]
    assert reach[13] == reach[12] != reach[11]
    assert reach[14] != reach[13]


@pytest.mark.parametrize("fold", ["auto", "never"])
@pytest.mark.parametrize("lane", LANES)
def test_a_spike_that_is_left_out_teaches_nothing_either(tmp_path, lane, fold):
    """A step that scales while it steps reads gradients that are as they were; of one that is left out it reads none."""
    given = {"on_spike": "skip", "warmup_observations": 5, "fold": fold}
    _, _, records = train(tmp_path, lane=lane, fused=True, steps=16, spike=12, **given)
    reach = [row["reach"] for row in records]
    assert records[12]["reason"] == "SKIPPED"
    assert reach[13] == reach[12] != reach[11]
    assert reach[14] != reach[13]


@pytest.mark.parametrize("granularity", ["tensor", "module"])
def test_every_gradient_counts_with_length_1_where_parts_are_judged_apart(tmp_path, granularity):
    given = {"granularity": granularity, "max_pace": 64.0, "warmup_observations": 5, "near_width": 0.5}
    model, seen, records = train(tmp_path, spike=30, steps=48, **given)
    assert min(float(step.read.norm() / step.raw.norm()) for step in seen) < 0.1
    read = reference(model, seen, [row["pace"] for row in records], lambda step: step.read)
    assert [row["reach"] for row in records][1:] == pytest.approx(read[1:-1], rel=2e-3, abs=1e-5)


def test_without_a_hidden_matrix_nothing_is_late(tmp_path):
    """An embedding alone: the range has nothing to act on."""
    reach = []
    for width in ("auto", None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(32, 8), nn.LayerNorm(8))
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        path = tmp_path / f"{width}.jsonl"
        given = {"controller": "adaptive", "spectral_width": width, "agreement": False, "pace_start": 1}
        clipper = AdaptiveClipper(given, optimizer=optimizer, model=model, ledger=path)
        for step in range(12):
            loss = (model(torch.arange(8) + step) - 1).square().mean()
            loss.backward()
            clipper.clip_(model.parameters(), loss=loss)
            optimizer.step()
            optimizer.zero_grad()
        clipper.close()
        reach.append([row["reach"] for row in map(json.loads, path.open()) if row["kind"] == "step"])
    assert reach[0] == reach[1]
    assert reach[0][1] > 0


def test_a_state_without_a_learning_rate_so_far_is_one_to_load(tmp_path):
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def clipper():
        return AdaptiveClipper("adaptive", optimizer=optimizer, model=model)

    one = clipper()
    for _ in range(3):
        model(torch.ones(4, 8)).sum().backward()
        one.clip_(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    one.save_state(tmp_path)
    one.close()
    other = clipper()
    other.load_state(tmp_path)
    optimizer.param_groups[0]["lr"] = LR
    model(torch.ones(4, 8)).sum().backward()
    other.clip_(model.parameters())
    optimizer.step()
