"""DeepSpeed ZeRO over two gloo processes: the engine clips by the threshold that was known before the step."""

import pytest

from hf_adaclip.audit import verify_ledger
from tests.integrations.launching import launch

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow
MODULE = "tests.integrations.deepspeed_worker"
VARIABLES = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "false"}
RATE = 0.05  # of SGD: what a step moves the weights by is the rate times the norm that was applied


@pytest.mark.parametrize(("kind", "stage"), [("fp32", 2), ("bf16", 1), ("bf16", 3)])
def test_a_step_is_bounded_by_what_was_known_before_it(tmp_path, kind, stage):
    first, second = launch(MODULE, [kind, str(stage), "adaptive"], tmp_path, warm=False, **VARIABLES)

    assert first["norms"][0] == pytest.approx(first["expected first norm"], rel=1e-3)
    # The weights themselves are bfloat16 there, so a step of theirs is rounded.
    for told, norm, moved in list(zip(first["told"], first["norms"], first["moved"], strict=True))[:40]:
        if norm < float("inf"):
            assert moved == pytest.approx(RATE * min(norm, told), rel=1e-3, abs=5e-3 if kind == "bf16" else 1e-6)
    assert first["told"][:10] == [0.5] * 10  # of the warm-up: what the DeepSpeed config says
    assert first["norms"][30] > 50 * first["told"][30]
    assert first["told"][30] < 3 * max(first["norms"][21:30])
    assert first["moved"][20] == 0  # rank 1 alone had a NaN
    assert first["finite"]
    # Every rank keeps what it was fed. Of single tensors the engine tells nothing.
    incidents = [[20, "nonfinite", "step-00020"], [30, "spike", "step-00030"]]
    assert first["incidents"][:2] == [[*one, True, None] for one in incidents]
    assert first["incidents"] == second["incidents"]
    assert first["counts"]["NONFINITE"] == 1
    assert first["counts"]["SPIKE"] == 1
    assert first["same after resuming"]  # though the checkpoint had put an old threshold back
    assert (first["state"], first["counts"], first["told"]) == (second["state"], second["counts"], second["told"])
    report = verify_ledger(tmp_path / "clip_ledger.jsonl")
    assert report.ok, report.findings
    assert (report.segments, report.recomputed) == (2, 55)


def test_static_is_what_the_engine_does_without_us(tmp_path):
    first, _ = launch(MODULE, ["fp32", "3", "static"], tmp_path, warm=False, **VARIABLES)

    assert set(first["told"]) == {0.5}
    assert first["moved"][0] == pytest.approx(0.5, rel=1e-4)  # rate 1


@pytest.mark.parametrize("stage", [2, 3])
def test_the_trainer(tmp_path, stage):
    first, second = launch(MODULE, ["trainer", str(stage)], tmp_path, warm=False, **VARIABLES)

    assert first["counts"]["WARMUP"] == 10
    assert first["counts"] == second["counts"]
    assert first["state file"]
    assert 1 < first["told"] < 3  # neither the 0.7 of `max_grad_norm` nor nothing
    assert "one step late" in first["explain"]
    assert verify_ledger(tmp_path / "clip_ledger.jsonl").ok
