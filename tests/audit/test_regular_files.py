"""No reader waits for ever: what is no file is refused at once."""

import os
import shutil
import signal

import pytest
import torch

from hf_adaclip import AdaptiveClipper, StateError
from hf_adaclip.audit import verify_ledger
from hf_adaclip.cli import main
from tests.audit.test_ledger import write_run


@pytest.fixture(autouse=True)
def in_a_minute():
    """A reader that waits for ever is interrupted, and its test fails."""

    def too_long(number, frame):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def call(*arguments):
    return main([str(a) for a in arguments])


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "missing", "unreadable"])
@pytest.mark.parametrize("command", ["verify", "replay", "advise", "report", "diff"])
def test_commands_answer_at_once(tmp_path, kind, command, capsys):
    path = tmp_path / "clip_ledger.jsonl"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "unreadable":
        path.write_text("x")
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user reads everything")
    assert (call(command, path, path) if command == "diff" else call(command, path)) == 2
    assert capsys.readouterr().err.startswith("hf-adaclip: ")


def test_a_card_of_a_fifo(tmp_path, capsys):
    os.mkfifo(tmp_path / "comparison.json")
    assert call("card", tmp_path) == 2
    assert "it is a FIFO, not a file" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["verify", "report"])
def test_a_fifo_beside_a_ledger_holds_up_nobody(tmp_path, command):
    write_run(tmp_path / "clip_ledger.jsonl", steps=12, faults={})
    (tmp_path / "clip_ledger.jsonl.seal").unlink()
    (tmp_path / "checkpoint-3").mkdir()
    for name in (
        "clip_ledger.jsonl.seal",
        "README.md",
        "convergence.jsonl",
        "trainer_state.json",
        "checkpoint-3/clip_state.safetensors",
    ):
        os.mkfifo(tmp_path / name)
    assert call(command, tmp_path, *(["--format", "json"] if command == "report" else [])) == 0
    assert verify_ledger(tmp_path / "clip_ledger.jsonl").ok


@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling"])
def test_a_state_that_is_no_file_is_refused(tmp_path, kind):
    path = tmp_path / "clip_state.safetensors"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nothing")
    with pytest.raises(StateError, match="must be a file"):
        AdaptiveClipper("adaptive").load_state(tmp_path)


def test_a_ledger_of_one_endless_line(tmp_path):
    write_run(tmp_path / "l.jsonl", steps=12, faults={})
    shutil.copy(tmp_path / "l.jsonl", tmp_path / "long.jsonl")
    with open(tmp_path / "long.jsonl", "ab") as file:
        file.write(b'{"kind":"step"')
        file.truncate(file.tell() + (1 << 33))  # 8 GiB without a block on the disk
    report = verify_ledger(tmp_path / "long.jsonl")
    assert any("is longer than" in f.message for f in report.findings)
    clipper = AdaptiveClipper("adaptive", ledger=tmp_path / "long.jsonl")
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    clipper.clip_([parameter])
    clipper.close()
    assert (tmp_path / "long.jsonl").stat().st_size > 1 << 33
