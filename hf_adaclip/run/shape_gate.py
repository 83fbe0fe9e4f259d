"""Where spectral range and agreement act by themselves: where weights are trained anew, and the range where it is worth its work.

Weights that were trained before keep their step as long as they keep near to what they were. Where they have moved by more than 4 % of
their size in 16 steps (`hf_adaclip.gradients.movement`) they are trained anew, as from scratch, and the range acts from there on; at 7 %
the agreement joins it. Alone it did harm at every rate. Why just there: model_cards/RESEARCH.md, entry 31.

By the count of operations, for a weight of small side m and large side n, and T rows (tokens) in a step:

    4 m^2 n + 34 m^3    the square, the product with its root, and 17 products of the small side (width 0)
    6 m n T             forward and backward of that weight

The quotient of the two sums is held against measured times in model_cards/spectral/. A step of few tokens on wide matrices is no place
for the range. On accelerators an average over steps needs products in float32, where those of forward and backward, and of a step alone,
are in bfloat16. By data sheets they take twice as long where torch may use TF32, and 15 times where not.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from hf_adaclip.gradients.movement import WINDOW
from hf_adaclip.gradients.newton_schulz import in_tf32
from hf_adaclip.gradients.transfer import HOST
from hf_adaclip.run.ranks import world_size
from hf_adaclip.run.rows import ForwardRows, rows_of

FAST: Final = {"spectral": 0.04, "agreement": 0.07}
"""Share of their size that loaded weights move in a window, above which that part acts on them."""
_ALONE: Final = (
    "the model was trained before, and there it does harm without the spectral range (set it to have it all the same)"
)
_NONE: Final = "no hidden matrix is trained"
_BEFORE: Final = "so it was decided in the run that this one goes on with"
_TRAINED: Final = {
    part: f"the model was trained before, and there it may do harm until weights move by {share:.0%} in {WINDOW} steps (set it to have "
    "it all the same)"
    for part, share in FAST.items()
}
MOST: Final = 2 / 3
"""Largest share of the matrices' own work that 'auto' lets it take."""


def how_fast(moved: float) -> str:
    """The way of a window in words."""
    return f"{moved * 100:.1f} % of their size in {WINDOW} steps"


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


class ShapeGate:
    """Decides whether spectral range and agreement act where they are on by themselves.

    In the first step, and once more in a model that was trained before: there both may do harm, and wait until its weights move fast. So
    they do where such weights join later. The range is closed where it is too much work, and looks at each step alone where an average is.

    Args:
        parts: Which of the two are on by themselves; what people have set acts in any case.
        memory: Whether the range has one.
        ranged: Whether there is a range, by itself or set.

    Attributes:
        spectral, agreement: Whether that part acts; None as long as nothing is decided.
        memory: Whether the range averages over steps.
        waiting: Parts that act once weights that were trained before move fast.
        empty: Whether both are closed because no matrix is trained, of a model that was trained before.
        why: Why a part does not, in words.
    """

    def __init__(self, parts: Collection[str], *, memory: bool, ranged: bool = True) -> None:
        self._parts, self._given_memory, self._ranged = parts, memory, ranged
        self._listeners: list[ForwardRows] = []
        self._begin()

    def _begin(self) -> None:
        self.memory = self._given_memory
        self.spectral: bool | None = None
        self.agreement: bool | None = None
        self.waiting: frozenset[str] = frozenset()
        self.why: dict[str, str] = {}
        self.empty = False
        self._shown: int | None = 0
        self._passed = 0
        self._counted = False

    @property
    def decided(self) -> bool:
        """Whether the first step has been."""
        return self.agreement is not None

    def sees(self, batch: Any, models: Sequence[Any]) -> None:
        """A micro-batch of the first step, as long as nothing is decided."""
        if self._shown is not None and not self._counted:
            rows = rows_of(batch, models)
            self._shown = None if rows is None else self._shown + rows

    def listen(self, models: Sequence[Any]) -> None:
        """Hear of what models are called with, for loops that show no batch."""
        if "spectral" in self._parts:
            self._listeners = [ForwardRows(self, model) for model in models]

    def remove(self) -> None:
        """Listen no longer."""
        for listener in self._listeners:
            listener.remove()
        self._listeners = []

    def passes(self, given: list[Any], models: Sequence[Any]) -> None:
        """A model is called with this, as long as nothing is decided."""
        self._passed += rows_of(given, models) or 0

    def decide(
        self,
        shapes: Sequence[tuple[int, int]],
        device: torch.device,
        group: Any,
        *,
        trained: bool,
        ranks_known: bool,
    ) -> None:
        """Decide, every rank alike.

        Args:
            shapes: Of the matrices that are trained.
            device: Where ranks can compare numbers.
            group: The process group of the ranks that train together.
            trained: Whether they were trained before.
            ranks_known: Whether the ranks are known.
        """
        self.remove()
        self._counted = True
        self.why = {}
        self.spectral = self.agreement = True
        if "spectral" in self._parts:
            self._weigh(shapes, device, group, ranks_known=ranks_known)
        if trained:
            self.wait(matrices=bool(shapes))

    def _weigh(
        self, shapes: Sequence[tuple[int, int]], device: torch.device, group: Any, *, ranks_known: bool
    ) -> None:
        """Whether the range is worth its work."""
        rows = self._shown or self._passed
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

    def wait(self, *, matrices: bool = True) -> None:
        """Weights that were trained before have joined those that are trained.

        Args:
            matrices: Whether the range has any to act on.
        """
        if self._ranged and not matrices:
            self.empty = True
            self.why |= {part: _NONE if part == "spectral" else _ALONE for part in self._parts}
            self._let(self._parts, act=False)
            return
        self.waiting |= {part for part in self._parts if getattr(self, part)}
        self.why |= {part: _TRAINED[part] for part in self.waiting}
        ranged = self._ranged and (self.spectral or "spectral" in self.waiting)
        if "agreement" in self.waiting and not ranged:
            self.waiting, self.agreement = self.waiting - {"agreement"}, False
            self.why["agreement"] = _ALONE
        self._let(self.waiting, act=False)

    def again(self) -> None:
        """Matrices have joined where there was none: the next step decides anew."""
        self.spectral = self.agreement = None
        self.why, self.empty = {}, False

    def moved(self, share: float) -> frozenset[str]:
        """Weights that were trained before have moved by this share of their size in a window; which parts act from now on for that."""
        found = frozenset(part for part in self.waiting if FAST[part] < share < math.inf)
        self._let(found, act=True)
        self.why = {part: why for part, why in self.why.items() if part not in found}
        self.waiting -= found
        return found

    def _let(self, parts: Collection[str], *, act: bool) -> None:
        for part in parts:
            setattr(self, part, act)

    def tensor(self) -> Tensor:
        """What a checkpoint keeps, once it is decided, shape `[5]`."""
        decided = [bool(self.spectral), bool(self.agreement), self.memory]
        decided += [part in self.waiting for part in FAST]
        return torch.tensor(decided, dtype=torch.float32, device=HOST)

    def restore(self, tensor: Tensor | None) -> None:
        """Go on from what `tensor` gave; from the beginning where there was nothing."""
        self._begin()
        if tensor is None:
            return
        self.remove()
        self.spectral, self.agreement, *later = (bool(x) for x in tensor.tolist())
        self.memory = self.memory and later[:1] == [True]  # older ones had none
        self.waiting = frozenset(part for part, waits in zip(FAST, later[1:], strict=False) if waits)  # nor waited
        closed = {part for part in self._parts if not getattr(self, part)}
        self.why = {part: _TRAINED[part] if part in self.waiting else _BEFORE for part in closed}
