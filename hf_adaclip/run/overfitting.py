"""When data is learned by heart: then a rate above the given one overfits, and the pace goes back to 1 for good.

Two signs, each by the mean training loss of the last steps:

    evaluation   its loss is above its best, by a tenth once or by a fiftieth twice in a row, while the training loss is below what it was
                 at that best
    epoch        the training loss falls by more than a tenth as an epoch begins, beside what it was about to fall anyway: what has been
                 seen before is known better than what had not. Not where the last evaluation was the best so far

Source: this package; model_cards/pace/README.md has the runs.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from hf_adaclip.gradients.transfer import HOST

WINDOW: Final = 50
"""Steps over which losses are averaged; in shorter epochs, a third of one."""
_FEWEST: Final = 5
_ONCE: Final = 1.1
_TWICE: Final = 1.02
_DROP: Final = 0.1
_SURE: Final = 4.0
"""Standard errors by which the fall has to be beyond chance."""


class OverfitWatch:
    """Hears of training losses, epochs and evaluations. The host reads losses once per epoch and once per evaluation.

    Attributes:
        found: Why the data counts as learned by heart; None as long as it does not.
    """

    def __init__(self) -> None:
        self.found: str | None = None
        self._losses: deque[Any] = deque(maxlen=3 * WINDOW)
        self._steps = self._epoch = 0
        self._before: tuple[float, float, float, float] | None = None
        self._window = WINDOW
        self._best = self._loss_at_best = math.inf
        self._above = 0
        self._improves = False

    def add(self, loss: Any) -> None:
        """The training loss of a step, as the run's kind of number; NaN where it is not known."""
        if self.found is not None:
            return
        self._losses.append(loss)
        self._steps += 1
        if self._before is not None and self._steps == self._window:
            self._compare(self._before)
            self._before = None

    def begin_epoch(self) -> None:
        """Data that has been seen is about to be seen again; or, the first time, not yet."""
        length, self._steps, self._epoch = self._steps, 0, self._epoch + 1
        if self.found is not None or self._epoch == 1 or length < 3 * _FEWEST:
            self._before = None
            return
        self._window = min(WINDOW, length // 3)
        last = self._read(2 * self._window)
        old, new = last[: self._window], last[self._window :]
        self._before = None if len(new) < self._window else (*_mean_and_error(old), *_mean_and_error(new))

    def evaluated(self, loss: float) -> None:
        """The loss on data that is not trained on."""
        if self.found is not None or not math.isfinite(loss):
            return
        recent = [x for x in self._read(WINDOW) if math.isfinite(x)]
        training = sum(recent) / len(recent) if recent else math.nan
        self._improves = loss < self._best
        if self._improves:
            self._best, self._loss_at_best, self._above = loss, training, 0
            return
        rises = loss > _TWICE * self._best and training < self._loss_at_best
        self._above = self._above + 1 if rises else 0
        if rises and (self._above > 1 or loss > _ONCE * self._best):
            self.found = (
                f"The evaluation loss was {self._best:.4g} at best and is {loss:.4g}, while the training loss fell from "
                f"{self._loss_at_best:.4g} to {training:.4g}."
            )

    def _compare(self, before: tuple[float, float, float, float]) -> None:
        if self._improves:  # before the host waits for losses
            return
        old, _, new, error = before
        now, error_now = _mean_and_error(self._read(self._window))
        expected = new - max(old - new, 0.0)
        drop = expected - now
        if drop > _DROP * abs(new) and drop > _SURE * math.hypot(error, error_now):
            self.found = f"The training loss fell from {new:.4g} to {now:.4g} as an epoch began."

    def _read(self, count: int) -> list[float]:
        last = list(self._losses)[-count:]
        if not last or not isinstance(last[0], Tensor):
            return [float(x) for x in last]
        numbers: list[float] = torch.stack(last).tolist()
        return numbers

    def keep(self) -> Callable[[], None]:
        """What puts back what is known now. Epochs that have begun since stay begun, and that boundary is not judged."""
        known = {**vars(self), "_losses": self._losses.copy()}

        def put_back() -> None:
            epoch = self._epoch
            vars(self).update({**known, "_losses": known["_losses"].copy()})
            if epoch != self._epoch:
                self._epoch, self._steps, self._before = epoch, 0, None

        return put_back

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def tensor(self) -> Tensor:
        """What a checkpoint keeps: float64, shape `[6]`. Losses are not kept: a boundary right after a resumption is not judged."""
        known = math.isfinite(self._best) and math.isfinite(self._loss_at_best)
        best = [self._best, self._loss_at_best] if known else [0.0, 0.0]
        values = [float(self.found is not None), float(known), *best, float(self._above), float(self._epoch)]
        return torch.tensor(values, dtype=torch.float64, device=HOST)

    def restore(self, tensor: Tensor) -> None:
        """Go on from what `tensor` gave."""
        found, known, best, loss_at_best, above, epoch = tensor.tolist()
        self.found = "That was found before the run was resumed." if found else None
        self._best, self._loss_at_best = (best, loss_at_best) if known else (math.inf, math.inf)
        self._above, self._epoch = int(above), int(epoch)


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error; NaN where a value is not finite, which no comparison lets through."""
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(variance / len(values)) if variance == variance else math.nan
