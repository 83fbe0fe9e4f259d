"""Where two runs part: the first step at which their ledgers differ, and why."""

from itertools import zip_longest
from pathlib import Path
from typing import Any

from hf_adaclip.audit.ingest import Series, load_series
from hf_adaclip.config import as_written_now
from hf_adaclip.errors import LedgerError

_COMPARED = ("norm", "loss", "threshold", "coefficient", "pace")


def diff_ledgers(a: str | Path, b: str | Path) -> dict[str, Any]:
    """Compare two ledgers step by step.

    Returns:
        JSON-ready: `settings` that differ, `first` (step, the fields that differ there, both values) or None, `steps` of each, and `why` in
        words.

    Raises:
        LedgerError: One of them is no ledger.
    """
    first, second = load_series(a), load_series(b)
    for series in (first, second):
        if series.source != "ledger":
            raise LedgerError(
                f"{series.path} must be a ledger to be compared step by step, but is {series.source} instead."
            )
    settings = _settings(first, second)
    found = _first_difference(first, second)
    return {
        "a": first.path,
        "b": second.path,
        "steps": [len(first), len(second)],
        "settings": settings,
        "first": found,
        "why": _why(first, second, settings, found),
    }


def _settings(a: Series, b: Series) -> dict[str, list[Any]]:
    headers = [s.header or {} for s in (a, b)]
    configs = [as_written_now(h.get("config", {})) for h in headers]
    differing = {
        key: [c.get(key) for c in configs]
        for key in sorted({*configs[0], *configs[1]} - {"ledger"})
        if configs[0].get(key) != configs[1].get(key)
    }
    for key in ("seed", "world_size", "device", "static_threshold", "revision", "revisions", "versions"):
        if headers[0].get(key) != headers[1].get(key):
            differing[key] = [h.get(key) for h in headers]
    return differing


def _first_difference(a: Series, b: Series) -> dict[str, Any] | None:
    columns = [
        (
            s.steps.tolist(),
            s.norms.tolist(),
            s.losses.tolist(),
            _list(s.thresholds),
            _list(s.coefficients),
            _list(s.paces),
            s.reasons or [],
        )
        for s in (a, b)
    ]
    for row_a, row_b in zip_longest(zip(*columns[0], strict=True), zip(*columns[1], strict=True)):
        if row_a is None or row_b is None:
            return {
                "step": (row_a or row_b)[0],
                "fields": {"end": ["run ended before" if r is None else "run goes on" for r in (row_a, row_b)]},
            }
        names = ("step", *_COMPARED, "reason")
        fields = {
            n: [x, y] for n, x, y in zip(names, row_a, row_b, strict=True) if not (x == y or (x != x and y != y))
        }
        if fields:
            return {"step": row_a[0], "fields": fields}
    return None


def _why(a: Series, b: Series, settings: dict[str, list[Any]], found: dict[str, Any] | None) -> str:
    if found is None:
        return f"The runs are equal in all {len(a)} steps."
    fields = found["fields"]
    where = f"The runs part at step {found['step']}"
    if "end" in fields:
        return f"{where}: up to there they are equal, then one of them ends."
    if "norm" not in fields and "loss" not in fields:
        cause = f"the settings differ ({', '.join(settings)})" if settings else "the controllers' states differ"
        return f"{where}: norm and loss are equal, the decision is not; {cause}."
    if found["step"] == a.steps[0]:
        return f"{where}, the first: other initial weights, other data, or another machine. The controllers had no part in it."
    return (
        f"{where}: everything before it was decided alike, so the norms part by themselves: other data, another seed in the model, or "
        "arithmetic that is not deterministic."
    )


def _list(values: Any) -> list[float]:
    return [] if values is None else list(values.tolist())
