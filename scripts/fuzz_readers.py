"""Feed mutated files to every reader: each must answer with an exit code and at most one line of error, never a traceback.

python scripts/fuzz_readers.py                 # 10,000 files
python scripts/fuzz_readers.py --files 500 --seed 3
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hf_adaclip import AdaptiveClipConfig, AdaptiveClipper, HfAdaclipError
from hf_adaclip.cli import main as cli

ROOT = Path(__file__).parent.parent

_TOKENS = [
    b"NaN", b"-1", b"1e999", b'"nan"', b"null", b"true", b"[]", b"{}", b'""', b"[" * 3000, b"9" * 400, b"\xff\xfe", b"\x00", b"\n",
    b"1e400", b'"\\ud800"', b"-0.0", b"0", b'{"kind":"header"}', b"\xef\xbb\xbf",
]  # fmt: skip


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes: flipped bytes, cuts, doubled and swapped pieces, hostile tokens in place of values, other encodings."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        size = max(len(data), 1)
        a, b = sorted(rng.integers(0, size, 2).tolist())
        kind = rng.integers(0, 8)
        if kind == 0 and data:
            data[a] ^= int(rng.integers(1, 256))
        elif kind == 1:
            del data[a:]
        elif kind == 2:
            data[a:a] = data[a:b][:5000]
        elif kind == 3:
            del data[a : a + int(rng.integers(1, 60))]
        elif kind == 4:
            data[a : a + int(rng.integers(0, 20))] = _TOKENS[rng.integers(len(_TOKENS))]
        elif kind == 5:
            colon = data.find(b":", a)
            comma = data.find(b",", colon)
            if 0 <= colon < comma:
                data[colon + 1 : comma] = _TOKENS[rng.integers(len(_TOKENS))]
        elif kind == 6:
            lines = data.splitlines(keepends=True)
            rng.shuffle(lines)
            data = bytearray(b"".join(lines))
        elif rng.random() < 0.2:
            data = bytearray(data.decode("latin-1").encode("utf-16"))
    return bytes(data)


def seeds(folder: Path) -> dict[str, bytes]:
    """One good file of every kind that the package reads."""
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    config = AdaptiveClipConfig(warmup_observations=5, granularity="tensor", max_pace=2.0)
    for name, used in (("tensor", config), ("global", config.replace(granularity="global", max_threshold=2.0))):
        clipper = AdaptiveClipper(used, optimizer=optimizer, ledger=folder / f"{name}.jsonl")
        for step in range(25):
            loss = model(torch.randn(4, 4)).square().mean() * (float("nan") if step == 12 else 1)
            loss.backward()
            clipper.clip_(model.parameters(), loss=loss)
            optimizer.step()
            optimizer.zero_grad()
        clipper.save_state(folder)
        clipper.close()
    config.to_json(folder / "clip.json")
    history = [{"step": i, "grad_norm": 1.0 + i, "loss": 2.0} for i in range(1, 30)]
    return {
        "global.jsonl": (folder / "global.jsonl").read_bytes(),
        "tensor.jsonl": (folder / "tensor.jsonl").read_bytes(),
        "trainer_state.json": json.dumps({"log_history": history}).encode(),
        "log.csv": b"step,norm,loss\n" + b"".join(b"%d,%f,2.0\n" % (i, 1 + i / 10) for i in range(30)),
        "clip.json": (folder / "clip.json").read_bytes(),
        "clip_state.safetensors": (folder / "clip_state.safetensors").read_bytes(),
        "comparison.json": (ROOT / "model_cards/demo/comparison.json").read_bytes(),
    }


def read(path: Path) -> str:
    """Give the file to what reads it; returns how it ended. Anything but an orderly end raises."""
    out, err = io.StringIO(), io.StringIO()
    if path.name == "clip.json":
        return _python(lambda: AdaptiveClipConfig.from_json(path))
    if path.name == "clip_state.safetensors":
        config = AdaptiveClipConfig(warmup_observations=5, max_pace=2.0, max_threshold=2.0)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        return _python(lambda: AdaptiveClipper(config, optimizer=optimizer).load_state(path.parent))
    if path.name == "comparison.json":
        commands = [["card", str(path.parent)]]
    elif path.suffix == ".jsonl":
        page = str(path.with_suffix(".out"))
        commands = [["verify", str(path)], ["replay", str(path)], ["diff", str(path), str(path)]]
        commands.append(["report", str(path), "--format", "json", "--output", page])
    else:
        commands = [["advise", str(path)]]
    codes = []
    for command in commands:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli(command)
        if code not in (0, 1, 2, 3):
            raise AssertionError(f"exit code {code}")
        codes.append(str(code))
    if "Traceback" in err.getvalue() or any(len(line) > 1500 for line in err.getvalue().splitlines()):
        raise AssertionError(err.getvalue()[:2000])
    return ",".join(codes)


def _python(call: Callable[[], object]) -> str:
    try:
        call()
    except HfAdaclipError:
        return "error"
    return "fine"


def fuzz(files: int, seed: int, folder: Path) -> Counter[str]:
    """Mutate and read; raises with the file kept when a reader misbehaves."""
    rng = np.random.default_rng(seed)
    good = seeds(folder)
    ends: Counter[str] = Counter()
    for number in range(files):
        name = list(good)[number % len(good)]
        path = folder / "mutated" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(mutate(good[name], rng))
        start = time.perf_counter()
        try:
            end = read(path)
        except BaseException as error:
            kept = Path(f"fuzz-{seed}-{number}-{name}")
            kept.write_bytes(path.read_bytes())
            raise AssertionError(f"{name}, file {number}: {type(error).__name__}: {error}; kept as {kept}") from error
        if time.perf_counter() - start > 10:
            raise AssertionError(f"{name}, file {number}, took {time.perf_counter() - start:.0f} s")
        ends[f"{name}: {end}"] += 1
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000, help="mutated files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: %(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ends = fuzz(arguments.files, arguments.seed, Path(folder))
    for name, count in sorted(ends.items()):
        print(f"{count:6d}  {name}")
    print(f"{sum(ends.values())} files, every one answered in order")


if __name__ == "__main__":
    main()
