"""Which parameter is which while the trainable ones come and go: layers that are frozen and unfrozen, adapters that are switched or added.

Everything that is kept per parameter (thresholds, rules, the distance estimate) goes by a parameter's place in the roster. A place
belongs to one tensor, by identity; where names are known, a tensor that is made anew under the same name takes over its place. Places of
tensors that rest are kept. What was never named and no longer exists loses its place.
"""

import weakref
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from hf_adaclip.errors import StateError, UnsupportedSetupError
from hf_adaclip.gradients.groups import named_parameters
from hf_adaclip.gradients.norms import Gradients

_NOWHERE: Final = torch.empty(0, dtype=torch.float32, device="cpu")
"""Stands where a parameter no longer exists."""
_AT_ONCE: Final = 4  # calls within which two turns of the same kind are no coincidence
_TO_AND_FRO: Final = 20


class Change(NamedTuple):
    """What has changed since the call before.

    Attributes:
        joined: Places of tensors that were never seen before.
        resting: How many that were seen before are not there now.
        kept: Per place, the place that the same tensor had before the change; -1 where there was none, or another tensor.
    """

    joined: tuple[int, ...]
    resting: int
    kept: tuple[int, ...]


class _Place:
    def __init__(self, name: str | None, tensor: Tensor | None) -> None:
        self.name = name
        self.ref = None if tensor is None else weakref.ref(tensor)

    @property
    def tensor(self) -> Tensor | None:
        return None if self.ref is None else self.ref()


class Roster:
    """The parameters that a run has met.

    Args:
        models: Where names are looked up; may be empty, and then nothing goes by names.
        known: Names of a state that was loaded, in their order: places that are kept for them.
        required: Whether all of these have to be there, because something is kept for each of them.

    Raises:
        StateError: The models lack some of the names that are required.
    """

    def __init__(self, models: Sequence[Any], known: Sequence[str] = (), *, required: bool = False) -> None:
        self._models = models
        there = named_parameters(models) if known else {}
        missing = [name for name in known if name not in there]
        if missing and models and required:
            raise StateError(
                f"`parameters` must be those that the state was written for ({len(known)} of them), but the model has no "
                f"{', '.join(missing[:3])}. Resume with the same model."
            )
        self._places = [_Place(name, there[name]) for name in known if name in there]
        self._ids: list[int] = []
        self._order: list[int] | None = None  # place of each parameter of the last call; None: as they came
        self._calls = self._turned = self._suspicious = 0
        self._witness: tuple[Any, Any, int] | None = None
        self._set: frozenset[int] = frozenset()
        self._held: list[Tensor] = []  # those of the last call: as long as they live, nobody else has their identity

    @property
    def parameters(self) -> list[Tensor]:
        """The tensor of every place; an empty one where it no longer exists."""
        return [_NOWHERE if p.tensor is None else p.tensor for p in self._places]

    @property
    def names(self) -> list[str] | None:
        """The name of every place; None when one of them is not known."""
        names = [p.name for p in self._places if p.name is not None]
        return names if len(names) == len(self._places) else None

    @property
    def restless(self) -> bool:
        """Whether the set has been another one in each of the last calls: most likely two sets that should not share a clipper."""
        return self._turned >= _TO_AND_FRO

    def place(self, gradients: Gradients) -> tuple[Gradients, list[int] | None, Change | None]:
        """The same gradients by place, the order in which they stand now, and what has changed.

        Returns:
            The gradients; per gradient its position in those that were given, None where nothing was moved; the change, None where the
            set is that of the call before.

        Raises:
            UnsupportedSetupError: Two sets take turns within one optimizer step.
        """
        self._calls += 1
        ids = [id(p) for p in gradients.parameters]
        change = None
        if ids != self._ids:
            change = self._settle(gradients.parameters, ids)
        else:
            self._turned = 0
        if self._order is None:
            return gradients, None, change
        places = [self._order[i] for i in gradients.present]
        order = sorted(range(len(places)), key=places.__getitem__)
        parameters = self.parameters
        for place, parameter in zip(self._order, gradients.parameters, strict=True):
            parameters[place] = parameter
        return Gradients(parameters, [places[i] for i in order], [gradients.tensors[i] for i in order]), order, change

    def remember(self, gradients: Gradients) -> None:
        """Called when the gradients are as clipping leaves them: if these are still there at the next call, it came too early."""
        if gradients.tensors:
            parameter, gradient = gradients.parameters[gradients.present[0]], gradients.tensors[0]
            self._witness = weakref.ref(parameter), weakref.ref(gradient), gradient._version

    def _settle(self, parameters: list[Tensor], ids: list[int]) -> Change | None:
        now = frozenset(ids)
        same = now == self._set
        self._held = []  # what only this has kept alive is gone now
        if self._set and not same:
            self._turned += 1
            if not now & self._set:
                self._refuse_two_sets()
        before = len(self._places)
        if same:  # in another order
            by_id = self._by_id()
            places, change = [by_id[i] for i in ids], None
        else:
            places, kept, joined = self._look_up(parameters)
            change = Change(tuple(joined), len(self._places) - len(places), tuple(kept)) if before else None
        self._ids, self._set, self._held = ids, now, parameters
        self._order = None if places == list(range(len(self._places))) else places
        return change

    def _by_id(self) -> dict[int, int]:
        return {id(t): i for i, p in enumerate(self._places) if (t := p.tensor) is not None}

    def _look_up(self, parameters: list[Tensor]) -> tuple[list[int], list[int], list[int]]:
        """Places of these parameters; makes new ones. Also where each place was before, and which are new."""
        name_of = {id(tensor): name for name, tensor in named_parameters(self._models).items()}
        gone = [p for p in self._places if p.name is None and p.tensor is None]
        anew = self._made_anew(parameters, gone)
        kept = list(range(len(self._places)))
        if gone and not anew:
            kept = [i for i, p in enumerate(self._places) if p not in gone]
            self._places = [self._places[i] for i in kept]
        heirs = iter(gone if anew else ())
        by_id = self._by_id()
        by_name = {p.name: i for i, p in enumerate(self._places) if p.name is not None}
        index_of = {id(p): i for i, p in enumerate(self._places)}
        places: list[int] = []
        joined: list[int] = []
        for parameter in parameters:
            place, name = by_id.get(id(parameter)), name_of.get(id(parameter))
            if place is None and name is not None and name in by_name:
                old = self._places[by_name[name]].tensor
                if old is None or id(old) not in name_of:
                    place = by_name[name]
                    kept[place] = -1
                    self._places[place] = _Place(name, parameter)
            if place is None and (heir := next(heirs, None)) is not None:
                place = index_of[id(heir)]
                kept[place] = -1
                self._places[place] = _Place(name, parameter)
            if place is None:
                place = len(self._places)
                self._places.append(_Place(name, parameter))
                kept.append(-1)
                joined.append(place)
            elif self._places[place].name is None:
                self._places[place].name = name
            places.append(place)
        return places, kept, joined

    def _made_anew(self, parameters: list[Tensor], gone: list[_Place]) -> bool:
        """Whether a whole unnamed set was replaced, as when a model is built anew for every task."""
        return bool(gone) and len(gone) == len(self._places) == len(parameters)

    def _refuse_two_sets(self) -> None:
        if self._witness is None:
            return
        parameter, gradient, version = self._witness[0](), self._witness[1](), self._witness[2]
        if parameter is None or gradient is None or parameter.grad is not gradient or gradient._version != version:
            return
        before, self._suspicious = self._suspicious, self._calls
        if before and self._calls - before <= _AT_ONCE:
            raise UnsupportedSetupError(
                "`clip_` must be called once per optimizer step with all its parameters, but two sets of parameters take turns here: "
                'their norms would be mixed into one range. Make one AdaptiveClipper for each of them, with `clip="guard"` where they '
                "share an optimizer; under `install`, which cannot tell them apart, keep the stock clipping."
            )
