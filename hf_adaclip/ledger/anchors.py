"""What outside of a ledger names one of its seals: the file with its last seal, checkpoints, the model's card."""

import json
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

from hf_adaclip.ledger.reader import read_regular
from hf_adaclip.ledger.tail import HASH, read_seal, seal_path

_STATE_PATTERNS: Final = (
    "clip_state*.safetensors",
    "*/clip_state*.safetensors",
    "checkpoints/*/clip_state*.safetensors",
)
_MOST_CHECKPOINTS: Final = 1000
_MOST_BYTES: Final = 64 * 1024 * 1024
_IN_CARD: Final = re.compile(r"Last seal of `([^`\n]{1,300})`: `([0-9a-f]{64})`")


class Anchor(NamedTuple):
    """A seal that is named elsewhere.

    Attributes:
        name: Where, for people.
        sha256: The hash.
        step: Steps done at that point, None where that is not said.
    """

    name: str
    sha256: str
    step: int | None


class Beside(NamedTuple):
    """What the files beside a ledger say of it.

    Attributes:
        anchors: Seals that they name.
        counted: Steps that the Trainer counts in `trainer_state.json`; None without one.
        problems: Files that could not be understood, in words.
    """

    anchors: list[Anchor]
    counted: int | None
    problems: list[str]


def anchors_beside(ledger: Path) -> Beside:
    """Look into the ledger's folder, and into the checkpoints in it. Files of another ledger are passed over; nothing here raises."""
    found = Beside([], None, [])
    seal = seal_path(ledger)
    content = read_seal(ledger)
    if content is not None:
        found.anchors.append(Anchor(seal.name, content["sha256"], None))
    elif seal.is_symlink() or seal.exists():
        found.problems.append(f"{seal.name} cannot be understood.")
    counts = [_global_step(ledger.parent)]
    for path in _state_files(ledger.parent):
        name = str(path.relative_to(ledger.parent))
        try:
            anchor = _in_state(path, name, ledger.name)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            found.problems.append(f"{name} cannot be understood ({type(error).__name__}).")
            continue
        if anchor is not None:
            found.anchors.append(anchor)
            if path.parent != ledger.parent:
                counts.append(_global_step(path.parent))
    found.anchors.extend(_in_card(ledger))
    return found._replace(counted=max((c for c in counts if c is not None), default=None))


def global_step_of(folder: Path) -> int | None:
    """`global_step` of the `trainer_state.json` in a folder; None where there is none.

    Raises:
        OSError, ValueError, LookupError, TypeError: It is there and cannot be understood.
    """
    try:
        raw = read_regular(folder / "trainer_state.json", 8 * _MOST_BYTES)
    except FileNotFoundError:
        return None
    step = json.loads(raw.decode("utf-8-sig"))["global_step"]
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError("`global_step` is no number of steps")
    return step


def _global_step(folder: Path) -> int | None:
    try:
        return global_step_of(folder)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _state_files(folder: Path) -> list[Path]:
    try:
        found = {path for pattern in _STATE_PATTERNS for path in folder.glob(pattern)}
    except OSError:
        return []
    return sorted(found, key=lambda path: (len(str(path)), str(path)))[:_MOST_CHECKPOINTS]


def _in_state(path: Path, name: str, ledger: str) -> Anchor | None:
    """The seal that a checkpoint refers to; None where it is of another ledger, or of none."""
    text = _safetensors_metadata(path)
    metadata, config = json.loads(text["metadata"]), json.loads(text["config"])
    digest, step = metadata["ledger"], metadata["step"]
    # The folder may have been moved since, the name of the file not.
    if digest is None or re.split(r"[/\\]", str(config["ledger"]))[-1] != ledger:
        return None
    if (
        not isinstance(digest, str)
        or not HASH.fullmatch(digest)
        or isinstance(step, bool)
        or not isinstance(step, int)
    ):
        raise ValueError("the seal is no hash, or the step no number")
    return Anchor(name, digest, step)


def _safetensors_metadata(path: Path) -> dict[str, Any]:
    """The texts at the head of a safetensors file (8 bytes of length, then JSON), without its tensors."""
    start = read_regular(path, 8)
    size = int.from_bytes(start, "little")
    if len(start) < 8 or size > _MOST_BYTES:
        raise ValueError("no header of safetensors")
    header = json.loads(read_regular(path, 8 + size)[8:].decode("utf-8"))
    return dict(header["__metadata__"])


def _in_card(ledger: Path) -> list[Anchor]:
    try:
        text = read_regular(ledger.parent / "README.md", _MOST_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return []
    return [Anchor("README.md", digest, None) for name, digest in _IN_CARD.findall(text) if name == ledger.name]
