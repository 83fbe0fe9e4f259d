"""The model card that a Trainer writes, with a section on what clipping did in the run."""

from pathlib import Path

from huggingface_hub import ModelCard

from hf_adaclip.ledger.tail import find_tail
from hf_adaclip.report.run_report import clipping_section, load_run


def add_section(card: Path, ledger: Path, *, learning_rate: float) -> None:
    """Put the section at the end of a card, and the package among its tags.

    Args:
        card: The README.md; nothing is done where there is none.
        ledger: What the section is made of; nothing is done where there is none.
        learning_rate: Of the run.
    """
    if not ledger.is_file() or not card.is_file():
        return
    section = clipping_section(load_run(ledger), find_tail(ledger).sha256, learning_rate=learning_rate)
    text = ModelCard.load(card)
    text.text = f"{text.text.rstrip()}\n\n{section}"
    tags = text.data.tags or []
    text.data.tags = [*([tags] if isinstance(tags, str) else tags), "hf_adaclip"]
    text.save(card)
