"""Lines of `clip_ledger.jsonl`: their kinds, their numbers, their seals.

A ledger is a sequence of blocks. A block is one or more body lines (`header`, `step`, `footer`) and one `seal` line:

    {"kind":"header","schema":1,...}
    {"kind":"seal","lines":1,"previous":"000...","sha256":"..."}
    {"kind":"step","step":0,"norm":1.25,"threshold":1.0,...}
    {"kind":"step","step":1,...}
    {"kind":"seal","lines":2,"previous":"...","sha256":"..."}

A seal's hash is SHA-256 over the hash before it, the number of lines, and the bytes of the body lines. A resumed run appends a
new header; the chain runs through it. Everything is strict JSON: NaN and infinities are the strings "nan", "inf", "-inf".

A `gap` line stands where records could not be written: which steps, their counts by reason, the error, and the controller's state
after them. Beside the file lies `<ledger>.seal`, one line with the last seal's hash and the number of lines: what the file itself cannot
show is that its end was cut off at a seal.
"""

import hashlib
import json
import math
from typing import Any, Final

import numpy as np

LEDGER_FILE: Final = "clip_ledger.jsonl"
"""The name of a ledger in the folder of its run."""
SCHEMA_VERSION: Final = 1
GENESIS: Final = "0" * 64
MAX_LINE_BYTES: Final = 64 * 1024 * 1024
BODY_KINDS: Final = ("header", "step", "gap", "footer")
SEAL_SUFFIX: Final = ".seal"
"""Of the file beside a ledger that holds its last seal."""
APPLIED_TOLERANCE: Final = 0.01
"""Relative difference between two norms of one gradient, as it was meant and as it was measured, that rounding explains (bfloat16: 1 in
256)."""

STEP_FIELDS: Final = (
    "step",
    "norm",
    "threshold",
    "coefficient",
    "pace",
    "reason",
    "loss",
    "loss_scale",
    "time",
    "applied_norm",
)

SHAPE_FIELDS: Final = ("spectral_width", "altered_energy", "matrix_norm", "agreeing_share")
"""Of a step record, where the spectral range or the agreement is on."""


def number(value: float) -> float | str:
    """A float32 as JSON: the shortest decimal that rounds back to the same float32; non-finite values as strings."""
    if math.isfinite(value):
        return float(str(np.float32(value)))
    return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")


def number_or_null(value: float) -> float | str | None:
    """Like `number`, with NaN as null: for fields where NaN means 'not known'."""
    return None if math.isnan(value) else number(value)


def parse_number(value: Any) -> float:
    """The float that `number` or `number_or_null` wrote.

    Raises:
        ValueError: It is neither a number nor one of the three strings nor null.
    """
    if value is None:
        return math.nan
    if isinstance(value, str):
        if value in ("nan", "inf", "-inf"):
            return float(value)
        raise ValueError(f"{value!r} is not a number")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError("an integer is too large for a number") from error


def plain(value: Any) -> Any:
    """A nested value ready for strict JSON: infinities and NaN become strings, tuples lists."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def encode(line: dict[str, Any]) -> bytes:
    """One line of the ledger, newline included."""
    return (json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n").encode("utf-8")


def seal_line(previous: str, lines: int, body: bytes) -> tuple[bytes, str]:
    """The seal of a block and its hash.

    Args:
        previous: Hash of the seal before it, `GENESIS` for the first.
        lines: Number of body lines.
        body: The bytes of the body lines, newlines included.
    """
    digest = hashlib.sha256(f"{previous}:{lines}:".encode() + body).hexdigest()
    return encode({"kind": "seal", "lines": lines, "previous": previous, "sha256": digest}), digest
