"""Weights that were trained before: whether there are any among those that are trained, and how fast they move; the same on every rank."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_adaclip.gradients import Guards
from hf_adaclip.gradients.groups import named_parameters
from hf_adaclip.gradients.matrices import hidden_matrices
from hf_adaclip.gradients.movement import Movement
from hf_adaclip.gradients.provenance import loaded_weights
from hf_adaclip.run.ranks import world_size
from hf_adaclip.run.run import Run


class LoadedWeights:
    """Looked at only as long as something waits for them to move fast.

    Args:
        run: Knows the ranks.
        guards: The optimizers: what none of them has does not count.
        models: Gives the models.
    """

    def __init__(self, run: Run, guards: Guards, models: Callable[[], Sequence[Any]]) -> None:
        self._run, self._guards, self._models = run, guards, models
        self._movement: Movement | None = None
        self._none = False  # there are no weights to measure, until others join
        self._kept: Mapping[str, Tensor] = {}  # of a state that was loaded, as long as nothing was made of it

    def among(self, parameters: Sequence[Tensor]) -> bool:
        """Whether some of these were loaded, on any rank."""
        here = bool(self._of(parameters))
        if world_size() == 1 or self._run.ranks is None:
            return here
        answer = torch.tensor(float(here), dtype=torch.float32, device=parameters[0].device)
        self._agree(answer)
        return bool(answer.item())

    def watch(self) -> None:
        """From the present step on."""
        self.forget()
        self._begin()

    def forget(self) -> None:
        """What they have done so far; they are looked at anew from the next step on, if at all."""
        self._movement, self._kept, self._none = None, {}, False

    def step(self) -> float | None:
        """A step has been made: by which share they have moved, where that is known now (see `Movement.step`)."""
        if self._none:
            return None
        if self._movement is None:
            going_on = bool(self._kept)
            self._begin()
            if not going_on:
                return None
        if self._movement is None:
            return None
        share = self._movement.step(self._agree if world_size() > 1 else None)
        if self._movement.gone:
            self.forget()
        return share

    def tensors(self) -> Mapping[str, Tensor]:
        """What a checkpoint keeps."""
        return self._kept if self._movement is None else self._movement.tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave, once there is a step: then the models are there."""
        self._movement, self._kept, self._none = None, Movement.of_these(tensors), False

    def _begin(self) -> None:
        kept, self._kept = self._kept, {}
        models, parameters = self._models(), self._guards.parameters
        matrices = {id(p) for p in hidden_matrices(models)}
        named = {name: p for name, p in named_parameters(models).items() if id(p) in matrices}
        weights = {name: named[name] for name in Movement.names(kept) if name in named}
        if not weights or len(weights) < len(Movement.names(kept)):
            loaded = {id(p) for p in self._of(parameters)}
            # Nothing may tell any more which they are, in a model that was made anew and filled from a checkpoint.
            loaded = loaded or {id(p) for p in parameters if p.requires_grad}
            weights = {name: p for name, p in named.items() if id(p) in loaded}
        self._none = not weights
        if weights:
            self._movement = Movement(weights, delayed=not self._run.ops.on_host)
            self._movement.restore(kept)

    def _of(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        there = {id(p) for p in parameters}
        return [p for p in loaded_weights(self._models()) if id(p) in there]

    def _agree(self, number: Tensor) -> None:
        """The largest of all ranks; 0 where the ranks are not known."""
        ranks = self._run.ranks
        if ranks is None:
            number.fill_(0.0)
        else:
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=ranks.group)
