"""The batch of an incident once more through a model: loss, norm and modules, beside what was recorded; and sample by sample.

Weights change nowhere: there is a forward and a backward pass, and no step of an optimizer. A Trainer is asked by
`integrations.incident_replay`; a loop of one's own calls [`replay_if_asked`] before its first step.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from hf_adaclip.errors import ConfigError, LedgerError
from hf_adaclip.gradients.transfer import HOST, moved
from hf_adaclip.incidents.folder import Incident, load_incident
from hf_adaclip.incidents.kept import Part, decoded, parts_of
from hf_adaclip.incidents.samples import Sample, bisect, count_of
from hf_adaclip.incidents.shares import shares_of
from hf_adaclip.ledger.schema import plain

_TEXT: Final = 400


class Passed(NamedTuple):
    """What a pass over one step's micro-batches gave.

    Attributes:
        loss: Their mean, or what the training makes of them.
        norm: Of the gradient.
        shares: Modules and tensors by their share of the squared norm.
    """

    loss: float
    norm: float
    shares: dict[str, Any]


class Replayed(SystemExit):
    """Ends a script once its answer is there."""


@dataclass
class Request:
    """What a training is asked for, before its first step.

    Attributes:
        incident: Whose batch.
        checkpoint: Folder of the weights; None for those that the training begins with.
        rank: Whose batch, of several; None for all.
        bisect: Whether to look at every sample.
        answer: As [`replay`] gives it, once it is there.
    """

    incident: Incident
    checkpoint: Path | None
    rank: int | None = None
    bisect: bool = False
    answer: dict[str, Any] | None = field(default=None)

    def end(self, answer: dict[str, Any]) -> NoReturn:
        """Leave the answer, and end the training."""
        self.answer = answer
        raise Replayed(0)


_asked: list[Request] = []


def asked() -> Request | None:
    """What this process was started for, by `hf-adaclip incident RUN STEP --replay`; None in a training."""
    return _asked[-1] if _asked else None


@contextlib.contextmanager
def asking(request: Request) -> Iterator[None]:
    """While this is open, trainings of this process are asked."""
    _asked.append(request)
    try:
        yield
    finally:
        _asked.remove(request)


def replay_if_asked(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    load: Callable[[str], object] | None = None,
    processing_class: Any = None,
) -> None:
    """The line that a loop has before its first step, for `hf-adaclip incident RUN STEP --replay SCRIPT FLAGS`. In a training it does
    nothing.

    Args:
        model: As it is trained, on its device.
        loss_fn: From the model and a micro-batch to its loss.
        load: Reads the weights from the folder of a checkpoint, such as `accelerator.load_state`.
        processing_class: A tokenizer or processor that decodes token ids.

    Example:
        >>> import torch
        >>> replay_if_asked(torch.nn.Linear(2, 1), lambda model, batch: model(batch["x"]).mean())
    """
    request = asked()
    if request is None:
        return
    if request.checkpoint is not None:
        if load is None:
            raise ConfigError("`load` must be given to `replay_if_asked` where the run has checkpoints, but is not.")
        load(str(request.checkpoint))
    options = {"rank": request.rank, "bisect": request.bisect, "processing_class": processing_class}
    request.end(replay(model, request.incident.folder, loss_fn, **options))


def replay(
    model: nn.Module,
    incident: str | Path,
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    rank: int | None = None,
    bisect: bool = False,
    processing_class: Any = None,
) -> dict[str, Any]:
    """Forward and backward with the batch of an incident, as a loop that averages over its micro-batches does it.

    Args:
        model: On its device, with the weights in question. Its gradients are gone afterwards.
        incident: Folder of the incident.
        loss_fn: From the model and a micro-batch to its loss.
        rank: Whose batch; by default those of all ranks together, as the step was made of them.
        bisect: Measure every sample alone, too.
        processing_class: Decodes token ids, where `text.jsonl` does not say what they mean.

    Returns:
        `replayed` and `recorded` (`loss`, `norm`, `modules`, `tensors`), `samples` with `bisect`, and what they were made with.

    Raises:
        LedgerError: The batch was not kept, or is damaged.
        ConfigError: There was no such rank.
    """
    found = load_incident(Path(incident))
    batches = Batches(found, parts_of(found, rank))
    device = next((p.device for p in model.parameters()), HOST)
    model.train()

    def fed(micro_batch: Any, times: int) -> float:
        loss = loss_fn(model, on_device(micro_batch, device)) / times
        loss.backward()  # type: ignore[no-untyped-call]
        return number_of(loss)

    def whole() -> Passed:
        model.zero_grad()
        loss = math.fsum(fed(one, len(batches.all)) for one in batches.all)
        return Passed(loss, *norm_of(model))

    def alone(number: int, rows: Any) -> tuple[float, float]:
        model.zero_grad()
        return fed(rows, 1), norm_of(model)[0]

    answer = answer_of(batches, whole(), alone if bisect else None, processing_class)
    model.zero_grad()
    return answer


class Batches:
    """The micro-batches of a step, those of all chosen ranks one after another.

    Raises:
        LedgerError: One of them was not kept.
    """

    def __init__(self, incident: Incident, parts: list[Part]) -> None:
        self.incident, self.parts = incident, parts
        self.all: list[Any] = []
        self.places: list[tuple[Part, int]] = []
        """Of each: whose, and which one there."""
        for part in parts:
            if part.micro_batches is None:
                why = (incident.facts.get("batch") or {}).get("why") or ""
                raise LedgerError(f"{incident.folder} must hold the batch of the step, but does not: {why}")
            self.all += part.micro_batches
            self.places += [(part, number) for number in range(len(part.micro_batches))]
        if not self.all:
            raise LedgerError(f"{incident.folder} must hold the batch of the step, but holds none.")


def answer_of(
    batches: Batches,
    passed: Passed,
    alone: Callable[[int, Any], tuple[float, float]] | None,
    processing_class: Any = None,
) -> dict[str, Any]:
    """What is told of a replay, ready for strict JSON.

    Args:
        batches: What was fed.
        passed: What all of it together gave.
        alone: Measures some samples of a micro-batch; None where nobody asks for that.
        processing_class: A tokenizer or processor.
    """
    facts = batches.incident.facts
    kept = ("loss", "norm", "usual_norm", "modules", "tensors")
    answer: dict[str, Any] = {
        "step": batches.incident.step,
        "kind": batches.incident.kind,
        "folder": str(batches.incident.folder),
        "ranks": [part.rank for part in batches.parts],
        "world_size": facts.get("world_size", 1),
        "micro_batches": len(batches.all),
        "replayed": {"loss": passed.loss, "norm": passed.norm, **passed.shares},
        "recorded": {key: facts[key] for key in kept if key in facts},
    }
    if alone is not None:
        found = bisect(batches.all, alone)
        answer["samples_in_all"] = sum(map(count_of, batches.all))
        answer["samples"] = list(_told(batches, found, decoded(batches.all, processing_class)))
    told: dict[str, Any] = plain(answer)
    return told


def _told(batches: Batches, found: list[Sample], texts: dict[tuple[int, int], str]) -> Iterator[dict[str, Any]]:
    total = math.fsum(sample.norm**2 for sample in found)
    for sample in found:
        part, number = batches.places[sample.micro_batch]
        indices = part.indices[number] if number < len(part.indices) else None
        text = part.texts.get((number, sample.row)) or texts.get((sample.micro_batch, sample.row))
        yield {
            "rank": part.rank,
            "micro_batch": number,
            "sample": sample.row,
            "index": indices[sample.row] if indices is not None and sample.row < len(indices) else None,
            "loss": sample.loss,
            "norm": sample.norm,
            "share": round(sample.norm**2 / total, 6) if 0 < total < math.inf else None,
            "text": text if text is None else text[:_TEXT],
        }


def norm_of(model: nn.Module, scale: float = 1.0) -> tuple[float, dict[str, Any]]:
    """Norm of the gradients, and their shares; those of a loss that was multiplied by `scale` are divided by it."""
    given = {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
    if not given:
        return 0.0, {}
    norms = [
        moved(torch.linalg.vector_norm((g.to_dense() if g.is_sparse else g).float()), HOST) for g in given.values()
    ]
    together = torch.stack(norms).double() / scale
    return number_of(torch.linalg.vector_norm(together)), shares_of(together, list(given))


def number_of(value: Tensor) -> float:
    return float(moved(value.detach(), HOST))


def on_device(value: Any, device: torch.device) -> Any:
    """The same containers with their tensors on that device."""
    if isinstance(value, Tensor):
        return moved(value, device)
    if isinstance(value, Mapping):
        return {key: on_device(inner, device) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(on_device(inner, device) for inner in value)
    return value
