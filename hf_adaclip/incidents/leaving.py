"""Steps that are left out with their data, of a run that follows `skip_batches.json`.

Such a step is counted, and nothing else happens: no forward pass, no gradient, no step of the optimizer. The random numbers go on from
where they were after the last step that was made, though batches were drawn and put together in between: so it makes no difference whether
a step was left out, or made and undone.
"""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from hf_adaclip.incidents.skip_list import SKIP_FILE, SkipList, read_skip_list
from hf_adaclip.incidents.snapshot import PutBack, keep_random
from hf_adaclip.run.points import Rewound
from hf_adaclip.run.ranks import of_first_rank, rank

logger = logging.getLogger(__name__)


class Leaving:
    """What one run leaves out.

    Args:
        folder: Of the run.
        devices: Gives the devices whose random numbers count.
        offset: What the numbers of the loop's steps are ahead of the clipper's.

    Raises:
        ConfigError: The file says what cannot be left out.
    """

    def __init__(self, folder: Path, devices: Callable[[], Iterable[torch.device]], *, offset: int = 0) -> None:
        self._folder, self._devices, self._offset = folder, devices, offset
        self.list: SkipList = of_first_rank(lambda: read_skip_list(folder))
        self._random: PutBack | None = None

    def names(self, step: int) -> bool:
        """Whether a step is left out; `step` as the clipper counts."""
        return step + self._offset in self.list.steps

    def made(self, step: int) -> None:
        """All before `step` are complete; the next batch has not been drawn yet."""
        if not self.names(step):
            self._random = None
        elif self._random is None:
            self._random = keep_random(self._devices())

    def left_out(self) -> None:
        """A step has been left out."""
        if self._random is not None:
            self._random()

    def begin(self, step: int) -> None:
        """Where nobody has called `made`: the random numbers are those of now."""
        if self._random is None and self.names(step):
            self._random = keep_random(self._devices())

    def add(self, rewound: Rewound) -> None:
        """The steps that were undone are left out by whoever goes on from a checkpoint, too."""
        self.list = self.list.with_steps(rewound.first + self._offset, rewound.last + self._offset)
        if rank() != 0:
            return
        try:
            self.list.write(self._folder)
        except OSError as error:
            logger.warning(
                "Adaptive clipping: %s could not be written (%s). A run that is resumed from a checkpoint before step %d must be told of "
                "steps %d to %d.",
                self._folder / SKIP_FILE,
                error,
                rewound.last + self._offset,
                rewound.first + self._offset,
                rewound.last + self._offset,
            )
