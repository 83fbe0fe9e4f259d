"""Which parameters the spectral range acts on: weights that map features to features or to outputs, but no embedding of the input.

A matrix is a 2-D weight, the head and LoRA factors among them, or a convolution kernel as a matrix of outputs by everything else. Left
alone are

- embeddings: by the class of their module, by `get_input_embeddings`, or by "embed" in their name or the nearest three of their path
  (patches, positions; but not a whole model that somebody calls `embedder`);
- tensors that are one of these somewhere and a matrix elsewhere (a head that is tied to the embedding);
- depthwise kernels, whose rows meet different inputs, and what has one row, one column, or nothing.

With the head the runs of model_cards/spectral/ end better, at the full length and in 0.72 of the steps.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from torch import Tensor, nn

from hf_adaclip.gradients.groups import named_parameters

_CONVOLUTIONS: Final = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)

_NEAREST: Final = 3
"""Of a module's path, which count: `patch_embeddings.0.proj` has its sign that far away."""


class HiddenMatrices:
    """Looks parameters up in the modules that own them, again when it meets one that it does not know.

    Args:
        models: Gives the models.
    """

    def __init__(self, models: Callable[[], Sequence[Any]]) -> None:
        self._models = models
        self._known: dict[int, tuple[weakref.ref[Tensor], str | None]] = {}

    @property
    def named(self) -> bool:
        """Whether there is a model to look at; without one nothing tells an embedding from a matrix."""
        return bool(self._models())

    @property
    def found(self) -> int:
        """How many hidden matrices the models have, trainable or not, as of the last look."""
        return sum(name is not None for _, name in self._known.values())

    def among(self, parameters: Sequence[Tensor]) -> list[str | None]:
        """The name of each of these that is one, None for the others."""
        if not all(self._knows(p) for p in parameters):
            names = {id(p): name for name, p in named_parameters(self._models()).items()}
            hidden = hidden_matrices(self._models())
            # Those of earlier calls stay known: who asks for some and then for others is not to make this look again each time.
            before = [p for ref, _ in self._known.values() if (p := ref()) is not None]
            self._known = {id(p): (weakref.ref(p), None) for p in (*before, *parameters)}
            self._known |= {id(p): (weakref.ref(p), names[id(p)]) for p in hidden}
        return [self._known[id(p)][1] for p in parameters]

    def _knows(self, parameter: Tensor) -> bool:
        found = self._known.get(id(parameter))
        return found is not None and found[0]() is parameter


def hidden_matrices(models: Iterable[Any]) -> list[Tensor]:
    """The hidden matrices of these models, each once."""
    matrices: dict[int, Tensor] = {}
    left: set[int] = set()
    for model in models:
        for module in model.modules():
            left |= _embeddings_of(module)
        for path, module in model.named_modules(remove_duplicate=False):
            near = path.lower().split(".")[-_NEAREST:]
            embeds = isinstance(module, nn.Embedding | nn.EmbeddingBag) or any("embed" in part for part in near)
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if embeds or "embed" in name.lower():
                    left.add(id(parameter))
                elif _is_matrix(module, name, parameter):
                    matrices[id(parameter)] = parameter
    return [parameter for key, parameter in matrices.items() if key not in left]


def as_matrix(tensor: Tensor) -> Tensor:
    """Rows are outputs, columns everything else."""
    return tensor if tensor.dim() == 2 else tensor.flatten(1)


def _is_matrix(module: nn.Module, name: str, parameter: Tensor) -> bool:
    if "weight" not in name or not parameter.is_floating_point():
        return False
    if isinstance(module, _CONVOLUTIONS):
        if module.groups == module.in_channels and module.groups > 1:
            return False
    elif parameter.dim() != 2:
        return False
    rows, columns = parameter.shape[0], parameter.shape[1:].numel()
    return min(rows, columns) > 1


def _embeddings_of(module: Any) -> set[int]:
    """Ids of the embeddings that only a model's own method names."""
    try:
        found = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # transformers: a model without
        return set()
    return {id(p) for p in found.parameters()} if isinstance(found, nn.Module) else set()
