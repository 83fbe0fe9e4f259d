"""States of controllers that stand around others, and a state when the parameters it is kept for change in the middle of a run.

Groups that stay keep their rows; new ones, and those that must begin anew, get the rows of a new run. What belongs to the run and not to a
norm (the pace, budgets, the loss) is carried on for all of them.
"""

from collections import namedtuple
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_adaclip.controllers import Controller
from hf_adaclip.controllers.numerics.ops import Ops, Value


def joined(name: str, inner: Any, more: Mapping[str, Value]) -> Any:
    """One flat tuple for the state of a wrapper and of what is in it, so that ledger and checkpoint know of no difference.

    Args:
        name: Of the tuple's class.
        inner: The state of what is in it, a named tuple; may be empty.
        more: The wrapper's own fields.
    """
    return _type_of(name, (*getattr(inner, "_fields", ()), *more))(*inner, *more.values())


@cache
def _type_of(name: str, fields: tuple[str, ...]) -> Any:
    return namedtuple(name, fields)


class Keeping(NamedTuple):
    """Whom a state is kept for.

    Attributes:
        controller: What it is the state of.
        groups: Names of what has a norm of its own; empty where only the global norm counts.
        parts: Which pattern of `parameter_rules` they come from (None: from none) and how many they are, in order.
    """

    controller: Controller[Any]
    groups: tuple[str, ...]
    parts: tuple[tuple[str | None, int], ...]


class _Piece(NamedTuple):
    controller: Controller[Any] | None
    groups: tuple[str, ...]
    prefix: str


def carry_over(
    state: tuple[Value, ...], before: Keeping, now: Keeping, restarted: Sequence[str], ops: Ops
) -> tuple[Value, ...]:
    """The state that `now` begins with.

    Args:
        state: The state of `before`.
        before, now: Whom it was and is kept for.
        restarted: Groups that begin anew though they were there; for the global norm, any name restarts it.
        ops: The kind of numbers of both.
    """
    old_values: dict[str, Value] = dict(zip(state._fields, state, strict=True))  # type: ignore[attr-defined]
    old_pieces = _pieces(before)
    shape = (len(now.groups),) if now.groups else ()
    fresh = now.controller.init(ops, shape)
    values: dict[str, Value] = dict(zip(fresh._fields, fresh, strict=True))
    for rule, piece in _pieces(now).items():
        if piece.controller is None:
            continue
        old = old_pieces.get(rule)
        if old is not None and old.controller is None:
            old = None
        for name in values:
            if not name.startswith(piece.prefix):
                continue
            field = name.removeprefix(piece.prefix)
            shared = field in piece.controller.of_the_run
            if not now.groups:
                values[name] = old_values[name] if shared or not restarted else values[name]
                continue
            donor = _donor(old_values, old, old_pieces, field) if shared else None
            kept = None if old is None else old_values[old.prefix + field]
            values[name] = _rows(values[name], kept, donor, piece, old, restarted)
    return type(fresh)(*values.values())  # type: ignore[no-any-return]


def _pieces(keeping: Keeping) -> dict[str | None, _Piece]:
    from hf_adaclip.controllers.wrappers.by_group import MixedController  # here, because most runs never need it

    controller = keeping.controller
    if not isinstance(controller, MixedController):
        return {None: _Piece(controller, keeping.groups, "")}
    pieces: dict[str | None, _Piece] = {}
    begin = 0
    for i, ((rule, size), part) in enumerate(zip(keeping.parts, controller.parts, strict=True)):
        pieces[rule] = _Piece(part.controller, keeping.groups[begin : begin + size], f"part{i}_")
        begin += size
    return pieces


def _donor(values: dict[str, Value], own: _Piece | None, pieces: dict[str | None, _Piece], field: str) -> Value | None:
    """The value that a new row takes of what belongs to the run: that of the row that goes slowest, of the same part if there is one."""
    for piece in (own, *pieces.values()):
        if piece is not None and piece.controller is not None and piece.prefix + field in values:
            rows = values[piece.prefix + field]
            paces: Any = values.get(piece.prefix + "pace")
            return rows[..., 0 if paces is None else paces.argmin()]
    return None


def _rows(
    fresh: Value, kept: Value | None, donor: Value | None, piece: _Piece, old: _Piece | None, restarted: Sequence[str]
) -> Value:
    """`fresh`, with the rows of groups that stay, and the donor's for the others where there is one."""
    begin_anew = set(restarted)
    known = {} if old is None else {name: i for i, name in enumerate(old.groups)}
    stays = [(i, known[name]) for i, name in enumerate(piece.groups) if name in known]
    if donor is None:
        stays = [(i, j) for i, j in stays if piece.groups[i] not in begin_anew]
    rows: Any = fresh.clone() if isinstance(fresh, Tensor) else np.array(fresh)
    if donor is not None:
        rows[...] = donor[..., None]
    if kept is not None and stays:
        to: Any
        source: Any
        to, source = ([pair[side] for pair in stays] for side in (0, 1))
        if isinstance(rows, Tensor):
            to, source = (torch.tensor(i, dtype=torch.int64, device=rows.device) for i in (to, source))
        rows[..., to] = kept[..., source]
    written: Value = rows
    return written
