"""Write model_cards/README.md, the index of all pages, and of the comparisons by their numbers.

python -m scripts.docs.index_cards
"""

import json
import re
from pathlib import Path
from typing import Final

from hf_adaclip.compare.present import table_rows

CARDS = Path(__file__).parents[2] / "model_cards"
ORDER: Final = ("study", "pace", "gauntlet", "speed", "demo")
"""Folders in the order in which they are read; others follow by name."""


def index() -> str:
    """The index as Markdown: every page with what it is about, then per comparison and task every arm's ratio, wins and losses alike."""
    lines = [
        "# Model cards",
        "",
        "One folder for each question: a page, the numbers that it is made of, and pictures. `python -m scripts.docs.index_cards` writes "
        "this index.",
        "",
        "| page | what it is about | its data |",
        "| --- | --- | --- |",
    ]
    lines += [_row(page) for page in pages()]
    lines += [
        "",
        "## Comparisons",
        "",
        "Below 1 is sooner than the stock Trainer at its best learning rate. Comparisons before 2026-11-28 ran with revision 1 of the rule "
        "of `adaptive`.",
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


def pages() -> list[Path]:
    """Every page below the index, in reading order."""
    found = [path for path in CARDS.glob("**/*.md") if path != CARDS / "README.md"]
    known = {name: place for place, name in enumerate(ORDER)}

    def key(path: Path) -> tuple[int, str]:
        folder = path.relative_to(CARDS).parts[0]
        return known.get(folder, -1 if path.parent == CARDS else len(ORDER)), path.as_posix()

    return sorted(found, key=key)


def _row(page: Path) -> str:
    text = re.sub(r"^---\n.*?^---\n", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    heading, _, rest = text.strip().partition("\n")
    sentence = re.match(r"(.+?[.?])(?:\s|$)", " ".join(rest.strip().split("\n\n")[0].split()))
    about = heading.lstrip("# ") + (f". {sentence[1]}" if sentence else "")
    name = page.relative_to(CARDS)
    data = sorted(p for p in page.parent.glob("*") if p.suffix in (".json", ".jsonl", ".png", ".py"))
    kinds = [f"{sum(p.suffix == kind for p in data)} {kind[1:]}" for kind in sorted({p.suffix for p in data})]
    title = name.parent.as_posix() if name.name == "README.md" else name.as_posix()
    return f"| [{title}]({name.as_posix()}) | {about} | {', '.join(kinds) or '-'} |"


if __name__ == "__main__":
    (CARDS / "README.md").write_text(index(), encoding="utf-8")
