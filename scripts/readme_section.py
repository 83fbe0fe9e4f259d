"""Generated parts of the README stand between `<!-- NAME:begin -->` and `<!-- NAME:end -->`; tests hold them equal to their sources."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def read_section(name: str) -> str:
    """What stands in the README between the marks of a part."""
    return _split(name)[1].strip()


def write_section(name: str, text: str) -> None:
    """Put text between the marks of a part."""
    before, _, after = _split(name)
    README.write_text(f"{before}\n{text}\n{after}", encoding="utf-8")


def _split(name: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = README.read_text(encoding="utf-8").split(begin)
    old, after = rest.split(end)
    return before + begin, old, end + after
