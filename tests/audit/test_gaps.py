"""A disk that fills up, a folder that cannot be written: training goes on, and the ledger says itself what it lost, and why."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch

from hf_adaclip import AdaptiveClipper, LedgerError
from hf_adaclip.audit import verify_ledger
from hf_adaclip.ledger.writer import Ledger
from tests.audit.test_anchors import reseal
from tests.audit.test_ledger import CONFIG, violations
from tests.loops import make, train, weights

SMALL = CONFIG.replace(ring_capacity=10)


def clip_with(clipper):
    return lambda m, loss: clipper.clip_(m.parameters(), loss=loss)


class Full:
    """A file that takes no more bytes."""

    def __init__(self, file, error):
        self._file, self._error = file, error

    def write(self, data):
        raise self._error

    def __getattr__(self, name):
        return getattr(self._file, name)


def run_with_gap(path, lost, steps=60, *, config=SMALL, clean=True, error=None):
    """A run whose ledger cannot be written in the steps of `lost`."""
    model, optimizer = make()
    clipper = AdaptiveClipper(config, optimizer=optimizer, ledger=path)
    error = error or OSError(28, "No space left on device")
    real = None
    for step in range(steps):
        ledger = None if clipper._run.recorder is None else clipper._run.recorder.ledger
        if ledger is not None and real is None and step in lost:
            real, ledger._file = ledger._file, Full(ledger._file, error)  # type: ignore[assignment]
        elif ledger is not None and real is not None and step not in lost:
            ledger._file, real = real, None
        train(model, optimizer, clip_with(clipper), 1, start=step)
    clipper.close(clean=clean)
    return clipper, model


@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("controller", ["adaptive", "percentile", "zscore", "static"])
def test_a_gap_says_what_was_lost_and_everything_else_is_recomputed(tmp_path, controller, granularity):
    config = SMALL.replace(controller=controller, granularity=granularity)
    run_with_gap(tmp_path / "l.jsonl", range(15, 32), config=config)
    report = verify_ledger(tmp_path / "l.jsonl")

    assert report.ok, report.findings
    assert (report.steps, report.recomputed, report.lost, report.last_step) == (40, 40, 20, 60)
    assert "verified but for 20 step(s) that could not be written" in report.summary()
    assert "ended cleanly" not in report.summary()
    assert any(
        "gap: 20 step(s) from step 10 could not be written (ENOSPC: No space left on device)" in str(f)
        for f in report.findings
    )
    lines = [json.loads(x) for x in (tmp_path / "l.jsonl").read_text().splitlines()]
    assert [x["lost"] for x in lines if x["kind"] == "footer"] == [20]


def test_training_does_not_notice(tmp_path):
    _, with_gap = run_with_gap(tmp_path / "a.jsonl", range(15, 32))
    _, without = run_with_gap(tmp_path / "b.jsonl", ())
    assert torch.equal(weights(with_gap), weights(without))


def test_a_first_block_that_could_not_be_written_comes_with_the_next(tmp_path, monkeypatch):
    path = tmp_path / "l.jsonl"
    model, optimizer = make()
    clipper = AdaptiveClipper(SMALL, optimizer=optimizer, ledger=path)
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_write", lambda self, lines: OSError(5, "Input/output error"))
        train(model, optimizer, clip_with(clipper), 15)
    train(model, optimizer, clip_with(clipper), 30, start=15)
    clipper.close()
    report = verify_ledger(path)
    assert report.ok, report.findings
    assert (report.steps, report.lost) == (35, 10)
    assert any("EIO: Input/output error" in str(f) for f in report.findings)


@pytest.mark.parametrize("clean", [True, False])
def test_a_disk_that_stays_full_leaves_whole_blocks_and_no_footer(tmp_path, clean):
    path = tmp_path / "l.jsonl"
    clipper, _ = run_with_gap(path, range(25, 1000), clean=clean)
    report = verify_ledger(path)
    assert clipper.step == 60
    assert report.num_violations == 0
    assert (report.steps, report.unsealed, report.closed) == (20, 0, False)


def test_a_checkpoint_of_a_lost_step_is_no_tampering(tmp_path):
    """The state is saved while the disk of the ledger is full, and the run goes on from it."""
    path = tmp_path / "l.jsonl"
    model, optimizer = make()
    clipper = AdaptiveClipper(SMALL, optimizer=optimizer, ledger=path)
    train(model, optimizer, clip_with(clipper), 12)
    ledger = clipper._run.recorder.ledger
    ledger._file, real = Full(ledger._file, OSError(28, "No space left on device")), ledger._file
    train(model, optimizer, clip_with(clipper), 8, start=12)
    (tmp_path / "checkpoint-20").mkdir()
    clipper.save_state(tmp_path / "checkpoint-20")
    real.close()
    model, optimizer = make()
    again = AdaptiveClipper(SMALL, optimizer=optimizer, ledger=path)
    again.load_state(tmp_path / "checkpoint-20")
    train(model, optimizer, clip_with(again), 20, start=20)
    again.close()
    report = verify_ledger(path)
    assert report.num_violations == 0, report.findings
    assert report.lost == 10
    assert any("the steps between were not written" in f.message for f in report.findings)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 19},
        {"first": 11},
        {"counts": {"WIDENED": 3}},
        {"errors": []},
        {"errors": ["<b>\n"]},
        {"state": {"level": 1.0}},
        {"counts": {"X": 20}},
        {"steps": -1},
    ],
)
def test_a_gap_that_is_made_up_is_a_violation(tmp_path, change):
    path = tmp_path / "l.jsonl"
    run_with_gap(path, range(15, 32))
    (tmp_path / "l.jsonl.seal").unlink()
    reseal(path, lambda line: [{**line, **change} if line["kind"] == "gap" else line])
    assert violations(path)


def test_a_gap_that_the_footer_does_not_know_is_a_violation(tmp_path):
    path = tmp_path / "l.jsonl"
    run_with_gap(path, range(15, 32))
    reseal(path, lambda line: [{k: v for k, v in line.items() if k != "lost"}])
    assert any("the footer says that 0 steps were lost, the gaps 20" in f.message for f in violations(path))


RUN = """
import sys, torch
from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper
from tests.loops import make, train, weights
model, optimizer = make()
clipper = AdaptiveClipper(AdaptiveClipConfig(ring_capacity=10, ledger_required=%r), optimizer=optimizer, ledger=sys.argv[1])
train(model, optimizer, lambda m, loss: clipper.clip_(m.parameters(), loss=loss), 60)
clipper.close()
print("steps", clipper.step, float(weights(model).sum()))
"""


def start(path, required=False, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", RUN % required, str(path)], capture_output=True, text=True, timeout=300, **kwargs
    )


@pytest.mark.slow
def test_a_limit_on_the_size_of_files(tmp_path):
    """A real write that fails in the kernel."""
    done = start(tmp_path / "l.jsonl", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)))
    assert "steps 60" in done.stdout, done.stderr
    report = verify_ledger(tmp_path / "l.jsonl")
    assert report.num_violations == 0, report.findings
    assert 0 < report.steps < 60
    assert "ended cleanly" not in report.summary()
    assert report.unsealed == 0, "what a failed write has left is taken back"
    required = start(
        tmp_path / "r.jsonl", True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    )
    assert "LedgerError" in required.stderr
    assert required.returncode == 1


def _unwritable(folder):
    """Paths at which no ledger can be made."""
    plain = folder / "plain"
    plain.write_text("x")
    (folder / "named").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "device").symlink_to("/dev/full")
    (folder / "loop").symlink_to(folder / "loop")
    return (
        plain / "l.jsonl",
        folder / "named",
        folder / "fifo",
        folder / "device",
        folder / ("x" * 300),
        folder / "/".join(["y" * 200] * 30),
        str(folder / "a\0b"),
        folder / "loop",
        "/proc/self/l.jsonl",
    )


@pytest.mark.parametrize("kind", range(9))
@pytest.mark.parametrize("required", [False, True])
def test_a_ledger_that_cannot_be_made_ends_a_run_only_if_it_is_required(tmp_path, kind, required, caplog):
    path = list(_unwritable(tmp_path))[kind]
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG.replace(ledger_required=required), optimizer=optimizer, ledger=path)
    if required:
        with pytest.raises(LedgerError, match="`ledger` must be a writable file"):
            train(model, optimizer, clip_with(clipper), 1)
        return
    train(model, optimizer, clip_with(clipper), 20)
    clipper.save_state(tmp_path)
    clipper.close()
    assert clipper.step == 20
    assert caplog.text.count("Training goes on without a ledger") == 1


def test_locks_and_syncs_that_a_file_system_does_not_have(tmp_path, monkeypatch):
    def fails(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", fails)
    monkeypatch.setattr("os.fsync", fails)
    path = tmp_path / "l.jsonl"
    model, optimizer = make()
    clipper = AdaptiveClipper(CONFIG.replace(ledger_required=True), optimizer=optimizer, ledger=path)
    train(model, optimizer, clip_with(clipper), 20)
    clipper.save_state(tmp_path)
    clipper.close()
    assert verify_ledger(path).ok


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="needs a file system of its own")
def test_a_file_system_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mount is not allowed here")
    try:
        path = disk / "l.jsonl"
        model, optimizer = make()
        clipper = AdaptiveClipper(SMALL, optimizer=optimizer, ledger=path)
        train(model, optimizer, clip_with(clipper), 30)
        with contextlib.suppress(OSError), open(disk / "other", "wb", buffering=0) as other:
            while True:
                other.write(b"x" * 512)
        train(model, optimizer, clip_with(clipper), 100, start=30)
        (disk / "other").unlink()
        train(model, optimizer, clip_with(clipper), 30, start=130)
        clipper.close()
        report = verify_ledger(path)
        assert report.ok, report.findings
        assert report.lost > 0
        assert report.steps + report.lost == 160
        assert any("ENOSPC" in f.message for f in report.findings)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
