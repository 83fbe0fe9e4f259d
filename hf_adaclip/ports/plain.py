"""What the clipper needs of a loop, and the loop that has no accelerator: it steps when it clips, and nothing is scaled."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hf_adaclip.errors import ConfigError
from hf_adaclip.run.ranks import RankCheck


class Slot(Protocol):
    """A place among the clippers of one loop: with several, each has a state file of its own."""

    @property
    def number(self) -> int:
        """Counted from 0 in the order in which the clippers were made."""


class Port(Protocol):
    """The few things about a loop that clipping depends on."""

    @property
    def how(self) -> str | None:
        """How the distributed setup is supported, in words."""

    @property
    def syncs_now(self) -> bool:
        """Whether this backward pass completes an accumulated gradient."""

    @property
    def has_scaler(self) -> bool:
        """Whether float16 gradients are scaled."""

    @property
    def loss_scale(self) -> Tensor | None:
        """The current loss scale, still on the device."""

    @property
    def models(self) -> Sequence[Any]:
        """The models that are known."""

    @property
    def ranks_known(self) -> bool:
        """Whether it says which ranks train together."""

    def rank_check(self) -> RankCheck | None:
        """Only where it is known who has to decide alike: on some ranks of a run there may be no clipper at all."""

    def only_optimizer(self) -> Sequence[Any]:
        """The one optimizer that must be the right one; else none."""

    def unscale(self, optimizers: Sequence[Any]) -> None:
        """Divide the loss scale out of the gradients of these optimizers, of all when there are none named."""

    def on_checkpoint(
        self, flush: Callable[[], None], save: Callable[[str], None], load: Callable[[str], None]
    ) -> tuple[Slot, list[Any]]:
        """Call back with the folder when the loop saves or loads its state; also handles to `remove()`."""

    def check_replaced(self) -> None:
        """Whether what `replace_clipping` put in place is still there."""

    def replace_clipping(
        self,
        clip: Callable[[Any], Tensor],
        take_threshold: Callable[[float], None],
        warn: Callable[[str], None],
    ) -> contextlib.AbstractContextManager[None]:
        """Answer the loop's own call for clipping while the context is open."""


class OnlySlot:
    """The place of a clipper that nobody else has state files beside."""

    number = 0


class PlainLoop:
    """A loop of plain PyTorch.

    Args:
        models: What the user says is trained.
    """

    how: str | None = None
    has_scaler = ranks_known = False
    syncs_now = True
    loss_scale: Tensor | None = None

    def __init__(self, models: Sequence[Any] = ()) -> None:
        self.models = models

    def rank_check(self) -> RankCheck | None:
        groups = [model.process_group for model in self.models if isinstance(model, DistributedDataParallel)]
        return RankCheck(groups[0]) if groups else None

    def only_optimizer(self) -> Sequence[Any]:
        return ()

    def unscale(self, optimizers: Sequence[Any]) -> None:
        """Nothing: a loop with a `GradScaler` of its own calls `scaler.unscale_` before `clip_`."""

    def on_checkpoint(
        self, flush: Callable[[], None], save: Callable[[str], None], load: Callable[[str], None]
    ) -> tuple[Slot, list[Any]]:
        return OnlySlot(), []

    def check_replaced(self) -> None:
        """Nothing was put in place."""

    def replace_clipping(
        self,
        clip: Callable[[Any], Tensor],
        take_threshold: Callable[[float], None],
        warn: Callable[[str], None],
    ) -> contextlib.AbstractContextManager[None]:
        raise ConfigError("`accelerator` must be given to AdaptiveClipper before `install`, but is None instead.")
