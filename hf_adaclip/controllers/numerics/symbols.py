"""A function of float32 numbers, written down as the operations that it makes: what one kernel is then made of.

Controllers are elementwise and have no branch that depends on a value, so a single call with symbols in place of numbers shows all that
they will ever do. What cannot be written down so (a long window that is sorted) raises `NotTraceableError`, and stays a chain of tensor
operations.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from hf_adaclip.controllers.numerics.ops import Shape

MOST_ROWS: Final = 16
"""Rows of a field of the state that are written out one by one; a window of more is sorted and searched better by torch."""

FLOAT, BOOL = "float", "bool"


class NotTraceableError(Exception):
    """The function does something that a list of operations on single numbers cannot say."""


class Operation(NamedTuple):
    """One line of a program.

    Attributes:
        name: What is done: "add", "where" and so on; "input" and "constant" stand at the beginning.
        arguments: Numbers of the lines that it is done with; of an input its place, of a constant its value.
        kind: `FLOAT` or `BOOL`, of the result.
    """

    name: str
    arguments: tuple[Any, ...]
    kind: str


class Program(NamedTuple):
    """Operations in an order in which they can be made, without any that nobody needs.

    Attributes:
        operations: The lines.
        results: Numbers of the lines that are the results.
        kinds: Of the results.
    """

    operations: tuple[Operation, ...]
    results: tuple[int, ...]
    kinds: tuple[str, ...]


class Symbol:
    """A number that is not known yet: the result of line `line` of a listing."""

    __slots__ = ("kind", "line", "ops")

    def __init__(self, ops: "SymbolOps", line: int, kind: str) -> None:
        self.ops, self.line, self.kind = ops, line, kind

    def __add__(self, other: "Symbol") -> "Symbol":
        return self.ops.apply("add", self, other)

    def __sub__(self, other: "Symbol") -> "Symbol":
        return self.ops.apply("sub", self, other)

    def __mul__(self, other: "Symbol") -> "Symbol":
        return self.ops.apply("mul", self, other)

    def __truediv__(self, other: "Symbol") -> "Symbol":
        return self.ops.apply("div", self, other)

    def __neg__(self) -> "Symbol":
        return self.ops.apply("neg", self)

    def __abs__(self) -> "Symbol":
        return self.ops.apply("abs", self)

    def __lt__(self, other: "Symbol") -> "Symbol":
        return self.ops.apply("lt", self, other, kind=BOOL)

    def __le__(self, other: "Symbol") -> "Symbol":
        return self.ops.apply("le", self, other, kind=BOOL)

    def __gt__(self, other: "Symbol") -> "Symbol":
        return self.ops.apply("gt", self, other, kind=BOOL)

    def __ge__(self, other: "Symbol") -> "Symbol":
        return self.ops.apply("ge", self, other, kind=BOOL)

    def __eq__(self, other: object) -> "Symbol":  # type: ignore[override]
        return self.ops.apply("eq", self, other, kind=BOOL)

    def __ne__(self, other: object) -> "Symbol":  # type: ignore[override]
        return self.ops.apply("ne", self, other, kind=BOOL)

    def __and__(self, other: "Symbol") -> "Symbol":
        return self.ops.apply("and", self, other, takes=BOOL, kind=BOOL)

    def __or__(self, other: "Symbol") -> "Symbol":
        return self.ops.apply("or", self, other, takes=BOOL, kind=BOOL)

    def __invert__(self) -> "Symbol":
        return self.ops.apply("not", self, takes=BOOL, kind=BOOL)

    def __bool__(self) -> bool:
        raise NotTraceableError("a branch depends on a value")

    __hash__ = object.__hash__


class SymbolOps:
    """The operations of `Ops` on symbols. Equal operations on equal numbers are one line."""

    on_host = False

    def __init__(self) -> None:
        self._operations: list[Operation] = []
        self._known: dict[tuple[Any, ...], Symbol] = {}

    def apply(self, name: str, *arguments: Any, takes: str = FLOAT, kind: str = FLOAT) -> Symbol:
        """The symbol of one more operation."""
        if any(not isinstance(a, Symbol) or a.kind != takes for a in arguments):
            raise NotTraceableError(f"'{name}' of something else than {takes}")
        return self._line(name, tuple(a.line for a in arguments), kind)

    def input(self, place: int, kind: str) -> Symbol:
        """The number in this place of the arguments."""
        return self._line("input", (place,), kind)

    def program(self, results: Sequence[Symbol]) -> Program:
        """What these results need, and no more."""
        needed = [False] * len(self._operations)
        for result in results:
            needed[result.line] = True
        for line in reversed(range(len(needed))):
            name, arguments, _ = self._operations[line]
            if needed[line] and name not in ("input", "constant"):
                for argument in arguments:
                    needed[argument] = True
        place = {line: i for i, line in enumerate(line for line, wanted in enumerate(needed) if wanted)}
        operations = [
            o if o.name in ("input", "constant") else o._replace(arguments=tuple(place[a] for a in o.arguments))
            for o, wanted in zip(self._operations, needed, strict=True)
            if wanted
        ]
        return Program(tuple(operations), tuple(place[r.line] for r in results), tuple(r.kind for r in results))

    def _line(self, name: str, arguments: tuple[Any, ...], kind: str) -> Symbol:
        key = (name, *arguments, kind)
        if key not in self._known:
            self._known[key] = Symbol(self, len(self._operations), kind)
            self._operations.append(Operation(name, arguments, kind))
        return self._known[key]

    # -- as `Ops` has it ---------------------------------------------------------------------------------------------

    def __call__(self, value: float) -> Symbol:
        return self._line("constant", (float(value).hex(),), FLOAT)  # by its text, in which NaN is NaN and -0 is not 0

    def full(self, shape: Shape, value: float) -> Symbol:
        if shape:
            raise NotTraceableError("a vector is made")
        return self(value)

    def expand(self, value: Any, shape: Shape) -> Any:
        return value

    def shape(self, value: Any) -> Shape:
        return ()

    def where(self, condition: Any, yes: Any, no: Any) -> Symbol:
        known = all(isinstance(v, Symbol) for v in (condition, yes, no))
        if not known or condition.kind != BOOL or yes.kind != no.kind:
            raise NotTraceableError("'where' of something else than numbers")
        return self._line("where", (condition.line, yes.line, no.line), yes.kind)

    def minimum(self, a: Any, b: Any) -> Symbol:
        return self.apply("minimum", a, b)

    def maximum(self, a: Any, b: Any) -> Symbol:
        return self.apply("maximum", a, b)

    def sqrt(self, a: Any) -> Symbol:
        return self.apply("sqrt", a)

    def floor(self, a: Any) -> Symbol:
        return self.apply("floor", a)

    def sort(self, history: Any) -> list[Symbol]:
        ordered = self._rows(history)
        for end in range(len(ordered) - 1, 0, -1):
            for i in range(end):
                a, b = ordered[i], ordered[i + 1]
                swap = (b < a) | ((a != a) & (b == b))  # a NaN is the largest, as for torch and numpy
                ordered[i], ordered[i + 1] = self.where(swap, b, a), self.where(swap, a, b)
        return ordered

    def pick(self, history: Any, position: Any) -> Symbol:
        rows = self._rows(history)
        found = rows[0]
        for i, row in enumerate(rows[1:], start=1):
            found = self.where(position == self(float(i)), row, found)
        return found

    def put(self, history: Any, position: Any, value: Any, keep: Any) -> list[Symbol]:
        rows = self._rows(history)
        return [self.where((position == self(float(i))) & ~keep, value, row) for i, row in enumerate(rows)]

    def filled(self, history: Any) -> list[Symbol]:
        return [self.where(row < self(float("inf")), row, self(0.0)) for row in self._rows(history)]

    def join(self, values: list[Any]) -> Any:
        raise NotTraceableError("vectors are joined")

    def take_apart(self, a: Any) -> tuple[Symbol, Symbol]:
        return self.apply("exponent", a), self.apply("mantissa", a)

    def power_of_two(self, exponent: Any) -> Symbol:
        return self.apply("power_of_two", exponent)

    def _rows(self, history: Any) -> list[Symbol]:
        if not isinstance(history, list):
            raise NotTraceableError("rows of something else than a window")
        return list(history)


class Leaf(NamedTuple):
    """One argument, as a program has to know it.

    Attributes:
        kind: `FLOAT` or `BOOL`.
        rows: How many numbers it holds for each lane: of a field `[rows, *shape]`; 0 for one number, not in a list.
    """

    kind: str
    rows: int


def trace(function: Callable[..., Any], tree: Any, leaves: Sequence[Leaf]) -> tuple[Program, Any, list[int]]:
    """What a function does.

    Args:
        function: Of values; it is called once, with symbols, and must return a (nested) tuple of them.
        tree: Its arguments as (nested) tuples, with the number of a leaf in place of each; None and other constants as they are.
        leaves: What stands in these places.

    Returns:
        The program; the result as nested tuples with `Place`s in place of values; the rows of each of those.

    Raises:
        NotTraceableError: It does what no program can.
    """
    ops = SymbolOps()
    made: list[Any] = []
    place = 0
    for kind, rows in leaves:
        if rows > MOST_ROWS:
            raise NotTraceableError(f"a window of {rows} norms")
        inputs = [ops.input(place + i, kind) for i in range(max(rows, 1))]
        made.append(inputs if rows else inputs[0])
        place += len(inputs)
    found: list[Symbol] = []
    rows_of: list[int] = []

    def keep(value: Any) -> Any:
        if isinstance(value, Symbol | list):
            found.extend(value if isinstance(value, list) else [value])
            rows_of.append(len(value) if isinstance(value, list) else 0)
            return Place(len(rows_of) - 1)
        if value is None or isinstance(value, bool):
            return value
        raise NotTraceableError(f"a result of type {type(value).__name__}")

    try:
        result = function(*rebuild(tree, lambda leaf: made[leaf.number] if isinstance(leaf, Place) else leaf))
    except (TypeError, AttributeError) as error:  # what only a tensor or an array can do
        raise NotTraceableError(str(error)) from error
    outcome = rebuild(result, keep)
    return ops.program(found), outcome, rows_of


class Place:
    """Where a value belongs in nested tuples."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place) and other.number == self.number

    def __hash__(self) -> int:
        return hash(self.number)


def rebuild(tree: Any, leaf: Callable[[Any], Any]) -> Any:
    """Nested tuples of the same types, with `leaf` applied to all that is no tuple."""
    if not isinstance(tree, tuple):
        return leaf(tree)
    children = [rebuild(child, leaf) for child in tree]
    return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)
