"""When data is learned by heart: then a rate above the given one overfits, and the pace goes back to 1 for good.

Two signs, each by the mean training loss of the last steps:

    evaluation   its loss is above its best, by a tenth once or by a fiftieth twice in a row, while the training loss is below what it was
                 at that best; not in the first epoch, whose data nobody has seen: there it may be of other data than is trained on
    epoch        the training loss falls by more than a tenth as an epoch begins, beside what it falls anyway, by the steps before and the
                 steps after: what has been seen before is known better than what had not. Not where the last evaluation was the best so
                 far

Where epochs are too short for either to be told by their losses, and no evaluation gets better, it counts as learned from the second on.

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
_SHORT: Final = 3 * _FEWEST
"""Steps below which an epoch has too few losses to be judged by."""
_ONCE: Final = 1.1
_TWICE: Final = 1.02
_DROP: Final = 0.1
_OF_BEFORE: Final = 6
"""Numbers in a checkpoint of before losses were kept."""
_LIKELY: Final = 2.0
"""Standard errors by which losses have to fall within a window for that to count as their fall."""
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
        self._steps = self._epoch = self._longest = 0
        self._before: tuple[float, float, float, float] | None = None
        self._window = WINDOW
        self._first = self._best = self._loss_at_best = math.inf
        self._above = 0
        self._improves = self._partial = False

    def add(self, loss: Any) -> None:
        """The training loss of a step, as the run's kind of number; NaN where it is not known."""
        if self.found is not None:
            return
        self._losses.append(loss)
        self._steps += 1
        if self._before is not None and self._steps == self._window:
            self._compare(self._before)
            self._before = None

    def pass_over(self) -> None:
        """A step of this epoch is left out, so that its length says nothing."""
        self._partial = True

    def begin_epoch(self) -> None:
        """Data that has been seen is about to be seen again; or, the first time, not yet."""
        length, self._steps, self._epoch = self._steps, 0, self._epoch + 1
        self._longest = max(self._longest, length)
        partial, self._partial, self._before = self._partial, False, None
        if self.found is not None or self._epoch == 1:
            return
        if length < _SHORT:
            if length and self._longest < _SHORT and not (self._improves or partial):
                self.found = (
                    f"Epochs of {self._longest} steps are too short to tell by their losses what is known already, and no evaluation gets "
                    "better."
                )
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
        self._first = loss if self._first == math.inf else self._first
        self._improves = loss < self._best
        if self._improves:
            # Before the first step there is no training loss, and any that follows counts as lower.
            self._best, self._loss_at_best, self._above = loss, training if recent else math.inf, 0
            return
        if self._epoch == 1:  # nothing has been seen twice
            return
        # Of a loss that may be below 0 its level says nothing: there a part of the way it has come counts, if that is more.
        scale = self._best if self._best > 0 else max(abs(self._best), self._first - self._best)
        higher = loss - self._best
        rises = higher > (_TWICE - 1) * scale > 0 and training < self._loss_at_best
        self._above = self._above + 1 if rises else 0
        if rises and (self._above > 1 or higher > (_ONCE - 1) * scale):
            known = self._loss_at_best < math.inf
            fell = f"the training loss fell from {self._loss_at_best:.4g} to" if known else "the training loss is"
            self.found = (
                f"The evaluation loss was {self._best:.4g} at best and is {loss:.4g}, while {fell} {training:.4g}."
            )

    def _compare(self, before: tuple[float, float, float, float]) -> None:
        if self._improves:  # before the host waits for losses
            return
        old, _, new, error = before
        losses = self._read(self._window)
        now, error_now = _mean_and_error(losses)
        expected = new - max(old - new, _fall_of(losses), 0.0)
        drop = expected - now
        if drop > _DROP * abs(new) and drop > _SURE * math.hypot(error, error_now):
            self.found = f"The training loss fell from {new:.4g} to {now:.4g} as an epoch began."

    def _read(self, count: int) -> list[float]:
        last = list(self._losses)[-count:]
        there = [x for x in last if isinstance(x, Tensor)]  # those of before a resumption are numbers
        read = iter(torch.stack(there).tolist() if there else ())
        return [float(next(read) if isinstance(x, Tensor) else x) for x in last]

    def keep(self) -> Callable[[], None]:
        """What puts back what is known now. Epochs that have begun since stay begun, and that boundary is not judged."""
        known = {**vars(self), "_losses": self._losses.copy()}

        def put_back() -> None:
            epoch = self._epoch
            vars(self).update({**known, "_losses": known["_losses"].copy()})
            self._partial = True
            if epoch != self._epoch:
                self._epoch, self._steps, self._before = epoch, 0, None

        return put_back

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def tensor(self) -> Tensor:
        """What a checkpoint keeps: finite numbers, float64, shape `[18 + 2 n]`, with n losses and for each whether it is known."""
        before = self._before if self._before is not None and all(map(math.isfinite, self._before)) else None
        losses = self._read(3 * WINDOW)
        values = [
            *(float(self.found is not None), *_known(self._best), *_known(self._loss_at_best), *_known(self._first)),
            *map(float, (self._above, self._epoch, self._improves, self._steps, self._window, self._longest)),
            *(float(before is not None), *(before or (0.0,) * 4)),
            *(float(math.isfinite(x)) for x in losses),
            *(x if math.isfinite(x) else 0.0 for x in losses),
        ]
        return torch.tensor(values, dtype=torch.float64, device=HOST)

    def restore(self, tensor: Tensor) -> None:
        """Go on from what `tensor` gave, here or before it kept losses."""
        values = iter(tensor.tolist())
        vars(self).update(vars(OverfitWatch()))
        self.found = "That was found before the run was resumed." if next(values) else None
        self._partial = True  # a loop that goes on in the middle of an epoch may begin it again
        if len(tensor) == _OF_BEFORE:
            known, best, loss_at_best, above, _ = values
            self._best, self._loss_at_best = (best, loss_at_best) if known else (math.inf, math.inf)
            self._first, self._above, self._epoch = self._best, int(above), 1  # so the next one is not the first
            return
        self._best, self._loss_at_best, self._first = (
            number if known else math.inf for known, number in [(next(values), next(values)) for _ in range(3)]
        )
        whole = [int(next(values)) for _ in range(6)]
        self._above, self._epoch, improves, self._steps, self._window, self._longest = whole
        self._improves = bool(improves)
        there, *before = (next(values) for _ in range(5))
        self._before = (before[0], before[1], before[2], before[3]) if there else None
        rest = list(values)
        known, losses = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        self._losses.extend(x if there else math.nan for there, x in zip(known, losses, strict=True))


def _known(number: float) -> tuple[float, float]:
    """Whether it is finite, and the number."""
    return (1.0, number) if math.isfinite(number) else (0.0, 0.0)


def _fall_of(losses: list[float]) -> float:
    """By how much they fall over as many steps as they are, where that is more than chance; 0 where not."""
    half = len(losses) // 2
    (first, error), (second, error_of_second) = _mean_and_error(losses[:half]), _mean_and_error(losses[half:])
    return 2 * (first - second) if first - second > _LIKELY * math.hypot(error, error_of_second) else 0.0


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error; NaN where a value is not finite, which no comparison lets through."""
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(variance / len(values)) if variance == variance else math.nan
