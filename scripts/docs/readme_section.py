"""Generated parts of the README and of cards stand between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; tests hold them equal to
their sources."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"


def read_section(name: str, page: Path = README) -> str:
    """What stands in a page between the marks of a part."""
    return _split(name, page)[1].strip()


def write_section(name: str, text: str, page: Path = README) -> None:
    """Put text between the marks of a part."""
    before, _, after = _split(name, page)
    page.write_text(f"{before}\n{text}\n{after}", encoding="utf-8")


def _split(name: str, page: Path) -> tuple[str, str, str]:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    old, after = rest.split(end)
    return before + begin, old, end + after
