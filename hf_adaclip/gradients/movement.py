"""How fast weights move: the way of so many steps, over the size of what moves.

    moved_t = |W_t - W_{t-16}| / |W_{t-16}|

over all given matrices together, on a sample of their coordinates (see `hf_adaclip.gradients.coordinates`).
"""

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from hf_adaclip.gradients.coordinates import grid_of, sample_of, spacing
from hf_adaclip.gradients.transfer import HOST, copy_into, moved, start_copy

WINDOW: Final = 16
"""Steps that the way is measured over."""
_CLOCK: Final = "moved_steps"
_SHARE: Final = "moved_share"
_PREFIX: Final = "moved."


class Movement:
    """Of some weights of a run.

    Args:
        weights: By name, at least one, each once. They may lie on several devices.
        delayed: Whether nobody is to wait for a measurement: it is read when the next window ends.

    Attributes:
        gone: Whether one of them is no longer there, as of the last look: others have taken their place.
    """

    def __init__(self, weights: Mapping[str, Tensor], *, delayed: bool) -> None:
        self._weights = {name: weakref.ref(w) for name, w in weights.items()}
        self.gone = False
        self._sizes = [w.numel() for w in weights.values()]
        every = spacing(sum(self._sizes))
        self._grids = [grid_of(size, every) for size in self._sizes]
        self._device, self._delayed = next(iter(weights.values())).device, delayed
        self._steps = 0
        self._from: list[Tensor] | None = None
        self._share: Tensor | None = None  # of the last window, where nobody has read it yet
        self._event = torch.Event(self._device) if self._device.type in ("cuda", "xpu") else None
        self._landing = torch.empty((), dtype=torch.float32, device=HOST, pin_memory=self._event is not None)

    @torch.no_grad()
    def begin(self) -> None:
        """A window begins with the weights as they are now."""
        self._from, self._steps = self._look(), 0

    @torch.no_grad()
    def step(self, agree: Callable[[Tensor], None] | None = None) -> float | None:
        """A step has been made since the last call, or since the beginning.

        Args:
            agree: Called with what this rank has found, float32, shape `[]`, to make it the same on every rank, in place.

        Returns:
            The share by which the weights moved in a window; None where none has ended, or it is not known yet.
        """
        self._steps += 1
        if self._steps < WINDOW:
            return None
        before, now = self._from, self._look()
        self._from, self._steps = now, 0
        known = self._read() if self._share is not None else None
        if before is not None and now is not None:
            way, size = (torch.stack(torch._foreach_norm(x)).norm() for x in (torch._foreach_sub(now, before), before))
            self._share = way / size
            if agree is not None:
                agree(self._share)
            self._land()
            if not self._delayed:
                known = self._read()
        return known

    @staticmethod
    def of_these(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those among the tensors of a checkpoint that are a movement's."""
        return {name: x for name, x in tensors.items() if name in (_CLOCK, _SHARE) or name.startswith(_PREFIX)}

    @staticmethod
    def names(tensors: Mapping[str, Tensor]) -> list[str]:
        """Of the weights that they are of."""
        return [name.removeprefix(_PREFIX) for name in tensors if name.startswith(_PREFIX)]

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: steps of the present window, where it began by weight, and what has not been read, shape `[]`."""
        kept = {} if self._share is None else {_SHARE: self._share}
        if self._from is not None:
            kept[_CLOCK] = torch.tensor(float(self._steps), dtype=torch.float32, device=HOST)
            kept |= {f"{_PREFIX}{name}": start for name, start in zip(self._weights, self._from, strict=True)}
        return kept

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave; where that was of other weights, a window begins now."""
        starts = [tensors.get(f"{_PREFIX}{name}") for name in self._weights]
        sizes = [math.prod(shape) for shape, _ in self._grids]
        if _CLOCK not in tensors or [None if s is None else s.numel() for s in starts] != sizes:
            self.begin()
            return
        parts = self._room()
        copy_into(parts, [s.reshape(p.shape) for s, p in zip(starts, parts, strict=True) if s is not None])
        self._from, self._steps = parts, int(tensors[_CLOCK].item())
        share = tensors.get(_SHARE)
        self._share = None if share is None else moved(share, self._device)
        self._land()

    def _land(self) -> None:
        if self._share is not None:
            start_copy(self._landing, self._share, awaited=self._event is not None)
            if self._event is not None:
                self._event.record()

    def _read(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        self._share = None
        return float(self._landing)

    def _room(self) -> list[Tensor]:
        sizes = [math.prod(shape) for shape, _ in self._grids]
        room = torch.empty(sum(sizes), dtype=torch.float32, device=self._device)
        return [part.view(shape) for part, (shape, _) in zip(torch.split(room, sizes), self._grids, strict=True)]

    def _look(self) -> list[Tensor] | None:
        """The sample; None where a weight is gone, or somebody has given it another size."""
        weights = [w for ref in self._weights.values() if (w := ref()) is not None]
        self.gone = len(weights) < len(self._sizes)
        if [w.numel() for w in weights] != self._sizes:
            return None
        parts = self._room()
        copy_into(parts, [sample_of(w.detach(), grid) for w, grid in zip(weights, self._grids, strict=True)])
        return parts
