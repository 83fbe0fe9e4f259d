"""Write the gauntlet's card from its figures: `verdicts.json`, and `before.json` of the rules as they were until 2026-11-28.

    hf-adaclip gauntlet --json > model_cards/gauntlet/verdicts.json
    hf-adaclip gauntlet --plot model_cards/gauntlet/gauntlet.png
    python -m scripts.docs.gauntlet_card

Tests hold the card equal to this, and the figures equal to a fresh run (but for the time of a decision).
"""

import json
from pathlib import Path
from string import Template
from typing import Any

from hf_adaclip.controllers import CONTROLLERS
from hf_adaclip.gauntlet.trials import TRIALS
from hf_adaclip.gauntlet.verdict import percent, spike, steps
from scripts.docs.readme_section import ROOT

FOLDER = ROOT / "model_cards" / "gauntlet"
VERDICTS = FOLDER / "verdicts.json"
TEMPLATE = Path(__file__).with_suffix(".template.md")


def card() -> str:
    """The card as Markdown."""
    recorded = json.loads(VERDICTS.read_text(encoding="utf-8"))
    before = json.loads((FOLDER / "before.json").read_text(encoding="utf-8"))
    verdicts = recorded["verdicts"]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        seeds=recorded["seeds"],
        noise=recorded["noise"],
        rules=_rules(verdicts),
        stories=_stories(verdicts),
        streams=_streams(verdicts, before["adaptive"]),
    )


def _rules(verdicts: dict[str, Any]) -> str:
    lines = ["| rule | idea | source | works on | numbers kept |", "| --- | --- | --- | --- | --- |"]
    for name, kind in CONTROLLERS.items():
        kept = verdicts[name]["state_numbers"] if name in verdicts else 0
        lines.append(f"| `{name}` | {kind.idea} | {kind.source} | {', '.join(kind.granularities)} | {kept} |")
    return "\n".join(lines)


def _stories(verdicts: dict[str, Any]) -> str:
    lines = [
        "| rule | altered when calm | first spike | second spike | 3x rise accepted | altered in decay |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, v in verdicts.items():
        rise, calm, decay = float(v["accepted_after"]), percent(v["altered_calm"]), percent(v["altered_decay"])
        first, second = spike(v["first_spike"]), spike(v["second_spike"])
        lines.append(
            f"| `{name}` | {calm} | {first} | {second} | {'at once' if rise < 1 else steps(rise)} | {decay} |"
        )
    return "\n".join(lines)


def _streams(verdicts: dict[str, Any], before: dict[str, Any]) -> str:
    others = [name for name in verdicts if name != "adaptive"]
    lines = [
        "| stream | figure | bar | before | `adaptive` | " + " | ".join(f"`{n}`" for n in others) + " |",
        "| --- " * (5 + len(others)) + "|",
    ]
    for trial in TRIALS:
        found = [before, verdicts["adaptive"]["streams"], *(verdicts[n]["streams"] for n in others)]
        cells = " | ".join(f"{float(figures[trial.name]):.3g}" for figures in found)
        lines.append(f"| {trial.name} | {trial.figure} | {trial.bar:g} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(card(), encoding="utf-8")
