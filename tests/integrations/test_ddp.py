"""Data parallel over two gloo processes: all ranks decide alike, one of them writes the ledger."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_adaclip.audit import verify_ledger

ROOT = Path(__file__).parent.parent.parent


def launch(kind, folder, processes=2):
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "tests.integrations.ddp_worker", kind, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(processes)]


@pytest.mark.parametrize("kind", ["trainer", "loop"])
def test_all_ranks_decide_alike_and_the_ledger_is_written_once(tmp_path, kind):
    first, second = launch(kind, tmp_path / "two")

    assert first["state"] == second["state"]
    assert first["counts"] == second["counts"]
    assert first["weights"] == second["weights"]
    assert (first["has_ledger"], second["has_ledger"]) == (True, False)
    report = verify_ledger(tmp_path / "two/clip_ledger.jsonl")
    assert report.ok, report.findings
    assert report.segments == 1


def test_faults_of_one_rank_are_handled_by_both(tmp_path):
    first, second = launch("loop", tmp_path / "two")

    assert first["counts"]["NONFINITE"] == second["counts"]["NONFINITE"] == 1
    assert first["counts"]["SPIKE"] >= 1
    assert first["norm"] == second["norm"] < 100


def test_a_divergence_that_one_rank_sees_is_decided_on_by_both(tmp_path):
    first, second = launch("diverging", tmp_path / "two")

    assert first["counts"]["FALLBACK"] > 5
    assert first["counts"] == second["counts"]
    assert first["state"] == second["state"]
    assert first["weights"] == second["weights"]


def test_two_processes_are_one_process_on_the_same_global_batch(tmp_path):
    two = launch("trainer", tmp_path / "two")[0]
    steps = [json.loads(line) for line in (tmp_path / "two/clip_ledger.jsonl").read_text().splitlines()]
    header, records = steps[0], [s for s in steps if s["kind"] == "step"]

    assert header["world_size"] == 2
    assert len(records) == 30
    assert sum(two["counts"].values()) == 30
