"""`clip_state.safetensors`: the controller's state beside the optimizer's in a checkpoint. Never pickle."""

import json
from pathlib import Path
from typing import Any, Final, NamedTuple

from torch import Tensor

from hf_adaclip.audit.schema import plain
from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.errors import ConfigError, StateError
from hf_adaclip.gradients.transfer import HOST, moved
from hf_adaclip.statistics import RunStatistics

STATE_FILE: Final = "clip_state.safetensors"
STATE_SCHEMA: Final = 2
# Settings that may change between a checkpoint and its resumption without changing what is decided.
_FREE_FIELDS: Final = (
    "fold",
    "ledger",
    "ledger_required",
    "nan_filter_on_device",
    "pace_start",  # a Trainer that goes on for longer has another one
    "ring_capacity",
    "max_consecutive_nonfinite",
    "self_test",
    "shadow",
)


def state_file(number: int) -> str:
    """Name of the state file of the so-manieth clipper of one accelerator, counted from 0."""
    return STATE_FILE if not number else STATE_FILE.replace(".", f"_{number}.")


def write_state(path: Path, tensors: dict[str, Tensor], config: AdaptiveClipConfig, **metadata: Any) -> None:
    """Write a state file; `metadata` must be JSON."""
    from safetensors.torch import save_file  # here, because most starts of a run write none for a long time

    text = {
        "schema": str(STATE_SCHEMA),
        "config": json.dumps(config.to_dict()),
        "metadata": json.dumps(plain(metadata)),
    }
    save_file({k: moved(v.detach(), HOST).contiguous().clone() for k, v in tensors.items()}, str(path), metadata=text)


class SavedState(NamedTuple):
    """What a state file holds: the controller's tensors by name, and where the run was.

    Attributes:
        tensors: The controller's state.
        step: Optimizer steps done.
        static_threshold: Threshold of the warm-up.
        statistics: Counts.
        ledger: Hash of the ledger's seal at that point, None without a ledger.
        groups: Names of what has a norm of its own; empty when only the global norm counts, or in files of before they were written.
    """

    tensors: dict[str, Tensor]
    step: int
    static_threshold: float
    statistics: RunStatistics
    ledger: str | None
    groups: tuple[str, ...]


def read_state(path: Path, config: AdaptiveClipConfig) -> SavedState | None:
    """Read the state file of a checkpoint.

    Returns:
        The state, or None when there is no such file (a checkpoint of the stock Trainer).

    Raises:
        StateError: The file is damaged, of another version, or was written under a config that decides differently.
    """
    if not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            text = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        if text.get("schema") != str(STATE_SCHEMA):
            raise StateError(
                f"`{path.name}` must have schema {STATE_SCHEMA}, but {path} has {text.get('schema')!r} instead. "
                "Resume with the version of hf_adaclip that wrote it, or delete the file to start the controller afresh."
            )
        saved = AdaptiveClipConfig.from_dict(json.loads(text["config"]))
        metadata = json.loads(text["metadata"])
        state = SavedState(
            tensors=tensors,
            step=int(metadata["step"]),
            static_threshold=float(metadata["static_threshold"]),
            statistics=RunStatistics.from_dict(metadata["statistics"]),
            ledger=None if metadata["ledger"] is None else str(metadata["ledger"]),
            groups=tuple(str(name) for name in metadata.get("groups", ())),
        )
    except StateError:
        raise
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, ConfigError) as error:
        raise StateError(
            f"`{path.name}` must be a state file of hf_adaclip, but {path} is damaged: {error}. "
            "Resume from an older checkpoint, or delete the file to start the controller afresh."
        ) from error
    _compare(path, saved, config)
    return state


def _compare(path: Path, saved: AdaptiveClipConfig, config: AdaptiveClipConfig) -> None:
    before, now = saved.to_dict(), config.to_dict()
    changed = [k for k in now if k not in _FREE_FIELDS and before[k] != now[k]]
    if {saved.on_trouble, config.on_trouble} == {"continue", "stop"}:
        changed.remove("on_trouble")  # the two decide alike and differ only in what is done about it
    if changed:
        names = {"static_threshold": "`static_threshold` (in a Trainer `max_grad_norm`)"}
        lines = "; ".join(f"{names.get(k, f'`{k}`')} was {before[k]!r} and is {now[k]!r}" for k in changed)
        raise StateError(
            f"`clip` must be as it was when the checkpoint was written, but {lines}. Pass the config of the checkpoint, "
            f"or delete {path} to start the controller afresh."
        )
