"""Write model_cards/README.md, the index of all cards, from their comparison.json files.

python scripts/index_cards.py
"""

import json
from pathlib import Path

from hf_adaclip.compare.present import table_rows

CARDS = Path(__file__).parent.parent / "model_cards"


def index() -> str:
    """The index as Markdown: per card and task, every adaptive arm's ratio to the stock arm, wins and losses alike."""
    lines = [
        "# Model cards",
        "",
        "One folder per comparison: the card (`README.md`), the numbers it was made from (`comparison.json`) and the curves. Written by",
        "`python scripts/index_cards.py`; below 1 is sooner than the stock Trainer at its best learning rate.",
        "",
        "| card | date | seeds | task | arm | reached | steps vs stock | final loss |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for path in sorted(CARDS.glob("*/comparison.json")):
        comparison = json.loads(path.read_text(encoding="utf-8"))
        for task in comparison["tasks"]:
            for row in table_rows(task):
                card = f"[{path.parent.name}]({path.parent.name}/README.md)"
                cells = [
                    card,
                    comparison["created"][:10],
                    str(comparison["seeds"]),
                    task["task"],
                    row[0],
                    row[1],
                    row[5],
                    row[7],
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (CARDS / "README.md").write_text(index(), encoding="utf-8")
