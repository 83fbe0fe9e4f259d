"""The benchmark of a step: what it measures is what it says."""

import torch

from scripts.bench import step as bench_step


def test_every_way_is_measured_and_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(bench_step.SHAPES, "tiny", [(8, 8), (8,)])
    result = bench_step.bench("tiny", torch.float32, "fused AdamW", "cpu", rounds=4)
    bench_step.draw([result], tmp_path / "x.png")

    assert (result["parameters"], result["tensors"]) == (72, 2)
    assert {bench_step.STEP, bench_step.REFERENCE, "ours, adaptive", "zclip", "autoclip"} <= set(result["rows"])
    assert result["rows"]["ours, adaptive"]["bytes_per_parameter"] == 4
    assert result["rows"][bench_step.REFERENCE]["bytes_per_parameter"] == 12
    assert result["rows"][bench_step.REFERENCE]["marginal"] == 1.0
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_on_a_device_the_folded_way_folds_and_the_unfolded_does_not(on_device, monkeypatch):
    monkeypatch.setitem(bench_step.SHAPES, "tiny", [(8, 8), (8,)])
    for name, folds in (("ours, folded", True), ("ours, unfolded", False)):
        model = bench_step.Holder(bench_step.SHAPES["tiny"], torch.float32, "cpu")
        optimizer = bench_step.OPTIMIZERS["fused AdamW"](model.parameters())
        compared = bench_step.ways(model, optimizer, on_device=True)
        for _ in range(3):
            compared[name][0]()
        assert hasattr(optimizer, "grad_scale") == folds
        assert (compared[name][1] == 2.0) == folds
