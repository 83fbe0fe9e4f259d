"""What a clipper has for going back, and for leaving out steps."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.drivers.lifetime import weakly
from hf_adaclip.errors import ConfigError
from hf_adaclip.incidents.leaving import Leaving
from hf_adaclip.incidents.rewind import Rewinder
from hf_adaclip.incidents.snapshot import check_optimizer, check_weights, keep_stateful, spread_out
from hf_adaclip.run.points import Point, Rewound
from hf_adaclip.run.run import Run
from hf_adaclip.support import distributed_type

if TYPE_CHECKING:
    from hf_adaclip.drivers.driver import Driver
    from hf_adaclip.incidents.capture import IncidentCapture

logger = logging.getLogger(__name__)


class GoingBack:
    """The part of `AdaptiveClipper` that takes a run back to before trouble, or past steps that nobody wants.

    Args:
        config: The settings.
        run: What decides.
        driver: Who knows the optimizers.
        capture: Who judges incidents.
        models: Gives what is trained.
        accelerator: The loop's, or None.
        output_dir: Folder of the run; by default that of its ledger, else the working folder.

    Attributes:
        output_dir: As given.
        rewinder: Who takes snapshots; None unless `on_trouble` is 'rewind'.

    Raises:
        ConfigError: `on_trouble` is 'rewind', and the model or the optimizer is not known.
        UnsupportedSetupError: It is, and what is known by now cannot be put back.
    """

    def __init__(
        self,
        config: AdaptiveClipConfig,
        run: Run,
        driver: "Driver",
        capture: "IncidentCapture",
        models: Callable[[], Sequence[Any]],
        accelerator: Any,
        output_dir: str | Path | None,
    ) -> None:
        self.config, self._run, self._driver, self._capture = config, run, driver, capture
        self.output_dir = output_dir
        self._leaving: Leaving | None = None
        self.rewinder: Rewinder | None = None
        if config.on_trouble != "rewind":
            return
        known = driver.optimizers
        if accelerator is not None and distributed_type(accelerator) == "FSDP":
            raise spread_out()
        if accelerator is None and not (known and models()):
            missing = "optimizer" if models() else "model"
            raise ConfigError(
                f"`{missing}` must be given when `on_trouble` is 'rewind', but is None instead: its state is what is put back."
            )
        for optimizer in known:
            check_optimizer(optimizer)
        for model in models():
            check_weights(model.parameters())
        rewinder = Rewinder(config, run, capture, models, lambda: driver.optimizers)
        rewinder.keepers.append(driver.keep)
        scaler = getattr(accelerator, "scaler", None)
        if scaler is not None:
            rewinder.keepers.append(lambda: keep_stateful(scaler))
        # Weakly: the run outlives the clipper, and must not hold models.
        run.alerts.listeners.append(weakly(rewinder.hear))
        capture.judged.append(weakly(rewinder.judge))
        self.rewinder = rewinder

    @property
    def rewound(self) -> Rewound | None:
        """What the last [`snapshot`] has undone: first and last step, and why; None where all is well."""
        return None if self.rewinder is None else self.rewinder.rewound

    def snapshot(self, *also: Any, last: bool = False) -> Rewound | None:
        """Call it at the end of every step, after `optimizer.step()` and `zero_grad()`.

        Under `on_trouble="rewind"` a copy of weights, optimizer, random numbers and controller is taken every `snapshot_steps` steps. After
        trouble the newest good one is put back here; the loop goes on with its next batch, and so without the data in between. Called
        before the first step too, it can go back to the beginning. In a Trainer all of that happens by itself.

        Args:
            also: What else is to be put back, each with `state_dict` and `load_state_dict`: a `GradScaler` of the loop's own, an average of
                the weights. What goes by the number of the step, such as a learning rate scheduler, is not.
            last: Whether no step follows.

        Returns:
            What was undone, as [`rewound`].

        Example:
            for batch in loader:
                if clipper.leaves_out():  # named in skip_batches.json
                    scheduler.step()
                    continue
                loss = ...
                clipper.clip_(model.parameters(), loss=loss.detach())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                clipper.snapshot()
                if clipper.rewound:
                    print("Went back:", clipper.rewound)

        Raises:
            TrainingTroubleError: There is nothing good to go back to, or `max_rewinds` is spent; then the weights are the good ones.
        """
        leaving = self.leaving()
        rewound = None
        try:
            if self.rewinder is not None:
                self._capture.begin(self.output_dir)  # whose rules tell of trouble too
                rewound = self.rewinder.look(also, last=last)
        finally:
            if self.rewinder is not None and self.rewinder.rewound is not None:
                leaving.add(self.rewinder.rewound)
            leaving.made(self._run.step)
        return rewound

    def moment_in(self, folder: str | Path) -> tuple[Point, Callable[[], None]] | None:
        """The moment that a checkpoint of this run holds, and what puts back what is kept for single parameters.

        Returns:
            None where there is none, or one of other parameters.

        Raises:
            StateError: The file is damaged, or belongs to another controller or config.
        """
        found = self._run.moment_in(Path(folder) / self._state_file)
        return None if found is None else (found[0], self._driver.keep(found[1]))

    @property
    def _state_file(self) -> str:
        raise NotImplementedError

    def leaves_out(self) -> bool:
        """Whether `skip_batches.json` in the folder of the run names the coming step.

        Then it is counted as left out, and the loop goes on with its next batch. Call it once for each step, when its batches are drawn and
        before the first forward pass.
        """
        leaving = self.leaving()
        if not leaving.names(self._run.step):
            return False
        leaving.begin(self._run.step)
        self._driver.leave_out()
        leaving.left_out()
        return True

    def leaving(self, offset: int = 0) -> Leaving:
        """What this run leaves out.

        Args:
            offset: What the numbers of the loop's steps are ahead of [`step`]; the first call says.

        Raises:
            ConfigError: `skip_batches.json` says what cannot be left out.
        """
        if self._leaving is None:
            folder = self.config.folder_of_run(self.output_dir)
            self._leaving = Leaving(folder, lambda: {p.device for p in self._driver.parameters}, offset=offset)
            if self._leaving.list:
                logger.warning("Adaptive clipping: %s leaves out %s.", folder, self._leaving.list)
        return self._leaving
