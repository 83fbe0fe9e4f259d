"""`clip_state.safetensors`: the controller's state beside the optimizer's in a checkpoint. Never pickle."""

import json
import math
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from hf_adaclip.config import AdaptiveClipConfig, incident_settings
from hf_adaclip.controllers import build_controller
from hf_adaclip.controllers.numerics.ops import SCALAR
from hf_adaclip.errors import ConfigError, StateError
from hf_adaclip.gradients.transfer import HOST, moved
from hf_adaclip.ledger.anchors import global_step_of
from hf_adaclip.ledger.records import new_fields, revisions, state_problem
from hf_adaclip.ledger.schema import plain
from hf_adaclip.ledger.tail import HASH
from hf_adaclip.run.counts import RunStatistics

STATE_FILE: Final = "clip_state.safetensors"
STATE_SCHEMA: Final = 2
BESIDE: Final = "reach."
"""Prefix of the names of what is not the controller's."""
FRESH: Final = "fresh"
"""Name of what tells that the pace goes by the first epoch alone."""
_MOST_METADATA: Final = 64 * 1024 * 1024  # characters
CHECKPOINT: Final = re.compile(r"checkpoint-(\d{1,15})")
"""What a Trainer calls the folder of a checkpoint, with the number of its step."""
# Settings that may change between a checkpoint and its resumption without changing what is decided.
_FREE_FIELDS: Final = (
    "fold",
    *incident_settings(),
    "ledger",
    "ledger_required",
    "nan_filter_on_device",
    "pace_start",  # a Trainer that goes on for longer has another one
    "max_rewinds",
    "ring_capacity",
    "snapshot_steps",
    "max_consecutive_nonfinite",
    "self_test",
    "shadow",
)


def state_file(number: int) -> str:
    """Name of the state file of the so-manieth clipper of one accelerator, counted from 0."""
    return STATE_FILE if not number else STATE_FILE.replace(".", f"_{number}.")


def write_state(path: Path, tensors: dict[str, Tensor], config: AdaptiveClipConfig, **metadata: Any) -> None:
    """Write a state file; `metadata` must be JSON. What the Trainer calls the step is taken from the name of the folder."""
    from safetensors.torch import save_file  # here, because most starts of a run write none for a long time

    folder = CHECKPOINT.fullmatch(path.parent.name)
    metadata = {**metadata, **revisions(config), "trainer_step": None if folder is None else int(folder.group(1))}
    text = {
        "schema": str(STATE_SCHEMA),
        "config": json.dumps(config.to_dict()),
        "metadata": json.dumps(plain(metadata)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
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
        parts: Which pattern of `parameter_rules` they come from and how many they are; empty likewise.
        parameters: Names of all parameters that the state is kept for; None where they were not known, or not written yet.
    """

    tensors: dict[str, Tensor]
    step: int
    static_threshold: float
    statistics: RunStatistics
    ledger: str | None
    groups: tuple[str, ...]
    parts: tuple[tuple[str | None, int], ...] = ()
    parameters: tuple[str, ...] | None = None


def read_state(path: Path, config: AdaptiveClipConfig) -> SavedState | None:
    """Read the state file of a checkpoint.

    Returns:
        The state, or None when there is no such file (a checkpoint of the stock Trainer).

    Raises:
        StateError: The file is damaged, of another version, was written under a config that decides differently, belongs to another step
            than the `trainer_state.json` beside it, or holds what no run can have.
    """
    if not path.is_file():
        if path.exists() or path.is_symlink():
            raise StateError(
                f"`{path.name}` must be a file, but {path} is none (a folder, a FIFO or a link to nothing). "
                "Resume from another checkpoint, or delete it to start the controller afresh."
            )
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
        if sum(map(len, text.values())) > _MOST_METADATA:
            raise ValueError(f"its metadata is longer than {_MOST_METADATA} characters")
        given = json.loads(text["config"])
        saved = AdaptiveClipConfig.from_dict(given)
        if saved.spectral is not None and "spectral_memory" not in given:  # of before there was one
            saved = saved.replace(spectral_memory=0.0)
        metadata = json.loads(text["metadata"])
        names = metadata.get("parameters")
        state = SavedState(
            tensors=tensors,
            step=_whole(metadata, "step"),
            static_threshold=_positive(metadata, "static_threshold"),
            statistics=RunStatistics.from_dict(_statistics(metadata)),
            ledger=_hash_or_none(metadata, "ledger"),
            groups=tuple(str(name) for name in metadata.get("groups", ())),
            parts=tuple((None if p is None else str(p), int(n)) for p, n in metadata.get("parts", ())),
            parameters=None if names is None else tuple(str(name) for name in names),
        )
        trainer_step = _whole(metadata, "trainer_step") if metadata.get("trainer_step") is not None else state.step
        then = {"revision": metadata.get("revision", 1), **metadata.get("revisions", {})}
        newer = {name: (int(number), _revision(config, name)) for name, number in then.items()}
    except StateError:
        raise
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, ConfigError) as error:
        raise StateError(
            f"`{path.name}` must be a state file of hf_adaclip, but {path} is damaged: {error}. "
            "Resume from an older checkpoint, or delete the file to start the controller afresh."
        ) from error
    except RecursionError as error:
        raise StateError(
            f"`{path.name}` must be a state file of hf_adaclip, but {path} is damaged: its metadata is nested too deeply. "
            "Resume from an older checkpoint, or delete the file to start the controller afresh."
        ) from error
    _compare(path, saved, config)
    for name, (number, here) in newer.items():
        if number > here:
            raise StateError(
                f"`{path.name}` must be of revision {here} of the rule or older, but {path} is of {number} ({name}). "
                "Resume with the version of hf_adaclip that wrote it, or delete the file to start the controller afresh."
            )
    _check_step(path, state, trainer_step)
    older = any(number < here for number, here in newer.values())
    if problem := _state_problem(state, config, older=older):
        raise StateError(
            f"`{path.name}` must hold a state that a run can have, but in {path} {problem}. "
            "Resume from another checkpoint, or delete the file to start the controller afresh."
        )
    return state


class SavedPlan(NamedTuple):
    """What a run has by its length, in a state file; None where it does not say, which is for `read_state` to complain of.

    Attributes:
        start: Steps of the pace's start.
        max_pace: Its maximum.
        max_threshold: The upper limit of the threshold; None where there is none, too.
        fresh: Whether the pace goes by the first epoch alone.
    """

    start: int | None = None
    max_pace: float | None = None
    max_threshold: float | None = None
    fresh: bool = False


def plan_of(path: Path) -> SavedPlan:
    """With which plan a state file was written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            config = json.loads(file.metadata()["config"])
            fresh = f"{BESIDE}{FRESH}" in file.keys()  # noqa: SIM118 - it is no mapping
            start, *others = (config.get(name) for name in ("pace_start", "max_pace", "max_threshold"))
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return SavedPlan()
    numbers = [float(x) if isinstance(x, int | float) and not isinstance(x, bool) else None for x in others]
    return SavedPlan(start if type(start) is int and start > 0 else None, numbers[0], numbers[1], fresh)


def _check_step(path: Path, state: SavedState, trainer_step: int) -> None:
    """Whether the state belongs to the checkpoint that it lies in. Accelerate's folders do not say of which step they are."""
    try:
        counted = global_step_of(path.parent)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return  # a damaged one is for the Trainer to tell
    if counted is not None and counted != trainer_step:
        raise StateError(
            f"`{path.name}` must be of the step of its checkpoint, {counted} by trainer_state.json, but {path} is of step {trainer_step}: "
            "it was copied from another one. Resume from a checkpoint that is whole, or delete the file to start the controller afresh."
        )
    if state.statistics.steps != state.step:
        raise StateError(
            f"`{path.name}` must count its steps alike, but in {path} `step` is {state.step} and the counts by reason are of "
            f"{state.statistics.steps} steps. Resume from another checkpoint, or delete the file to start the controller afresh."
        )


def _state_problem(state: SavedState, config: AdaptiveClipConfig, *, older: bool) -> str | None:
    """What no run can have in a state, in words; shapes are compared when the parameters are known.

    Args:
        state: What was read.
        config: The present settings, which decide as those of the file.
        older: Whether an older revision of the rule wrote it: fields that are new are missing, others may be gone since.
    """
    own = {name: value for name, value in state.tensors.items() if not name.startswith(BESIDE)}
    for name, value in state.tensors.items():
        if name.startswith(BESIDE) and not (value.is_floating_point() and bool(torch.isfinite(value).all())):
            return f"`{name}` must hold finite numbers"
    if config.parameter_rules:
        return None  # what fields there are follows from the parameters: see `state_from_tensors`
    controller = build_controller(config)
    begins = controller.init(SCALAR, ())
    expected = dict(zip(begins._fields, begins, strict=True))
    if missing := sorted(set(expected) - set(own) - new_fields(controller)):
        return f"`{missing[0]}` is missing"
    if not older and (extra := sorted(set(own) - set(expected))):
        return f"`{extra[0]}` is none of its fields"
    for name, like in expected.items():
        if name in own and (problem := state_problem(name, own[name], like)):
            return problem
    count = own.get("count")
    if count is not None and count.numel() and float(count.max()) > state.step:
        return f"`count` must be at most the {state.step} steps done, but is {float(count.max()):g}"
    return None


def _revision(config: AdaptiveClipConfig, name: str) -> int:
    """The revision here of what a state calls by this name."""
    now = revisions(config)
    return int(now["revision"]) if name == "revision" else int(now.get("revisions", {}).get(name, 1))


def _whole(metadata: dict[str, Any], key: str) -> int:
    value = math.inf if metadata[key] == "inf" else metadata[key]  # one that never acts
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 2**53:
        raise ValueError(f"`{key}` is {value!r}, not a number of steps"[:200])
    return value


def _positive(metadata: dict[str, Any], key: str) -> float:
    value = math.inf if metadata[key] == "inf" else metadata[key]  # one that never acts
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"`{key}` is {value!r}, not a number above 0"[:200])
    return float(value)


def _hash_or_none(metadata: dict[str, Any], key: str) -> str | None:
    value = metadata[key]
    if value is not None and not (isinstance(value, str) and HASH.fullmatch(value)):
        raise ValueError(f"`{key}` is {value!r}, not the hash of a seal"[:200])
    return value


def _statistics(metadata: dict[str, Any]) -> dict[str, Any]:
    found = dict(metadata["statistics"])
    numbers = [*found["counts"].values(), *(v for k, v in found.items() if k != "counts")]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise ValueError("`statistics` holds something else than numbers of steps")
    return found


def _compare(path: Path, saved: AdaptiveClipConfig, config: AdaptiveClipConfig) -> None:
    before, now = saved.to_dict(), config.to_dict()
    # What only one of two controllers has says no more than their names do.
    changed = [k for k in now if k in before and k not in _FREE_FIELDS and before[k] != now[k]]
    if saved.on_trouble != config.on_trouble and "fallback" not in (saved.on_trouble, config.on_trouble):
        changed.remove("on_trouble")  # these decide alike and differ only in what is done about it
    if saved.max_pace == config.max_pace == 1:  # how a pace moves means nothing where there is none
        changed = [k for k in changed if not k.startswith("pace_")]
    if changed:
        names = {"static_threshold": "`static_threshold` (in a Trainer `max_grad_norm`)"}
        lines = "; ".join(f"{names.get(k, f'`{k}`')} was {before[k]!r} and is {now[k]!r}" for k in changed)
        raise StateError(
            f"`clip` must be as it was when the checkpoint was written, but {lines}. Pass the config of the checkpoint, "
            f"or delete {path} to start the controller afresh."
        )
