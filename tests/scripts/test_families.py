"""The page on other kinds of models is that of its runs, and their harness trains what it says."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value

from scripts.docs.readme_section import read_section
from scripts.study import families, small_models


def test_the_page_is_that_of_the_runs():
    runs = families.recorded(families.FOLDER / "runs.jsonl")
    costs = families.recorded(families.FOLDER / "costs.jsonl")
    page = read_section("families", families.FOLDER / "README.md")
    assert page == families.table(runs, costs)
    assert {line["kind"] for line in costs} == families.KINDS.keys()
    assert len(page.splitlines()) == 2 + len(families.KINDS) + 3


def test_what_comes_next_is_the_best_rate_of_the_stock_arm(tmp_path):
    path = tmp_path / "runs.jsonl"
    ends = dict(zip(families.RATES, (3.0, 2.0, 1.0, float("nan")), strict=True))
    lines = [
        {"kind": "mlp", "rate": rate, "seed": families.FIRST, "arm": arm, "losses": [end if arm == "stock" else 0.5]}
        for rate, end in ends.items()
        for arm in families.ARMS
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert families.best_rate(families.recorded(path), "mlp") == 4e-3
    others = list(families.planned("mlp", path))[len(lines) :]
    assert others == [(4e-3, seed, arm) for seed in families.SEEDS for arm in families.ARMS]


@pytest.mark.parametrize("kind", families.KINDS)
def test_every_kind_learns_under_both_arms(kind, monkeypatch):
    monkeypatch.setattr(families, "STEPS", 10)
    monkeypatch.setattr(families, "EVALUATIONS", 2)
    monkeypatch.setattr(small_models, "_characters", lambda _: torch.arange(40_000) % 97)
    monkeypatch.setattr(small_models, "_images", _images)
    stock, ours = (families.run(kind, 1e-3, 0, arm, None)["losses"] for arm in families.ARMS)
    assert stock[-1] < stock[0]
    assert ours[0] == stock[0] or ours[-1] < ours[0]
    assert stock != ours


def test_the_cost_of_a_step_is_measured_in_turn(monkeypatch):
    monkeypatch.setattr(families, "BLOCK", 2)
    monkeypatch.setattr(families, "BLOCKS", 3)
    monkeypatch.setattr(small_models, "_images", _images)
    stepped, step = [], families.Training.step

    def counted(training):
        step(training)
        stepped.append(training)
        return float(len(stepped))

    monkeypatch.setattr(families.Training, "step", counted)
    line = families.cost("mlp", 1e-3, None)
    stock, ours = stepped[0], stepped[2]
    assert stepped == [stock, stock, ours, ours] * 4
    assert stock._clipper is None
    assert ours._clipper is not None
    # The seconds of steps 5 and 6, which are 5 and 6, and so on; the first blocks do not count.
    assert line["ratios"] == [round((4 * k + 3 + 4 * k + 4) / (4 * k + 1 + 4 * k + 2), 3) for k in (1, 2, 3)]


def _images(_data, folder, _hub, count):
    generator = torch.Generator().manual_seed(0)
    shape = (1, 28, 28) if folder == "fashion_mnist" else (3, 32, 32)
    labels = torch.arange(100) % 10
    some = torch.randn(100, *shape, generator=generator) + labels[:, None, None, None]
    again = torch.arange(count - 900) % 100  # fewer that are held out
    return some[again], labels[again]


def test_parquet_files_are_read_as_the_hub_s(tmp_path):
    (tmp_path / "cifar10").mkdir()
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    features = Features({"img": Image(), "label": Value("int64")})
    Dataset.from_dict({"img": list(pixels), "label": [3, 7]}, features=features).to_parquet(
        tmp_path / "cifar10" / "train.parquet"
    )
    x, y = small_models._images(tmp_path, "cifar10", "-", 2)
    assert y.tolist() == [3, 7]
    torch.testing.assert_close(x, torch.tensor((pixels.transpose(0, 3, 1, 2) / 255 - 0.5) / 0.25, dtype=torch.float32))
