"""A run that is killed at random moments and resumed ends as one that was left alone. scripts/kill_and_resume.py does it 20 times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import kill_and_resume
from scripts.kill_and_resume import last_complete_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent


def test_killed_twice_and_resumed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", kill_and_resume.__name__, "--kills", "2", "--output", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout[: done.stdout.rindex("}") + 1])
    assert result["kills"] == 2
    assert result["same weights"]
    assert result["same controller state"]
    assert result["ledger verifies"]
    assert result["segments"] == 3


def test_a_checkpoint_that_was_torn_apart_is_passed_over(tmp_path):
    for number, text in ((4, '{"global_step": 4}'), (8, '{"global_st'), (12, None)):
        (tmp_path / f"checkpoint-{number}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{number}/trainer_state.json").write_text(text)
    newest = last_complete_checkpoint(tmp_path)

    assert newest is not None
    assert newest.name == "checkpoint-4"
