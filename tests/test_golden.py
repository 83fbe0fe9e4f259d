"""Fixed runs leave behind what they left when they were recorded, byte for byte. On purpose otherwise: `python -m tests.golden.record`."""

import json

import pytest

from hf_adaclip import CONTROLLERS
from hf_adaclip.controllers import Reason
from tests.golden.runs import FOLDER, RUNS, golden_file, play


@pytest.mark.parametrize("name", RUNS)
def test_a_run_leaves_behind_what_was_recorded(name, lane, tmp_path):
    found, path = play(name, lane, tmp_path), golden_file(name, lane)
    recorded = path.read_bytes().decode()
    for number, (now, before) in enumerate(zip(found.splitlines(), recorded.splitlines(), strict=False), start=1):
        assert now == before, f"{path.name}, line {number}"
    assert found == recorded, path.name


def test_every_controller_is_recorded_and_every_file_is_of_a_run():
    assert {run.settings.get("controller", "adaptive") for run in RUNS.values()} == set(CONTROLLERS)
    assert {path.name.split(".")[0] for path in FOLDER.glob("*.json")} == set(RUNS)


def test_most_of_what_can_be_decided_occurs():
    """A golden file pins only what happens in it."""
    seen: set[str] = set()
    for path in FOLDER.glob("*.json"):
        recorded = json.loads(path.read_text())
        place = recorded["step_fields"].index("reason")
        seen.update(row[place] for row in recorded["ledger"] if isinstance(row, list))
    assert {reason.name for reason in Reason} - seen <= {"SCALER_SKIPPED", "TROUBLE_STATISTICS", "LEFT_OUT"}
