"""Progress: a bar on a terminal, a line a minute in a log."""

import io
import os
import pty
import subprocess
import sys

import pytest

from hf_adaclip.telemetry.progress import Progress

CODE = """
from hf_adaclip.telemetry.progress import Progress
with Progress(total=2000, desc="runs") as bar:
    for i in range(2000):
        bar.set_description(f"run {i}", refresh=True)
        bar.update()
        if i == 1000:
            Progress.write("FAILED one")
for _ in Progress(range(3), desc="three"):
    pass
"""


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_log_gets_a_line_a_minute():
    clock, stream = Clock(), io.StringIO()
    with Progress(total=600, desc="steps", file=stream, clock=clock) as bar:
        for _ in range(600):
            clock.now += 0.5
            bar.update()
            bar.refresh()
    text = stream.getvalue()

    assert "\r" not in text
    assert "\x1b" not in text
    assert 5 <= len(text.splitlines()) <= 8  # five minutes
    assert "600/600" in text.splitlines()[-1]


@pytest.mark.slow
def test_no_carriage_return_in_a_file_whatever_is_done_with_the_bar():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300, check=True)

    assert "\r" not in done.stderr + done.stdout
    assert "FAILED one" in done.stdout + done.stderr
    assert len((done.stderr + done.stdout).splitlines()) <= 8


def test_a_disabled_bar_writes_nothing():
    stream = io.StringIO()
    with Progress(total=3, file=stream, disable=True) as bar:
        bar.update(3)

    assert stream.getvalue() == ""


@pytest.mark.slow
def test_a_terminal_gets_a_bar():
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", CODE], stderr=follower, stdout=subprocess.DEVNULL)
    os.close(follower)
    text = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:
            break
        if not piece:
            break
        text += piece
    os.close(leader)

    assert process.wait(300) == 0
    assert b"\r" in text
