"""Samples that are left out, at the sampler: the order of the others stays as it is."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset

from hf_adaclip.errors import ConfigError
from hf_adaclip.incidents.skip_list import SKIP_FILE


def leave_out_samples(dataloader: Any, samples: frozenset[int]) -> None:
    """From its next epoch on, a dataloader goes without these positions of its dataset; it is shorter by as many.

    A sampler cannot be put in the place of another one once a dataloader is made, so its class is one that was made on the spot.

    Raises:
        ConfigError: Samples have no position in this dataset, or its sampler does not draw each of them once.
    """
    dataset: Any = getattr(dataloader, "dataset", None)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"`samples` of `{SKIP_FILE}` must be empty with an iterable dataset, whose samples have no position, but has {len(samples)}. "
            "Name `steps`, or filter the dataset."
        )
    size = len(dataset)
    inside = {sample for sample in samples if sample < size}
    sampler = _innermost(dataloader)
    if sampler is None or not hasattr(sampler, "__len__") or len(sampler) != size:
        raise ConfigError(
            f"`samples` of `{SKIP_FILE}` must be empty where the sampler does not draw every sample once, but has {len(samples)}, and "
            f"{type(sampler).__name__} draws otherwise. Name `steps`, or filter the dataset."
        )
    kind, count = type(sampler), len(inside)

    def draw(own: Any) -> Iterator[int]:
        return (index for index in kind.__iter__(own) if int(index) not in inside)

    def length(own: Any) -> int:
        return int(kind.__len__(own)) - count

    sampler.__class__ = type(
        kind.__name__, (kind,), {"__iter__": draw, "__len__": length, "__module__": kind.__module__}
    )


def too_late() -> ConfigError:
    """The error for a run whose epochs have been laid out already."""
    return ConfigError(
        f"`samples` of `{SKIP_FILE}` must be empty when clipping is attached in `on_train_begin`, but are not: the length of an epoch is "
        "settled by then. Attach before `train()`, or name `steps`."
    )


def _innermost(dataloader: Any) -> Any:
    """What draws single samples, under all that makes batches of them and hands those out to ranks."""
    batches: Any = getattr(dataloader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return getattr(batches, "sampler", None)
