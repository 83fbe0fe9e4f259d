"""Where spectral range and agreement act by themselves: in models that are trained from scratch, and the range where it is worth its work.

By the count of operations, for a weight of small side m and large side n, and T rows (tokens) in a step:

    4 m^2 n + 34 m^3    the square, the product with its root, and 17 products of the small side (width 0)
    6 m n T             forward and backward of that weight

The quotient of the two sums is held against measured times in model_cards/spectral/. A step of few tokens on wide matrices is no place
for the range. On accelerators an average over steps needs products in float32, where those of forward and backward, and of a step alone,
are in bfloat16. By data sheets they take twice as long where torch may use TF32, and 15 times where not.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from hf_adaclip.gradients.newton_schulz import in_tf32
from hf_adaclip.gradients.provenance import trained_before
from hf_adaclip.gradients.transfer import HOST
from hf_adaclip.run.ranks import world_size

_TRAINED: Final = "the model was trained before, and there it may do harm (set it to have it all the same)"
MOST: Final = 2 / 3
"""Largest share of the matrices' own work that 'auto' lets it take."""


def share(shapes: Iterable[tuple[int, int]], rows: int) -> float:
    """The spectral range over forward and backward of these matrices, in operations.

    Args:
        shapes: Of the matrices.
        rows: What is multiplied by them in a step, over all micro-batches of this rank.
    """
    sides = [(min(s), max(s)) for s in shapes]
    own = sum(6 * m * n * rows for m, n in sides)
    return sum(4 * m * m * n + 34 * m**3 for m, n in sides) / own if own else 0.0


def slower(device: torch.device) -> float:
    """How much longer a product in float32 takes there than one of forward and backward (bfloat16 on accelerators)."""
    if device.type == "cpu":
        return 1.0
    return 2.0 if in_tf32(device) else 15.0


def rows_of(batch: Any, models: Sequence[Any]) -> int | None:
    """How many rows a micro-batch gives to the hidden matrices; None where that cannot be told.

    Token ids of shape `[batch, length]` are a row each, images `[batch, channels, height, width]` one per patch where the model has a
    `patch_size`, features `[batch, length, size]` one per position.
    """
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    tensors = [v for v in values if isinstance(v, Tensor)]
    patch = next(
        (p for m in models if isinstance(p := getattr(getattr(m, "config", None), "patch_size", None), int)), 0
    )
    # Labels are such tensors too, and no more than what they are for.
    counts = [v.numel() for v in tensors if v.dim() == 2 and not v.is_floating_point()]
    features = [v for v in tensors if v.is_floating_point()]
    counts += [v.shape[0] * (v.shape[2] // patch) * (v.shape[3] // patch) for v in features if v.dim() == 4 and patch]
    counts += [v.shape[:-1].numel() for v in features if v.dim() in (2, 3)]
    return max(counts, default=None)


class ShapeGate:
    """Decides once, in the first step, whether spectral range and agreement act where they are on by themselves.

    Neither does in a model that was trained before; there both may do harm. The range is closed where it is too much work, and looks at
    each step alone where an average is.

    Args:
        parts: Which of the two are on by themselves; what people have set acts in any case.
        memory: Whether the range has one.

    Attributes:
        spectral, agreement: Whether that part acts; None as long as nothing is decided.
        memory: Whether the range averages over steps.
        why: Why a part does not, in words; empty after a resumption.
    """

    def __init__(self, parts: Collection[str], *, memory: bool) -> None:
        self._parts, self.memory = parts, memory
        self.spectral: bool | None = None
        self.agreement: bool | None = None
        self.why: dict[str, str] = {}
        self._rows: int | None = 0

    @property
    def decided(self) -> bool:
        """Whether the first step has been."""
        return self.agreement is not None

    def sees(self, batch: Any, models: Sequence[Any]) -> None:
        """A micro-batch of the first step, as long as nothing is decided."""
        if self._rows is not None:
            rows = rows_of(batch, models)
            self._rows = None if rows is None else self._rows + rows

    def decide(
        self,
        models: Sequence[Any],
        shapes: Sequence[tuple[int, int]],
        device: torch.device,
        group: Any,
        *,
        ranks_known: bool,
    ) -> None:
        """Decide, every rank alike.

        Args:
            models: Those that are trained, as far as they are known.
            shapes: Of the matrices.
            device: Where ranks can compare numbers.
            group: The process group of the ranks that train together.
            ranks_known: Whether that is known.
        """
        trained = trained_before(models)
        self.why = dict.fromkeys(self._parts, _TRAINED) if trained else {}
        self.spectral, self.agreement = "spectral" not in self.why, "agreement" not in self.why
        if trained or "spectral" not in self._parts:
            return
        rows = self._rows or 0
        if world_size() > 1 and ranks_known:
            most = torch.tensor([float(rows)], dtype=torch.float64, device=device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=group)
            rows = int(most.item())
        elif world_size() > 1:
            return
        took = share(shapes, rows) if rows else 0.0
        if self.memory and took <= MOST < took * slower(device):
            self.memory = False
            self.why["memory"] = (
                f"an average over steps would take {took * slower(device):.1f} times the work of the matrices' own forward and backward "
                "pass in full float32 (`tf32=True` in the TrainingArguments makes it cheaper)"
            )
        if took > MOST:
            self.spectral = False
            self.why["spectral"] = (
                f"with {rows} tokens in a step it would take {took:.1f} times the work of the matrices' own forward and backward pass "
                "(`spectral_width=0` has it all the same)"
            )

    def tensor(self) -> Tensor:
        """What a checkpoint keeps, once it is decided, shape `[3]`."""
        decided = [bool(self.spectral), bool(self.agreement), self.memory]
        return torch.tensor(decided, dtype=torch.float32, device=HOST)

    def restore(self, tensor: Tensor) -> None:
        """Go on from what `tensor` gave."""
        self.spectral, self.agreement, *later = (bool(x) for x in tensor.tolist())
        self.memory = self.memory and later == [True]  # older ones had none
