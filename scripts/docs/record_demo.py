"""Record a comparison as the demo's card under model_cards/demo.

    python -m scripts.docs.record_demo adaclip-demo

The numbers on the card are never typed: a test holds them equal to model_cards/demo/comparison.json.
"""

import argparse
import shutil
from pathlib import Path

from scripts.docs.readme_section import ROOT

CARD = ROOT / "model_cards" / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="folder that `hf-adaclip compare` left")
    folder = parser.parse_args().comparison
    CARD.mkdir(parents=True, exist_ok=True)
    for name in ("comparison.json", "README.md", "curves.png"):
        shutil.copy(folder / name, CARD / name)


if __name__ == "__main__":
    main()
