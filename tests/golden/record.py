"""Record the golden files anew: `python -m tests.golden.record`. Says which of them change; `git diff` shows the first step that does."""

import logging
import tempfile
from pathlib import Path

import torch

from tests.golden.runs import FOLDER, RUNS, play


def record(folder: Path = FOLDER) -> list[str]:
    """Run everything, write the files into `folder`, and return the names of those that changed."""
    wanted: dict[Path, str] = {}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as host, tempfile.TemporaryDirectory() as device:
            text, other = play(name, "host", Path(host)), play(name, "device", Path(device))
        wanted[folder / f"{name}.json"] = text
        if other != text:
            wanted[folder / f"{name}.device.json"] = other
    changed = [path for path, text in wanted.items() if not path.exists() or path.read_bytes() != text.encode()]
    gone = [path for path in folder.glob("*.json") if path not in wanted]
    for path in gone:
        path.unlink()
    for path in changed:
        path.write_bytes(wanted[path].encode())
    return [path.name for path in [*changed, *gone]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable()
    print("\n".join(record()) or "nothing has changed")
