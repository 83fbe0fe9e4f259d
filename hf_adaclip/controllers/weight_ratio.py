"""`weight_ratio`: AGC, adaptive gradient clipping by the size of the weights.

    |g_u| <= ratio * max(|w_u|, floor)        for each unit u: a row of a matrix, a filter of a convolution, a whole vector

A unit beyond its bound is scaled down to it; the others are not touched. There is no history and no warm-up: the weights are the scale.

Source: Brock, De, Smith, Simonyan 2021, "High-Performance Large-Scale Image Recognition Without Normalization" (arXiv 2102.06171),
section 4.1, equation 3; ratio 0.01 and floor 1e-3 there and here.

The floor is what lets zero-initialised weights train, the B matrices of LoRA among them: their bound is ratio * floor, and Adam does not
care how small a gradient is. The paper does not clip the last layer: `parameter_rules={"classifier.*": "exclude"}`.

Differs from the paper in:
1. a gradient that is not finite leaves the step out; there the bound hides it or lets it through;
2. units are along the first axis of whatever tensor (as in timm): rows of a `Linear` are its outputs. The `Conv1D` of GPT-2 stores its
   weights the other way round, so there they are its inputs.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from hf_adaclip.controllers.elementwise import FineController
from hf_adaclip.controllers.settings import setting


@dataclass(frozen=True)
class WeightRatioController(FineController):
    """Bound the gradient of every unit by the norm of its weights.

    Example:
        >>> import torch
        >>> [round(bound, 6) for bound in WeightRatioController().bound(torch.tensor([2.0, 0.0])).tolist()]
        [0.02, 1e-05]
    """

    idea: ClassVar[str] = "each unit by the norm of its weights; no history"
    source: ClassVar[str] = "AGC, Brock et al. 2021"
    choose: ClassVar[str] = "vision models without normalisation, large batches"
    granularities: ClassVar[tuple[str, ...]] = ("unit",)
    looks_at: ClassVar[Literal["weights", "second moment"]] = "weights"

    ratio: float = setting(
        0.01,
        help="Largest ratio of a unit's gradient to its weights, as norms.",
        range="(0, inf)",
        key="weight_ratio",
    )
    floor: float = setting(
        1e-3, help="Norm that smaller weights count as, so that zeros can train.", range="(0, inf)", key="weight_floor"
    )

    def bound(self, reference: Tensor) -> Tensor:
        return reference.clamp(min=self.floor) * self.ratio
