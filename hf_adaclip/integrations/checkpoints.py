"""A Trainer's checkpoint as something to go back to, where no snapshot is old enough: trouble that began before a run was gone on with."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers.trainer_callback import ExportableState

from hf_adaclip.errors import StateError
from hf_adaclip.gradients.optimizers import unwrap_optimizer
from hf_adaclip.incidents.rewind import Snapshot
from hf_adaclip.incidents.snapshot import SCHEDULED
from hf_adaclip.run.checkpoint import CHECKPOINT
from hf_adaclip.run.ranks import of_first_rank

if TYPE_CHECKING:
    from hf_adaclip.integrations.transformers import AdaptiveClipMixin

logger = logging.getLogger(__name__)

BEST: Final = ("best_metric", "best_global_step", "best_model_checkpoint")
_OPTIMIZER_FILE: Final = "optimizer.pt"


def older_checkpoint(trainer: "AdaptiveClipMixin", step: int) -> Snapshot | None:
    """The newest checkpoint of the run that is whole and not younger than a step; None where there is none.

    Args:
        trainer: Whose checkpoint it is to be.
        step: Most steps that it may be of, as the clipper counts.
    """
    folder = trainer._run_folder()
    most = step + trainer._watch.offset
    name = of_first_rank(lambda: _newest(folder, most))
    if name is None:
        return None
    checkpoint = folder / name
    try:
        found = trainer._ready_clipper().moment_in(checkpoint)
    except StateError as error:
        logger.warning("Adaptive clipping: %s", error)
        return None
    if found is None:
        return None
    point, put_back_estimate = found
    weights = [lambda: trainer._load_from_checkpoint(str(checkpoint)), lambda: _load_optimizer(trainer, checkpoint)]
    rest = [put_back_estimate, _best_of(trainer, checkpoint), lambda: trainer._load_rng_state(str(checkpoint))]
    return Snapshot(point, frozenset(), [*weights, *rest], 0, first=False)


def _newest(folder: Path, most: int) -> str | None:
    numbers = {
        int(found.group(1)): path.name
        for path in folder.glob("checkpoint-*")
        if (found := CHECKPOINT.fullmatch(path.name)) is not None and (path / _OPTIMIZER_FILE).is_file()
    }
    return max(((n, name) for n, name in numbers.items() if n <= most), default=(0, None))[1]


def _load_optimizer(trainer: Any, checkpoint: Path) -> None:
    """All but what the schedule says of the present step."""
    groups = unwrap_optimizer(trainer.optimizer).param_groups
    now = [{name: group[name] for name in SCHEDULED & group.keys() - {"params"}} for group in groups]
    state = torch.load(checkpoint / _OPTIMIZER_FILE, map_location=trainer.args.device, weights_only=True)
    trainer.optimizer.load_state_dict(state)
    for group, values in zip(unwrap_optimizer(trainer.optimizer).param_groups, now, strict=True):
        group.update(values)


def _best_of(trainer: Any, checkpoint: Path) -> Callable[[], None]:
    """What puts back the best metric and the counters of callbacks as they were then."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))

    def put_back() -> None:
        kept = state.get("stateful_callbacks") or {}
        counters = [
            (callback, values.get("attributes", {}))
            for callback in trainer.callback_handler.callbacks
            if isinstance(values := kept.get(type(callback).__name__), dict) and isinstance(callback, ExportableState)
        ]
        put_back_best(trainer, state, counters)

    return put_back


def put_back_best(trainer: Any, best: Mapping[str, Any], counters: Iterable[tuple[Any, Mapping[str, Any]]]) -> None:
    """Set the best metric as it was, and the attributes of callbacks that export them."""
    for name in BEST:
        setattr(trainer.state, name, best.get(name))
    for callback, attributes in counters:
        for name, value in attributes.items():
            setattr(callback, name, value)
