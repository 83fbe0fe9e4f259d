"""The scenario of garbled documents: what is committed of it is what the script still gives."""

import json
from pathlib import Path

import pytest

from hf_adaclip.audit.verify import verify_ledger
from scripts import incident_demo

COMMITTED = Path(__file__).parents[2] / "model_cards" / "incidents" / "incident_demo.json"


def claims(result):
    """What is said of it, as far as it does not hang on the last bits of a machine."""
    losses = {name: arm["eval_loss"] for name, arm in result["arms"].items()}
    assert losses["stock"] > 2 * losses["clean"]
    assert losses["ours"] < 1.15 * losses["clean"]
    assert result["ours_over_clean"] == pytest.approx(losses["ours"] / losses["clean"], abs=1e-3)
    garbled = set(result["garbled"]["samples"])
    assert [d["document"] for d in result["named"]] == [0, 1, 2]
    for document in result["named"]:
        assert set(document["samples"]) <= garbled
        assert len(document["text"]) == incident_demo.BLOCK
    first, last = result["garbled"]["steps"]
    assert first - 20 <= result["left_out"][0] <= first
    assert last - 4 <= result["left_out"][-1] <= last + 8
    assert 1 <= len(result["rewinds"]) <= 3
    for arm in result["arms"].values():
        assert len(arm["losses"]) == incident_demo.STEPS
    # All are alike up to the first garbled document.
    before = [arm["losses"][: first - 1] for arm in result["arms"].values()]
    assert before[0] == before[1]


def test_the_committed_outcome_is_what_it_is_said_to_be():
    claims(json.loads(COMMITTED.read_text(encoding="utf-8")))


def test_the_readme_has_its_numbers():
    found = json.loads(COMMITTED.read_text(encoding="utf-8"))
    loss = {name: f"{arm['eval_loss']:.2f}" for name, arm in found["arms"].items()}
    said = " ".join((COMMITTED.parents[2] / "README.md").read_text(encoding="utf-8").split())
    assert f"{loss['stock']} is the stock Trainer's held-out loss, {loss['clean']} without them." in said
    assert f"leaves {len(found['left_out'])} steps out and ends at {loss['ours']}." in said


@pytest.mark.slow
def test_the_script_gives_it_again(tmp_path, capsys):
    result = incident_demo.main(["--output_dir", str(tmp_path / "demo")])
    claims(result)
    written = json.loads((tmp_path / "demo/incident_demo.json").read_text(encoding="utf-8"))
    committed = json.loads(COMMITTED.read_text(encoding="utf-8"))
    assert written.keys() == committed.keys()
    for name, arm in committed["arms"].items():
        assert result["arms"][name]["eval_loss"] == pytest.approx(arm["eval_loss"], rel=0.1)
    assert (tmp_path / "demo/incident_demo.png").stat().st_size > 10_000
    assert verify_ledger(tmp_path / "demo/ours/clip_ledger.jsonl").status == "verified"
    assert "Garbled document 2: steps" in capsys.readouterr().out
