"""Settings: fields of a dataclass, each with its default, its help and its rule in one place, and the checks that follow from them.

`huggingface_hub.dataclasses.strict` was weighed for the types and is not used (2.4): it checks nothing when a frozen dataclass is made, as
controllers are; it refuses 1 where a float is meant, as JSON and flags write it; and it stops at the first field that is wrong, where all
problems are to be told at once.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

from hf_adaclip.hints import near

WARMUP_HELP = "Finite norms seen before the controller decides; the static threshold rules until then."
_INTERVAL = re.compile(r"([\[(])\s*(\S+)\s*,\s*(\S+)\s*([\])])")
_RULES = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}


class Setting(NamedTuple):
    """What is known of one setting.

    Attributes:
        name: Of the field.
        key: Its name in a file, and beside the settings of all other controllers; that of the field where nothing else was said.
        kind: Type of its value, without None.
        optional: Whether it may be None.
        default: What it is when nothing is said.
        help: What it does, for people.
        range: An interval such as "(0, 1]"; empty for none.
        choices: The only values; empty for any.
        words: Values beside those of its type, such as "auto".
        check: A rule of its own in place of type, range and choices: from name and value to a sentence or None.
        flag: Whether scripts have a flag for it.
    """

    name: str
    key: str
    kind: Any
    optional: bool
    default: Any
    help: str
    range: str = ""
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    check: Callable[[str, Any], str | None] | None = None
    flag: bool = False

    def problem(self, value: Any, name: str | None = None) -> str | None:
        """A sentence on what is wrong with a value, None where nothing is.

        Args:
            value: What was given.
            name: As it was called.
        """
        name = name or self.name
        if self.check is not None:
            return self.check(name, value)
        if isinstance(value, str) and value in self.words:
            return None
        if not (_is_a(value, self.kind) or (self.optional and value is None)):
            others = [*map(repr, self.words), *(["None"] if self.optional else [])]
            rule = " or ".join([_RULES[self.kind], *others])
            return f"`{name}` must be {rule}, but is {value!r} instead."
        if value is None:
            return None
        if self.choices and value not in self.choices:
            hint = near(value, self.choices, "'")
            return f"`{name}` must be one of {', '.join(self.choices)}, but is {value!r} instead.{hint}"
        if self.range and not _inside(value, self.range):
            return f"`{name}` must be in {self.range}, but is {value} instead."
        return None


def setting(
    default: Any,
    *,
    help: str,
    range: str = "",
    choices: Iterable[str] = (),
    words: Iterable[str] = (),
    key: str = "",
    check: Callable[[str, Any], str | None] | None = None,
    flag: bool = False,
) -> Any:
    """A field of a dataclass that is a setting; see [`Setting`]. Its type is the first of the annotation: bool, int, float or str.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Rule:
        ...     width: float = setting(2.5, help="Standard deviations.", range="(0, inf)")
        >>> problems_of(Rule(width=-1.0))
        {'width': '`width` must be in (0, inf), but is -1.0 instead.'}
    """
    metadata = {
        "help": help,
        "range": range,
        "choices": tuple(choices),
        "words": tuple(words),
        "key": key,
        "check": check,
        "flag": flag,
    }
    return dataclasses.field(default=default, metadata={name: said for name, said in metadata.items() if said})


def warmup() -> Any:
    """The field `warmup_observations`, which is the same for all that have a warm-up."""
    return setting(50, help=WARMUP_HELP, range="[2, inf)")


def settings_of(kind: type) -> dict[str, Setting]:
    """The settings of a dataclass by the names of their fields, in order."""
    return _settings_of(kind)


@cache
def _settings_of(kind: type) -> dict[str, Setting]:
    types = get_type_hints(kind)
    found = {}
    for f in dataclasses.fields(kind):
        if "help" not in f.metadata:
            continue
        kinds = get_args(types[f.name]) or (types[f.name],)
        one = next(t for t in kinds if t is not NoneType)
        known = {"key": f.name, **f.metadata}
        found[f.name] = Setting(f.name, kind=one, optional=NoneType in kinds, default=f.default, **known)
    return found


def keys_of(kind: type) -> dict[str, Setting]:
    """The settings of a dataclass by their keys."""
    return {s.key: s for s in settings_of(kind).values()}


def by_key(instance: Any) -> dict[str, Any]:
    """The values of all settings, by their keys."""
    return {s.key: getattr(instance, s.name) for s in settings_of(type(instance)).values()}


def problems_of(instance: Any) -> dict[str, str]:
    """What is wrong with the settings of an object, by field: one sentence each, of types and of ranges."""
    found = {s.name: s.problem(getattr(instance, s.name)) for s in settings_of(type(instance)).values()}
    return {name: problem for name, problem in found.items() if problem is not None}


def drafted(kind: type, values: Mapping[str, Any]) -> Any:
    """An object of a dataclass with these values of its settings, that nothing has looked at yet."""
    made: Any = object.__new__(kind)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def conflicts_left(conflicts: Iterable[tuple[tuple[str, ...], str]], wrong: Mapping[str, str]) -> list[str]:
    """Of sentences on several fields those that go by no field which is wrong by itself."""
    return [sentence for names, sentence in conflicts if not any(name in wrong for name in names)]


def _inside(value: float, interval: str) -> bool:
    found = _INTERVAL.fullmatch(interval)
    assert found is not None, f"{interval!r} is no interval"
    low, high = float(found[2]), float(found[3])
    above = value >= low if found[1] == "[" else value > low
    return above and (value <= high if found[4] == "]" else value < high)


def _is_a(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, float) or _is_whole(value)
    return _is_whole(value) if kind is int else isinstance(value, kind)


def _is_whole(value: object) -> bool:
    # Beyond 2**53 a whole number is no exact float any more, and no setting means anything there.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**53
