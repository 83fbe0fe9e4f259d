"""Cards and raw data say the same, and their metadata is what the Hub understands."""

import json
import math
import runpy
import sys

import pytest
from huggingface_hub import ModelCard

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipTrainer
from hf_adaclip.cli import main
from hf_adaclip.compare.card import GRAMS_CO2_PER_WH, card_metadata
from hf_adaclip.compare.present import markdown_table
from hf_adaclip.ledger.tail import find_tail
from scripts.docs.index_cards import CARDS, index
from tests.integrations.trainers import arguments, build, run

COMPARISONS = sorted(CARDS.glob("*/comparison.json"))


def test_the_index_is_generated():
    assert (CARDS / "README.md").read_text(encoding="utf-8") == index()


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda p: p.parent.name)
def test_a_card_says_what_its_data_says(path):
    comparison = json.loads(path.read_text(encoding="utf-8"))
    card = ModelCard.load(path.parent / "README.md")

    assert card.data.to_dict() == card_metadata(comparison).to_dict()
    for task in comparison["tasks"]:
        assert markdown_table(task) in card.text
        for entry in task["arms"]:
            for row in entry["seeds"]:
                steps = "never" if not row["reached"] else row["step"]
                assert f"| {entry['arm']} | {row['seed']} | {steps} |" in card.text
    assert comparison["command"] in card.text
    assert card.text.count("verified.") == sum(
        bool(r["ledger"]) for t in comparison["tasks"] for e in t["arms"] for r in e["seeds"]
    )


def test_metadata_has_every_result_and_validates_offline():
    comparison = json.loads(COMPARISONS[0].read_text(encoding="utf-8"))
    data = card_metadata(comparison)
    names = {r.metric_name for r in data.eval_results}

    assert "steps to target, median of 3 seeds, arm adaptive" in names
    assert all(math.isfinite(r.metric_value) for r in data.eval_results)
    assert "co2_eq_emissions" not in data.to_dict()  # the energy was estimated, not measured
    assert (data.license, data.language) == ("apache-2.0", "en")
    own = card_metadata({**comparison, "script": ["train.py"], "seeds": 1})
    assert (own.license, own.language) == (None, None)  # nothing is known of somebody else's
    assert "of 1 seed, arm" in own.eval_results[0].metric_name
    comparison["energy"] = {"source": "nvml", "measured": True}
    measured = card_metadata(comparison).co2_eq_emissions
    spent = [float(r["energy_wh"]) for t in comparison["tasks"] for e in t["arms"] for r in e["seeds"]]
    assert measured["emissions"] == pytest.approx(
        GRAMS_CO2_PER_WH * sum(s for s in spent if math.isfinite(s)), abs=1e-3
    )


def test_card_command(tmp_path, capsys):
    (tmp_path / "comparison.json").write_bytes(COMPARISONS[0].read_bytes())
    assert main(["card", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "README.md")
    assert main(["card", str(tmp_path), "--json", "--output", str(tmp_path / "other.md")]) == 0
    assert json.loads(capsys.readouterr().out)["tags"] == ["hf_adaclip", "gradient-clipping", "time-to-convergence"]
    (tmp_path / "comparison.json").write_text("{}")
    assert main(["card", str(tmp_path)]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_the_trainers_own_card_gets_a_section(tmp_path):
    trainer = build(
        AdaptiveClipTrainer, tmp_path, args=arguments(tmp_path), clip=AdaptiveClipConfig(warmup_observations=10)
    )
    run(trainer)
    trainer.create_model_card(model_name="tiny", tags=["mine"])
    trainer.create_model_card(model_name="tiny")
    card = ModelCard.load(tmp_path / "README.md")

    assert card.text.count("## Gradient clipping") == 1
    assert "40 decisions recomputed and equal" in card.text
    assert find_tail(tmp_path / "clip_ledger.jsonl").sha256 in card.text
    assert "hf_adaclip" in card.data.tags


def test_no_ledger_no_section(tmp_path):
    trainer = build(AdaptiveClipTrainer, tmp_path, clip=AdaptiveClipConfig(ledger="none"))
    run(trainer)
    trainer.create_model_card()

    assert not (tmp_path / "clip_ledger.jsonl").exists()
    assert "Gradient clipping" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "path",
    ["pace/several_epochs_lora.py", "pace/probe/probe.py", "spectral/default_probe.py", "spectral/probe.py"],
)
def test_a_probe_of_the_log_still_starts(path, monkeypatch, capsys):
    # What was measured with it is recorded: it must not rot beside its results.
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    monkeypatch.setattr(sys, "path", [str((CARDS / path).parent), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(CARDS / path), run_name="__main__")

    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out
