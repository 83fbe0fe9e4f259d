"""What a replay of an incident's batch gave, as lines of text: beside what was recorded, by module, and by sample."""

import math
from collections.abc import Iterator
from typing import Any, Final

_MODULES: Final = 10
_SAMPLES: Final = 16
_TEXT: Final = 70


def in_words(answer: dict[str, Any]) -> list[str]:
    """Lines for people.

    Args:
        answer: As `incidents.replay.replay` gives it, with `weights` and `steps_before`.
    """
    return [*_head(answer), *_modules(answer), *_samples(answer)]


def _head(answer: dict[str, Any]) -> Iterator[str]:
    now, then, steps = answer["replayed"], answer["recorded"], answer.get("steps_before")
    yield f"Step {answer['step']}: {answer['kind'].replace('_', ' ')}. {answer['folder']}"
    if answer.get("weights") is None:
        yield f"  weights: those that the script begins with, because no checkpoint comes before step {answer['step']}."
    else:
        away = "" if steps is None else f", {steps} steps before" if steps else ", those of the step itself"
        yield f"  weights: {answer['weights']}{away}."
    ranks = answer["ranks"]
    count = f"{answer['micro_batches']} micro-batch{'' if answer['micro_batches'] == 1 else 'es'}"
    which = (
        f" of rank {ranks[0]}"
        if len(ranks) == 1 < answer["world_size"]
        else f" of {len(ranks)} ranks" * (len(ranks) > 1)
    )
    yield f"  batch: {count}{which}, with dropout drawn anew."
    if len(ranks) < answer["world_size"]:
        yield f"  {answer['world_size']} ranks made the step; loss and norm recorded are those of all."
    yield f"  {'':<10}{'replayed':>12}{'recorded':>12}{'usual':>12}"
    yield f"  {'loss':<10}{_number(now['loss']):>12}{_number(then.get('loss')):>12}"
    yield f"  {'norm':<10}{_number(now['norm']):>12}{_number(then.get('norm')):>12}{_number(then.get('usual_norm')):>12}"


def _modules(answer: dict[str, Any]) -> Iterator[str]:
    now, then = answer["replayed"].get("modules") or [], answer["recorded"].get("modules") or []
    recorded = {entry["name"]: entry["share"] for entry in then}
    if not now:
        yield "  No parameter has a gradient."
        return
    yield "  share of the squared norm by module:"
    for entry in now[:_MODULES]:
        yield f"  {'':<10}{_share(entry['share']):>12}{_share(recorded.get(entry['name'])):>12}  {entry['name']}"


def _samples(answer: dict[str, Any]) -> Iterator[str]:
    if "samples" not in answer:
        return
    found = answer["samples"]
    if not found:
        yield "  Its samples cannot be told apart: no dimension is that of all entries, or it has none."
        return
    yield f"  {len(found)} of {answer['samples_in_all']} samples, each alone, by the norm of its gradient:"
    ranks = answer["world_size"] > 1
    yield f"    {'rank ' * ranks}{'micro-batch':>11} {'row':>4} {'index':>8} {'loss':>10} {'norm':>10} {'share':>7}  text"
    for one in found[:_SAMPLES]:
        text = "" if one["text"] is None else repr(one["text"][:_TEXT])
        rank = f"{one['rank']:>4} " * ranks
        index = "-" if one["index"] is None else one["index"]
        numbers = f"{_number(one['loss']):>10} {_number(one['norm']):>10} {_share(one['share']):>7}"
        yield f"    {rank}{one['micro_batch']:>11} {one['sample']:>4} {index:>8} {numbers}  {text}".rstrip()
    if len(found) > _SAMPLES:
        yield f"    {len(found) - _SAMPLES} more are in `--json`."


def _share(value: Any) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, int | float) and math.isfinite(value) else "-"


def _number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, int | float) else "-" if value is None else str(value)
