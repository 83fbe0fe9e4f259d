"""Write the README's table of controllers from the registry.

    python -m scripts.docs.controller_table

A test holds the README equal to this. What each rule does to norms is on the gauntlet's card (`scripts/docs/gauntlet_card.py`).
"""

from hf_adaclip.controllers import CONTROLLERS
from scripts.docs.readme_section import write_section


def controller_table() -> str:
    """The table as Markdown, a row for every controller of the registry."""
    rows = [f'| `"{name}"` | {kind.choose} | {kind.source} |' for name, kind in CONTROLLERS.items()]
    return "\n".join(["| `clip=` | choose it | source |", "| --- | --- | --- |", *rows])


if __name__ == "__main__":
    write_section("controllers", controller_table())
