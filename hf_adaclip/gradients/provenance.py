"""Whether what is trained was trained before: what moved weights to where they are decides what may be done with their gradients.

transformers marks what `from_pretrained` loads. Where nothing is marked (`load_state_dict`, a deep copy, a model of another library) the
weights themselves say it: entries that were drawn one by one keep the largest singular value of an m x n matrix near its edge

    s_max = rms (sqrt(m) + sqrt(n)),

whatever they were drawn from, and a long training leaves directions far beyond. Which models were looked at: model_cards/RESEARCH.md,
entry 32.

Source of the edge: Marchenko and Pastur 1967; Bai and Yin 1993.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from hf_adaclip.gradients.matrices import as_matrix, hidden_matrices
from hf_adaclip.gradients.sharding import is_sharded
from hf_adaclip.gradients.transfer import HOST, moved
from hf_adaclip.reliance import is_of

BEYOND: Final = 1.3
"""Median of the largest singular values over their edge, above which matrices look trained."""
_PACKED: Final = (torch.uint8, torch.int8, torch.int32)
_ITERATIONS: Final = 8
_SMALLEST: Final = 16
"""Rows and columns that a matrix needs: in smaller ones chance has too much room."""


def trained_before(models: Sequence[Any]) -> bool:
    """Whether a hidden matrix that is trained was trained before; or what is trained in its place, where none is.

    A fresh head on a trained body does not change that. Fresh matrices beside frozen ones do: the factors of LoRA, a head alone.

    Where a version of transformers does not mark what it loads, a model that has a `name_or_path` counts as trained.
    """
    return bool(loaded_weights(models))


def frozen_beside(models: Sequence[Any]) -> bool:
    """Whether hidden matrices that were trained before are kept, as beside adapters or a head alone.

    Packed weights count as trained. Frozen copies of fresh weights, which follow them, do not, nor do a few that were computed: it takes
    most of the entries, or one matrix beside two that are trained, as with the factors of LoRA.
    """
    hidden = hidden_matrices(models)
    trained = [p for p in hidden if p.requires_grad]
    kept = _packed(models) + _loaded(models, [p for p in hidden if not p.requires_grad])
    most = sum(p.numel() for p in kept) > sum(p.numel() for p in trained)
    return bool(kept) and (most or 2 * len(kept) >= len(trained))


def _packed(models: Sequence[Any]) -> list[Tensor]:
    """Weights that are stored as integers: parameters (bitsandbytes) or buffers (GPTQ)."""
    found: dict[int, Tensor] = {}
    for model in models:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            packed = tensor.dtype in _PACKED and tensor.dim() == 2 and "weight" in name.rpartition(".")[2]
            if packed or getattr(tensor, "quant_state", None) is not None:
                found[id(tensor)] = tensor
    return list(found.values())


def loaded_weights(models: Sequence[Any]) -> list[Tensor]:
    """The hidden matrices that are trained and were before, each once; all that are trained, where the marks are missing.

    Where none is trained, but vectors, embeddings or stacks of experts: these, if they were before or stand beside matrices that were.
    """
    hidden = hidden_matrices(models)
    trained = [p for p in hidden if p.requires_grad]
    if trained:
        return _loaded(models, trained)
    others = list({id(p): p for model in models for p in model.parameters() if p.requires_grad}.values())
    marked = any(getattr(p, "_is_hf_initialized", False) for p in others)
    return others if marked or _loaded(models, hidden) else []


def _loaded(models: Sequence[Any], matrices: list[Tensor]) -> list[Tensor]:
    of_transformers = any(is_of("transformers", module) for model in models for module in model.modules())
    if of_transformers and not _loaded_is_marked():
        found = matrices if any(getattr(m, "name_or_path", "") for model in models for m in model.modules()) else []
    else:
        found = [p for p in matrices if getattr(p, "_is_hf_initialized", False)]
    return found or (matrices if look_trained(matrices) else [])


@torch.no_grad()
def look_trained(matrices: Sequence[Tensor]) -> bool:
    """Whether most of these have directions that no drawing of single entries gives; reads the device once."""
    sizes = [_over_edge(as_matrix(m)) for m in matrices if _can_tell(m)]
    return bool(sizes) and bool(torch.stack([moved(s, sizes[0].device) for s in sizes]).nanmedian() > BEYOND)


def _can_tell(matrix: Tensor) -> bool:
    """Whether all of it is here, and large enough."""
    return (
        matrix.device.type != "meta"
        and not is_sharded(matrix)
        and min(matrix.shape[0], matrix[0].numel()) >= _SMALLEST
    )


def _over_edge(matrix: Tensor) -> Tensor:
    """The largest singular value over that of the edge, from below, by power iteration; shape `[]`, NaN for a matrix of zeros."""
    x = matrix.to(torch.float32)
    rows, columns = x.shape
    start = torch.randn(columns, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device=HOST)
    v = moved(start, x.device)
    for _ in range(_ITERATIONS):
        v = x.mT @ (x @ (v / torch.linalg.vector_norm(v)))
    largest: Tensor = torch.linalg.vector_norm(x @ (v / torch.linalg.vector_norm(v)))
    rms: Tensor = torch.linalg.vector_norm(x) / math.sqrt(rows * columns)
    return largest / (rms * (math.sqrt(rows) + math.sqrt(columns)))


def _loaded_is_marked() -> bool:
    """Whether transformers leaves alone what has the mark, as it does with weights that were loaded."""
    initialization = sys.modules.get("transformers.initialization")
    if initialization is None:
        return False
    number = torch.ones((), dtype=torch.float32, device="cpu")
    setattr(number, "_is_hf_initialized", True)  # noqa: B010 - a tensor has no such attribute to type
    try:
        initialization.zeros_(number)
    except Exception:  # another function of that name
        return False
    return bool(number == 1)
