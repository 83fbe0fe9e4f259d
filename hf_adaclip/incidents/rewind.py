"""Going back: snapshots of a run while it is well, and the newest good one put back once it is in trouble.

Trouble is an event of kind `trouble` (the limits of the settings), or a rule on incidents that tells of spoilt weights. A spike that was
clipped, or a step that was left out, is none: nothing of it has reached the weights. Nor is a norm that grows slowly: no stretch of data is
to blame for it.

When it began, `onset`, is before it is found: a loss has to stay high for `divergence_steps` or `incident_steps` steps. Which snapshot is
good:

    good(s)  <=>  step of s <= onset - MARGIN          the averages of losses lag behind them; or s is from where the run began
    kept     =    1 + ceil((longest lag + MARGIN + steps until rows are read) / snapshot_steps), at least 2

so one of those that are kept is always old enough. What is put back is as it was; what goes by the number of the step (schedules, logs,
the data) goes on. So it is as if the steps from the snapshot on had been left out from the start, bit for bit, unless random numbers of
this process decide on the data: a collator that draws some for the batch that is fetched ahead, or a sampler that orders a new epoch by
them.

A snapshot takes 12 bytes per trained parameter with AdamW in float32. Of 50 million parameters that is 604 MB, copied in 0.45 s and put
back in 0.09 s by one CPU thread (median of five, 2026-11-29). On an accelerator the host waits once for the rows of the ledger, and not for
the copy. No other step copies or reads anything.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.errors import TrainingTroubleError
from hf_adaclip.incidents.capture import IncidentCapture
from hf_adaclip.incidents.rules import Finding
from hf_adaclip.incidents.snapshot import (
    PutBack,
    check_optimizer,
    check_weights,
    keep_optimizer,
    keep_random,
    keep_stateful,
    keep_weights,
)
from hf_adaclip.run.events import ClipEvent
from hf_adaclip.run.points import Point, Rewound
from hf_adaclip.run.ranks import rank, shared_device, world_size
from hf_adaclip.run.ring import LOOK_EVERY
from hf_adaclip.run.run import Run

logger = logging.getLogger(__name__)

MARGIN: Final = 10
"""Steps before the onset of trouble that are not trusted either."""
_READ_LATE: Final = 2 * LOOK_EVERY


class Trouble(NamedTuple):
    """What a run goes back for.

    Attributes:
        step: At which it was found.
        onset: From which on nothing is trusted.
        reason: In words.
    """

    step: int
    onset: int
    reason: str


class Snapshot(NamedTuple):
    """A moment to go back to.

    Attributes:
        point: The controller.
        trained: The tensors that are trained, by id: with others it is not the same run any more.
        put_back: All the rest.
        size: Bytes.
        first: Whether it is from where the run began.
    """

    point: Point
    trained: frozenset[int]
    put_back: Sequence[PutBack]
    size: int
    first: bool


class Rewinder:
    """Takes snapshots of one run, and goes back.

    Args:
        config: The settings; `on_trouble` is 'rewind'.
        run: What decides.
        capture: Who judges incidents.
        models: Gives what is trained.
        optimizers: Gives the optimizers.
        keepers: What else is kept: each gives what puts it back.

    Attributes:
        rewound: What the last call of `look` has undone; None where it has not.
        history: All that was undone.
        stop: Ends the run in order; None where an exception has to.
        elsewhere: Gives a moment that is not younger than a step, where no snapshot is; a loop that writes checkpoints has one.
    """

    def __init__(
        self,
        config: AdaptiveClipConfig,
        run: Run,
        capture: IncidentCapture,
        models: Callable[[], Sequence[Any]],
        optimizers: Callable[[], Sequence[torch.optim.Optimizer]],
        keepers: Sequence[Callable[[], PutBack]] = (),
    ) -> None:
        self._config, self._run, self._capture = config, run, capture
        self._models, self._optimizers, self.keepers = models, optimizers, list(keepers)
        longest = max(config.divergence_steps if config.divergence_spreads > 0 else 0, config.incident_steps)
        kept = 1 + math.ceil((longest + MARGIN + _READ_LATE) / config.snapshot_steps)
        self._snapshots: deque[Snapshot] = deque(maxlen=max(kept, 2))
        self._trouble: Trouble | None = None
        self._taken: int | None = None
        self.rewound: Rewound | None = None
        self.history: list[Rewound] = []
        self.stop: Callable[[TrainingTroubleError], None] | None = None
        self.elsewhere: Callable[[int], Snapshot | None] | None = None

    # -- trouble -------------------------------------------------------------------------------------------------

    def hear(self, event: ClipEvent) -> None:
        """An event of the run."""
        if event.kind == "trouble":
            lag = self._config.divergence_steps if event.code == "TROUBLE_DIVERGENCE" else 0
            self._note(Trouble(event.step, event.step - lag, event.reason))

    def judge(self, step: int, finding: Finding) -> None:
        """What a rule on incidents says of a step."""
        if finding.lasts:
            self._note(Trouble(step, step - finding.lasts, finding.sentence))

    def _note(self, trouble: Trouble) -> None:
        if self._taken is None:
            self._run.alerts.warn_once(
                "there is trouble, and no snapshot to go back to: the loop does not call `snapshot` of the clipper after its steps."
            )
        if self._trouble is None or trouble.onset < self._trouble.onset:
            self._trouble = trouble

    def _agreed(self) -> int | None:
        """The earliest onset that any rank knows of; None where none knows of trouble. A collective of one number."""
        mine = math.inf if self._trouble is None else float(self._trouble.onset)
        if world_size() == 1:
            return None if self._trouble is None else self._trouble.onset
        onset = torch.tensor([mine], dtype=torch.float64, device=shared_device())
        torch.distributed.all_reduce(onset, op=torch.distributed.ReduceOp.MIN)
        return None if math.isinf(least := onset.tolist()[0]) else int(least)

    # -- between two steps ---------------------------------------------------------------------------------------

    def begin(self, also: Sequence[Any] = ()) -> None:
        """The run begins, or is gone on with: the first snapshot. `also` as for `look`.

        Raises:
            UnsupportedSetupError: What is trained cannot be put back.
        """
        for optimizer in self._optimizers():
            check_optimizer(optimizer)
        check_weights(self._weights())
        self._snapshots.clear()
        self._trouble = None
        self._take(also, first=True)

    def look(self, also: Sequence[Any] = (), *, last: bool = False) -> Rewound | None:
        """After a step: go back if it has to be, or take a snapshot if it is time.

        With several ranks, in every step that is time for a snapshot, and in the last, they agree; alone, at once.

        Args:
            also: What else is to be put back, each with `state_dict` and `load_state_dict`.
            last: Whether no step follows: then nothing may be left unread.

        Raises:
            TrainingTroubleError: It has to be, and cannot be, or was too often; where nobody ends the run in order.
        """
        self.rewound = None
        if self._taken is None:
            self.begin(also)
        assert self._taken is not None
        due = self._run.step % self._config.snapshot_steps == 0 and self._run.step != self._taken
        if last or due:
            self._catch_up()  # the host waits here anyway
        if last or due or (world_size() == 1 and self._trouble is not None):
            onset = self._agreed()
            if onset is not None:
                self._go_back(onset)
            elif due and not last:
                self._take(also)
        return self.rewound

    def _catch_up(self) -> None:
        self._capture.catch_up()
        self._run.flush()

    def _weights(self) -> list[Tensor]:
        """Parameters that are trained and all buffers, each once."""
        found: dict[int, Tensor] = {}
        for model in self._models():
            for tensor in (*(p for p in model.parameters() if p.requires_grad), *model.buffers()):
                found[id(tensor)] = tensor
        for optimizer in self._optimizers():
            for group in optimizer.param_groups:
                found.update((id(p), p) for p in group["params"] if p.requires_grad)
        return list(found.values())

    def _take(self, also: Sequence[Any], *, first: bool = False) -> None:
        if len(self._snapshots) == self._snapshots.maxlen:
            self._snapshots.popleft()  # at once, so that its memory is free
        point = self._run.keep()
        weights = self._weights()
        put_back, size = keep_weights(weights)
        all_of_it = [put_back]
        for optimizer in self._optimizers():
            put_back, more = keep_optimizer(optimizer)
            all_of_it.append(put_back)
            size += more
        all_of_it += [keep_stateful(thing) for thing in also]
        all_of_it += [keeper() for keeper in self.keepers]
        all_of_it.append(self._capture.keep())
        all_of_it.append(keep_random({w.device for w in weights}))
        self._taken = point.step
        self._snapshots.append(Snapshot(point, frozenset(map(id, weights)), all_of_it, size, first))
        if len(self._snapshots) == 1:
            logger.info(
                "Adaptive clipping: a snapshot takes %.3g MB of host memory, and up to %d are kept.",
                size / 1e6,
                self._snapshots.maxlen,
            )

    def _good(self, onset: int) -> Snapshot | None:
        """The newest that is older than the trouble."""
        trained = frozenset(map(id, self._weights()))

        def is_good(snapshot: Snapshot) -> bool:
            step = snapshot.point.step
            old = step <= onset - MARGIN or (snapshot.first and step <= max(onset, 0))
            return old and snapshot.trained == trained and self._run.can_go_back(snapshot.point)

        good = next(filter(is_good, reversed(self._snapshots)), None)
        if good is None and self.elsewhere is not None:
            good = self.elsewhere(onset - MARGIN)
        return good

    def _go_back(self, onset: int) -> None:
        trouble = self._trouble or Trouble(self._run.step - 1, onset, "Another rank has found trouble.")
        self._catch_up()
        snapshot = self._good(onset)
        if snapshot is None:
            self._trouble = None
            self._end(
                f"{trouble.reason} It was found at step {trouble.step} and began about step {max(onset, 0)}, and `on_trouble` is "
                f"'rewind', but there is no snapshot or checkpoint from before: {self._tried(self.history)} Go on from an older "
                "checkpoint, with a lower learning rate or without the bad batch.",
                trouble.step,
            )
            return
        for put_back in snapshot.put_back:
            put_back()
        self.rewound = self._run.go_back(snapshot.point, trouble.reason)
        self.history.append(self.rewound)
        while self._snapshots and self._snapshots[-1] is not snapshot:
            self._snapshots.pop()
        self._trouble = None
        logger.log(
            logging.WARNING if rank() == 0 else logging.DEBUG, "Adaptive clipping: %s", _in_one_line(self.rewound)
        )
        if len(self.history) > self._config.max_rewinds:
            self._end(
                f"{trouble.reason} It was found at step {trouble.step}, and `max_rewinds` ({self._config.max_rewinds}) is spent: "
                f"{self._tried(self.history[:-1])} The weights are those before step {snapshot.point.step}. Lower the learning rate, or "
                "look at the data in `incidents/`.",
                trouble.step,
            )

    def _tried(self, history: Sequence[Rewound]) -> str:
        if not history:
            return "training has not gone back before."
        spans = ", ".join(f"{r.first}-{r.last}" for r in history)
        return f"training went back {len(history)} time(s) before, and left out steps {spans}."

    def _end(self, message: str, step: int) -> None:
        error = TrainingTroubleError(message, step=step)
        if self.stop is None:
            raise error
        self.stop(error)


def _in_one_line(rewound: Rewound) -> str:
    text = str(rewound)
    return text[0].upper() + text[1:]
