"""FSDP2 and tensor parallelism over gloo processes: a sharded run decides and steps like the same run unsharded."""

import pytest

from hf_adaclip.audit import verify_ledger
from tests.integrations.launching import launch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("layout", "ranks", "optimizer", "granularity", "lane"),
    [
        ("fsdp", 2, "sgd", "global", "host"),
        ("fsdp", 2, "adamw", "tensor", "device"),  # fused AdamW leaves a step out on the device, of DTensors too
        ("fsdp", 2, "sgd", "rules", "device"),
        ("tp", 2, "sgd", "global", "device"),
        ("hsdp", 4, "sgd", "tensor", "host"),
        ("fsdp+tp", 4, "adamw", "global", "device"),  # gradients on two meshes
    ],
)
def test_a_sharded_run_is_the_unsharded_run(tmp_path, layout, ranks, optimizer, granularity, lane):
    results = launch(
        "tests.integrations.sharded_worker", [layout, optimizer, granularity, lane], tmp_path, processes=ranks
    )
    first = results[0]

    assert first["worst"]["norm"] < 1e-6
    assert first["worst"]["norms"] < 5e-4  # of the smallest tensors
    assert first["worst"]["weights"] < 1e-6
    assert first["finite"]
    assert first["counts"]["NONFINITE"] == first["plain counts"]["NONFINITE"] == 1
    assert first["counts"]["SPIKE"] >= 1
    plain, sharded = first["paces"]
    assert max(plain) > 2, "the pace has left 1"
    assert sharded == pytest.approx(plain, rel=1e-3)
    for other in results[1:]:
        assert other["paces"][1] == sharded
        assert str(other["state"]) == str(first["state"])  # bit for bit, NaN included
        assert other["counts"] == first["counts"]


def test_the_whole_step_is_one_collective_of_a_few_numbers(tmp_path):
    for result in launch(
        "tests.integrations.sharded_worker", ["fsdp", "sgd", "global", "host"], tmp_path, processes=2
    ):
        assert result["reduced"] == [6]  # one number per tensor
        assert result["other collectives"] == 0
        assert result["partial"] == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("kind", ["loop", "trainer"])
def test_fsdp2_as_accelerate_and_the_trainer_prepare_it(tmp_path, kind):
    first, second = launch("tests.integrations.fsdp_worker", [kind], tmp_path)

    assert first["sharded"]
    assert first["finite"]
    assert first["counts"] == second["counts"]
    assert first["counts"]["WARMUP"] == 10
    assert "FSDP2" in first["setup"]
    if kind == "loop":
        # Every rank keeps what it was fed, and all say the same of the modules: of whole tensors, not of shards.
        again = [[30, "spike", "step-00030-2"]] if first["resumed"] is not None else []
        incidents = [[12, "nonfinite", "step-00012"], [30, "spike", "step-00030"], *again]
        assert [one[:4] for one in first["incidents"]] == [[*one, True] for one in incidents]
        assert first["incidents"] == second["incidents"]
        shares = [module["share"] for module in first["incidents"][1][4]]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
    ledger = next(tmp_path.rglob("clip_ledger.jsonl"))
    report = verify_ledger(ledger)
    assert report.ok, report.findings
    if first["resumed"] is None:
        pytest.skip("accelerate 1.10 cannot load the FSDP2 optimizer that it has saved")
    assert first["resumed"]  # bit for bit: weights and, in the loop, the controller's state
    assert report.segments == 2
