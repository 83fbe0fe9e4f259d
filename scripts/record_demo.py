"""Record a comparison as the demo's card under model_cards/demo, and put its tables into the README.

    python -m scripts.record_demo adaclip-demo
    python -m scripts.record_demo                 only the README's tables, from the card that is there

The numbers in the README are never typed: a test holds them equal to model_cards/demo/comparison.json.
"""

import argparse
import json
import shutil
from pathlib import Path

from hf_adaclip.compare.present import heading, markdown_table
from scripts.readme_section import ROOT, write_section

CARD = ROOT / "model_cards" / "demo"


def demo_section() -> str:
    """What stands between the README's markers."""
    comparison = json.loads((CARD / "comparison.json").read_text(encoding="utf-8"))
    parts = []
    for task in comparison["tasks"]:
        parts += [f"**{heading(task)}**", markdown_table(task)]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, nargs="?", help="folder that `hf-adaclip compare` left")
    folder = parser.parse_args().comparison
    if folder is not None:
        CARD.mkdir(parents=True, exist_ok=True)
        for name in ("comparison.json", "README.md", "curves.png"):
            shutil.copy(folder / name, CARD / name)
    write_section("demo", demo_section())


if __name__ == "__main__":
    main()
