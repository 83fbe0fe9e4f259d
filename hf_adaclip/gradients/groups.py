"""Which gradients are judged together: all of them, each tensor, each module, or what patterns on the parameters' names say."""

import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers.numerics.ops import Ops, Value
from hf_adaclip.errors import ConfigError
from hf_adaclip.gradients.norms import Gradients
from hf_adaclip.gradients.observe import to_value
from hf_adaclip.gradients.transfer import moved

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


class Grouping(NamedTuple):
    """A partition of the trainable parameters; every group has one norm.

    Attributes:
        names: Of the groups: of a parameter, of a module, a pattern, or "rest".
        member_of: Per parameter, its group.
        parts: In the order of the groups, which pattern of `parameter_rules` they come from (None: from none) and how many they are.
    """

    names: tuple[str, ...]
    member_of: tuple[int, ...]
    parts: tuple[tuple[str | None, int], ...]


def named_parameters(models: Iterable[Any]) -> dict[str, Tensor]:
    """All parameters of these models by name, without what wrappers put before it; of two with one name the second gets a number."""
    tensors: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    for model in models:
        for given, parameter in model.named_parameters():
            if id(parameter) in tensors:
                continue
            tensors[id(parameter)] = parameter
            name, number = _bare(given), 1
            while name in found:
                number += 1
                name = f"{_bare(given)} ({number})"
            found[name] = parameter
    return found


def _bare(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "") if wrapper.startswith("_") else name.removeprefix(wrapper)
    return name


def group(
    config: AdaptiveClipConfig, count: int, names: Sequence[str] | None, everything: Sequence[str] = ()
) -> Grouping:
    """Group the parameters as the config says.

    Args:
        config: `granularity` and `parameter_rules`.
        count: Number of parameters.
        names: Their names, where they are known.
        everything: Names of all parameters of the model; a pattern may match one that is frozen now and trained later.

    Raises:
        ConfigError: Names are needed and not known, or a pattern matches no parameter.
    """
    rules = config.parameter_rules or {}
    if rules or config.works_on == "module":
        names = _known(names, "`parameter_rules`" if rules else "`granularity='module'`")
    elif names is None:
        names = [f"tensor {i}" for i in range(count)]
    _check_patterns(rules, everything or names)

    rule_of = [next((r for r in rules if fnmatch.fnmatchcase(name, r)), None) for name in names]
    groups: list[str] = []
    parts: list[tuple[str | None, int]] = []
    member_of = [0] * len(names)
    for rule in (None, *rules):
        begin, known = len(groups), {}  # type: int, dict[str, int]
        for i, name in enumerate(names):
            if rule_of[i] == rule:
                label = _label(config.works_on, name, rule)
                if label not in known:
                    known[label] = len(groups)
                    groups.append(label)
                member_of[i] = known[label]
        if len(groups) > begin:
            parts.append((rule, len(groups) - begin))
    return Grouping(tuple(groups), tuple(member_of), tuple(parts))


def excluded(
    config: AdaptiveClipConfig, names: Sequence[str] | None, everything: Sequence[str] = ()
) -> frozenset[int]:
    """Positions of the parameters that `parameter_rules` exclude, where rules can do nothing else.

    Raises:
        ConfigError: The names are not known, or a pattern matches no parameter.
    """
    rules = config.parameter_rules or {}
    if not rules:
        return frozenset()
    names = _known(names, "`parameter_rules`")
    _check_patterns(rules, everything or names)
    return frozenset(i for i, name in enumerate(names) if any(fnmatch.fnmatchcase(name, rule) for rule in rules))


def _known(names: Sequence[str] | None, what: str) -> Sequence[str]:
    if names is None:
        raise ConfigError(
            f"`model` must be the one whose parameters are clipped where names matter ({what}), but they are not known instead. "
            "Pass it as `model=`, after it was wrapped or sharded."
        )
    return names


def _label(granularity: str, name: str, rule: str | None) -> str:
    if granularity == "global":
        return rule or "rest"
    return name if granularity == "tensor" else name.rpartition(".")[0]


def _check_patterns(rules: Iterable[str], names: Sequence[str]) -> None:
    problems = []
    taken: set[str] = set()
    for rule in rules:
        matches = {name for name in names if fnmatch.fnmatchcase(name, rule)}
        if not matches:
            problems.append(
                f"`parameter_rules` must have patterns that match parameters of the model, but {rule!r} matches none instead. "
                f"{_what_would_match(rule, names)}"
            )
        elif matches <= taken:
            problems.append(
                f"`parameter_rules` must have patterns that add something, but all {len(matches)} matches of {rule!r} belong to earlier "
                "patterns already. The first match counts: put the narrower pattern first."
            )
        taken |= matches
    if problems:
        raise ConfigError(problems)


def _what_would_match(rule: str, names: Sequence[str]) -> str:
    """A wider pattern that matches something (wrappers such as PEFT's put a prefix before every name), or else names that are near."""
    core = rule.strip("*.")
    for wider in (f"*{rule}", f"{rule}*", f"*{rule}*", f"*{core}*") if core else ():
        count = sum(fnmatch.fnmatchcase(name, wider) for name in names)
        if count:
            first = next(name for name in names if fnmatch.fnmatchcase(name, wider))
            return f"{wider!r} matches {count} ({first}{', ...' if count > 1 else ''})."
    near = difflib.get_close_matches(core, names, n=3, cutoff=0.3) or list(names[:3])
    return f"Names look like {', '.join(near)}."


def idle_rules(rules: Mapping[str, Any], names: Sequence[str], everything: Sequence[str]) -> list[str]:
    """What `parameter_rules` do not do, in sentences: patterns whose parameters are all frozen, and rules that leave nothing to clip.

    Args:
        rules: By pattern.
        names: Those of the trainable parameters.
        everything: Those of all parameters of the model.
    """
    said = []
    for rule in rules:
        frozen = [name for name in everything if fnmatch.fnmatchcase(name, rule)]
        if frozen and not any(fnmatch.fnmatchcase(name, rule) for name in names):
            said.append(
                f"the pattern {rule!r} of `parameter_rules` does nothing as long as all {len(frozen)} of its parameters are frozen "
                f"({frozen[0]}, as in LoRA the weights of the base model)."
            )
    first = [next((r for r in rules if fnmatch.fnmatchcase(name, r)), None) for name in names]
    if names and all(rule is not None and rules[rule] == "exclude" for rule in first):
        said.append(f"`parameter_rules` exclude all {len(names)} trainable parameters: nothing is clipped.")
    return said


class GroupNorms:
    """Norms by group, NaN where a group has no gradient: a fixed shape while gradients come and go.

    Args:
        grouping: Who belongs together.
    """

    def __init__(self, grouping: Grouping) -> None:
        self._member_of = np.array(grouping.member_of)
        self._size = len(grouping.names)  # a group may be without a member: one whose parameters no longer exist
        self._single = len(set(grouping.member_of)) == len(grouping.member_of)
        self._plain = grouping.member_of == tuple(range(self._size))
        self._present: list[int] | None = None
        self._index: Any = None
        self._absent: Any = None

    def spread(self, gradients: Gradients, norms: Tensor, finite: Value, ops: Ops) -> Value:
        """Norms by group.

        Args:
            gradients: The gradients of this step.
            norms: Their norms, shape `[len(gradients.tensors)]`.
            finite: Bool, whether the global norm is finite. One tensor that is not skips the whole step, so then no group may
                learn from it and every norm is NaN.
            ops: The kind of numbers wanted.

        Returns:
            float32, shape `[number of groups]`.
        """
        nan = ops(math.nan)
        values = ops.where(finite, to_value(norms, ops), nan)
        if self._plain and len(gradients.present) == len(gradients.parameters):
            return values
        places = self._places(gradients, norms.device, ops)
        if self._single:
            full = ops.full((self._size,), math.nan)
            full[places] = values
            return full
        return ops.where(self._absent, nan, _added(values, places, self._size))

    def gather(self, gradients: Gradients, values: Value, device: torch.device, ops: Ops) -> Value:
        """Of one value per group, that of each gradient of this step."""
        if self._plain and len(gradients.present) == len(gradients.parameters):
            return values
        return values[self._places(gradients, device, ops)]

    def _places(self, gradients: Gradients, device: torch.device, ops: Ops) -> Any:
        if self._present != gradients.present:
            self._present = gradients.present
            places = self._member_of[gradients.present]
            absent = ~np.isin(np.arange(self._size), places)
            on_host = (places, absent)
            self._index, self._absent = (
                on_host if ops.on_host else (moved(torch.from_numpy(a), device) for a in on_host)
            )
        return self._index


def _added(norms: Value, places: Any, size: int) -> Value:
    """L2 norms of groups from those of their members, added up in float64 so that the order of a device does not matter."""
    if isinstance(norms, Tensor):
        squares = torch.zeros(size, dtype=torch.float64, device=norms.device)
        return squares.index_add_(0, places, norms.double().square()).sqrt().float()
    sums = np.zeros(size)
    np.add.at(sums, places, np.square(np.asarray(norms, dtype=np.float64)))
    return np.sqrt(sums).astype(np.float32)
