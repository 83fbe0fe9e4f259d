"""Whether what is trained was trained before: what moved weights to where they are decides what may be done with their gradients."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_adaclip.gradients.matrices import hidden_matrices
from hf_adaclip.reliance import is_of


def trained_before(models: Sequence[Any]) -> bool:
    """Whether a hidden matrix that is trained was loaded by `from_pretrained`.

    A fresh head on a trained body does not change that. Fresh matrices beside frozen ones do: the factors of LoRA, a head alone.

    Where a version of transformers does not mark what it loads, a model that has a `name_or_path` counts as trained.
    """
    return bool(loaded_matrices(models))


def loaded_matrices(models: Sequence[Any]) -> list[Tensor]:
    """The hidden matrices that are trained and were loaded, each once; all that are trained, where the marks are missing."""
    matrices = [p for p in hidden_matrices(models) if p.requires_grad]
    of_transformers = any(is_of("transformers", module) for model in models for module in model.modules())
    if of_transformers and not _loaded_is_marked():
        named = any(getattr(module, "name_or_path", "") for model in models for module in model.modules())
        return matrices if named else []
    return [p for p in matrices if getattr(p, "_is_hf_initialized", False)]


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
