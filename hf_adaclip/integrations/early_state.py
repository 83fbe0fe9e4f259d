"""A checkpoint that is written between decision and step, as `enable_jit_checkpoint` does after a SIGTERM.

It holds weights of before the step, so it is to hold the controller's state of before the decision.
"""

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hf_adaclip.clipper import AdaptiveClipper
from hf_adaclip.integrations.watch import SeamWatch

if TYPE_CHECKING:
    from hf_adaclip.integrations.transformers import AdaptiveClipMixin


class EarlyState:
    """The state of before the present step, where such a checkpoint is about to be written.

    Args:
        trainer: Whose callbacks tell that.
        watch: Counts its steps.
    """

    def __init__(self, trainer: "AdaptiveClipMixin", watch: SeamWatch) -> None:
        self._trainer, self._watch = trainer, watch
        self._kept: tempfile.TemporaryDirectory[str] | None = None

    def look(self, clipper: AdaptiveClipper) -> None:
        """Before a step is decided on."""
        if self._kept is not None:
            self._kept.cleanup()
            self._kept = None
        managers = [getattr(callback, "jit_manager", None) for callback in self._trainer.callback_handler.callbacks]
        if any(getattr(manager, "is_checkpoint_requested", False) for manager in managers):
            self._kept = tempfile.TemporaryDirectory()
            folder = Path(self._kept.name) / self._name
            folder.mkdir()
            clipper.save_state(folder)

    def save(self, clipper: AdaptiveClipper, output_dir: str) -> None:
        """Write the state that belongs to the weights of a checkpoint."""
        kept = None if self._kept is None else Path(self._kept.name) / self._name
        if kept is not None and kept.is_dir():
            for file in kept.iterdir():
                shutil.copy2(file, output_dir)
            return
        if self._between(clipper):  # asked for since the decision
            clipper.alerts.warn_once(
                f"{output_dir} has no state of the controller, which has decided on a step that is not in its weights: a run that goes on "
                "from it starts the controller afresh."
            )
            return
        clipper.save_state(output_dir)

    @property
    def _name(self) -> str:
        return f"checkpoint-{self._trainer.state.global_step}"

    def _between(self, clipper: AdaptiveClipper) -> bool:
        asked = getattr(self._trainer.args, "enable_jit_checkpoint", False)
        return asked and clipper.step > self._watch.counted_steps
