"""Free text in Markdown: names, paths and messages come from files that anybody may have written, and are shown as text."""

import re

# What CommonMark and GitHub's dialect read as more than text: emphasis, links, code, tables, headings, HTML, maths.
_SIGNS = re.compile(r"[\\`*\[\]|#~$]|<(?=[A-Za-z/!?])|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_ENTITY = re.compile(r"&(?=#|[A-Za-z])")
# Bare addresses become links by themselves.
_ADDRESS = re.compile(r"(?<=[A-Za-z]):(?=//)|(?<=\bwww)\.|(?<=[\w.+-])@(?=\w)", re.IGNORECASE)
# What makes a list, a quotation, a rule or a heading at the start of a line.
_START = re.compile(r"^(?:>|[-+](?=\s|$)|[-=+]+$|\d+[.)](?=\s|$))")


def text(value: object) -> str:
    """One line of text that shows as itself, in a paragraph or in a table."""
    line = _ENTITY.sub("&amp;", _line(value))
    line = _ADDRESS.sub(lambda m: f"&#{ord(m[0])};", line)
    line = re.sub(_SIGNS, lambda m: "&lt;" if m[0] == "<" else "\\" + m[0], line.replace("&#", "\0")).replace(
        "\0", "&#"
    )
    return _START.sub(lambda m: f"{m[0][:-1]}&#{ord(m[0][-1])};", line)


def code(value: object) -> str:
    """The same as code; the fence is longer than any run of backticks within."""
    line = _line(value) or " "
    fence = "`" * (max((len(run) for run in re.findall(r"`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}".replace("|", r"\|")


def prose(sentence: object) -> str:
    """A sentence in which the pieces between single backticks are code, and all else is text."""
    pieces = str(sentence).split("`")
    if len(pieces) % 2 == 0:
        return text(sentence)
    shown = [code(piece) if i % 2 else _inner(piece) for i, piece in enumerate(pieces)]
    return "".join(shown)


def _inner(piece: str) -> str:
    """Text between two pieces of code, with the spaces at its ends."""
    if not piece.strip():
        return " " if piece else ""
    return (" " if piece[0] == " " else "") + text(piece) + (" " if piece[-1] == " " else "")


def block(value: object) -> str:
    """A block of code; the fence is longer than any run of backticks within."""
    content = str(value)
    fence = "`" * max(3, max((len(run) for run in re.findall(r"`+", content)), default=0) + 1)
    return f"{fence}\n{content}\n{fence}"


def table(labels: list[str], rows: list[list[str]]) -> str:
    """A table; the cells are Markdown already (see `text` and `code`)."""
    lines = ["| " + " | ".join(labels) + " |", "|" + " --- |" * len(labels)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _line(value: object) -> str:
    """Without breaks and without what cannot be seen."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
