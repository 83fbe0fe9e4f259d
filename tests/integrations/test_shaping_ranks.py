"""The spectral range and the agreement over gloo processes: the same step on every rank, and the step of one process."""

import json

import pytest

from hf_adaclip.audit import verify_ledger
from tests.integrations.launching import launch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("layout", "optimizer", "ranks"),
    [("ddp", "adamw", 2), ("ddp", "sgd", 2), ("fsdp", "adamw", 2), ("fsdp", "sgd", 2), ("tp", "plain", 2)],
)
def test_ranks_make_the_step_of_one_process(tmp_path, layout, optimizer, ranks):
    results = launch("tests.integrations.shaping_worker", [layout, optimizer], tmp_path, processes=ranks)
    assert results[0]["refused"] is None
    assert results[0]["weights"] == results[1]["weights"]  # bit for bit
    assert results[0]["way"] > 0.02
    assert results[0]["distance"] < 2e-4  # a component that is nearly 0 may change its sign, and then one step counts
    report = verify_ledger(tmp_path / "clip_ledger.jsonl")
    assert report.ok, report.findings
    records = [json.loads(line) for line in (tmp_path / "clip_ledger.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["kind"] == "step"]
    assert [r["step"] for r in steps if "altered_energy" not in r] == [20]  # not finite
    assert all(0.2 < r["agreeing_share"] <= 1 for r in steps if "altered_energy" in r)


def test_gradients_that_are_split_twice_are_refused_or_right(tmp_path):
    for result in launch("tests.integrations.shaping_worker", ["fsdp+tp", "adamw"], tmp_path, processes=4):
        if result["refused"] is None:
            assert result["distance"] < 2e-4
        else:
            assert "`spectral_width`" in result["refused"]


def test_ranks_find_in_the_same_step_that_loaded_weights_are_trained_anew(tmp_path):
    results = launch("tests.integrations.shaping_worker", ["loaded", "quick"], tmp_path, processes=2)
    assert results[0]["weights"] == results[1]["weights"]  # bit for bit
    records = [json.loads(line) for line in (tmp_path / "clip_ledger.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["kind"] == "step"]
    assert [r["step"] for r in steps if "agreeing_share" in r] == [s for s in range(16, 30) if s != 20]
    assert steps[16]["moved"] > 0.04
    assert verify_ledger(tmp_path / "clip_ledger.jsonl").ok
