"""Write the README's table of controllers, from the registry and from what the gauntlet measured.

    hf-adaclip gauntlet --json > model_cards/gauntlet/verdicts.json
    python -m scripts.controller_table

A test holds the README equal to this, and the verdicts equal to a fresh run of the gauntlet (but for the time of a decision).
"""

import json

from hf_adaclip.controllers import CONTROLLERS
from hf_adaclip.gauntlet.verdict import percent, spike, steps
from scripts.readme_section import ROOT, write_section

VERDICTS = ROOT / "model_cards" / "gauntlet" / "verdicts.json"
COLUMNS = (
    "`clip=`",
    "idea",
    "source",
    "works on",
    "altered when calm",
    "a 100x spike becomes",
    "a lasting 3x rise is accepted after",
    "numbers kept",
    "choose it",
)


def controller_table() -> str:
    """The table as Markdown, a row for every controller of the registry."""
    verdicts = json.loads(VERDICTS.read_text(encoding="utf-8"))["verdicts"]
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "| " + " | ".join("---" for _ in COLUMNS) + " |",
    ]
    for name, kind in CONTROLLERS.items():
        found = verdicts.get(name)
        measured = ["depends on the gradient", "-", "-", "0"]
        if found is not None:
            rise = float(found["accepted_after"])
            measured = [
                percent(found["altered_calm"]),
                spike(found["second_spike"]),
                "at once" if rise < 1 else steps(rise),
                str(found["state_numbers"]),
            ]
        cells = [f'`"{name}"`', kind.idea, kind.source, ", ".join(kind.granularities), *measured, kind.choose]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    write_section("controllers", controller_table())
