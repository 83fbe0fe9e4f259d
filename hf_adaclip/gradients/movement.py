"""How fast weights move: the way of so many steps, over the size of what moves.

    moved_t = |W_t - W_{t-16}| / |W_{t-16}|

over all given matrices together, on a sample of their coordinates (see `hf_adaclip.gradients.coordinates`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from hf_adaclip.gradients.coordinates import grid_of, sample_of, spacing
from hf_adaclip.gradients.transfer import HOST, copy_into, moved, start_copy

WINDOW: Final = 16
"""Steps that the way is measured over."""
_FROM: Final = "moved_from"
_SHARE: Final = "moved_share"


class Movement:
    """Of some weights of a run, looked at once in `WINDOW` steps.

    Args:
        weights: At least one, each once. They may lie on several devices.
        delayed: Whether nobody is to wait for a measurement: it is read when the next window ends.
    """

    def __init__(self, weights: Sequence[Tensor], *, delayed: bool) -> None:
        self._weights = list(weights)
        every = spacing(sum(w.numel() for w in self._weights))
        self._grids = [grid_of(w.numel(), every) for w in self._weights]
        self._device, self._delayed = self._weights[0].device, delayed
        self._from: Tensor | None = None
        self._share: Tensor | None = None  # of the last window, where nobody has read it yet
        self._event = torch.Event(self._device) if self._device.type in ("cuda", "xpu") else None
        self._landing = torch.empty((), dtype=torch.float32, device=HOST, pin_memory=self._event is not None)

    @torch.no_grad()
    def begin(self) -> None:
        """A window begins with the weights as they are now."""
        self._from = self._look()

    @torch.no_grad()
    def end(self, agreed: Any = None) -> float | None:
        """A window ends, and the next one begins.

        Args:
            agreed: Called with what this rank has found, float32, shape `[]`, to be made the same on every rank, in place.

        Returns:
            The share by which the weights have moved; None where it is not known yet.
        """
        before, now = self._from, self._look()
        self._from = now
        waiting = self._read() if self._share is not None else None
        if before is not None:
            share = torch.linalg.vector_norm(now - before) / torch.linalg.vector_norm(before)
            if agreed is not None:
                agreed(share)
            self._share = share
            start_copy(self._landing, share, awaited=self._event is not None)
            if self._event is not None:
                self._event.record()
            if not self._delayed:
                return self._read()
        return waiting

    @staticmethod
    def of_these(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those among the tensors of a checkpoint that are a movement's."""
        return {name: tensors[name] for name in (_FROM, _SHARE) if name in tensors}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: where the present window began, shape `[count]`, and what has not been read, shape `[]`."""
        kept = {_FROM: self._from, _SHARE: self._share}
        return {name: value for name, value in kept.items() if value is not None}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave; where it gave nothing that fits, from the next window on."""
        start, share = tensors.get(_FROM), tensors.get(_SHARE)
        fits = start is not None and start.numel() == sum(math.prod(shape) for shape, _ in self._grids)
        self._from = moved(start, self._device).to(torch.float32).clone() if fits and start is not None else None
        self._share = moved(share, self._device) if fits and share is not None else None
        if self._share is not None:
            self._landing.copy_(self._share)
            if self._event is not None:
                self._event.record()

    def _read(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        self._share = None
        return float(self._landing)

    def _look(self) -> Tensor:
        sizes = [math.prod(shape) for shape, _ in self._grids]
        room = torch.empty(sum(sizes), dtype=torch.float32, device=self._device)
        parts = [part.view(shape) for part, (shape, _) in zip(torch.split(room, sizes), self._grids, strict=True)]
        copy_into(parts, [sample_of(w.detach(), grid) for w, grid in zip(self._weights, self._grids, strict=True)])
        return room
