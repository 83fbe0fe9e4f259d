"""`second_moment`: clamp every element to a multiple of its own running size, which Adam keeps anyway.

    |g_i| <= width * sqrt(v_i / (1 - b2^t))        v Adam's second moment before this step, t the steps it has taken

Only the elements beyond their bound change, to the bound with their own sign.

Source: AdamWClip (PyPI `AdamWClip`; width 3) and the detection of spikes in Huang et al. 2025, "SPAM: Spike-Aware Adam with Momentum
Reset" (arXiv 2501.06842), section 4, equation 4, whose theta = 5000 is width sqrt(5000) = 70.7 on the uncorrected v.

Differs from them in:
1. until `warmup_observations` steps are done the static threshold rules; AdamWClip does nothing for 10 steps, SPAM for 20;
2. SPAM's periodic reset of both moments is left out: it throws away good state on a clock, whether or not a spike came, and belongs to an
   optimizer. So is its momentum mask;
3. the step count is the optimizer's own, so that bias correction goes on after a resumption (AdamWClip starts again);
4. a gradient that is not finite leaves the step out;
5. AdamWClip's floor of 0.01 under every bound is left out: it is an absolute size, far above the elements of most gradients.

It needs an optimizer that keeps `exp_avg_sq` (Adam, AdamW), and memory for a few more tensors as large as
the largest, or of 4 million numbers.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hf_adaclip.controllers.elementwise import FineController
from hf_adaclip.controllers.settings import setting, warmup


@dataclass(frozen=True)
class SecondMomentController(FineController):
    """Clamp every element of the gradient by its second moment.

    Example:
        >>> import torch
        >>> [round(bound, 6) for bound in SecondMomentController().bound(torch.tensor([0.5, 0.0])).tolist()]
        [1.5, 0.0]
    """

    idea: ClassVar[str] = "each element by Adam's own second moment"
    source: ClassVar[str] = "AdamWClip; SPAM, Huang et al. 2025"
    choose: ClassVar[str] = "spikes in a few coordinates, as in low-precision training"
    granularities: ClassVar[tuple[str, ...]] = ("element",)
    looks_at: ClassVar[Literal["weights", "second moment"]] = "second moment"

    width: float = setting(
        3.0,
        help="Multiples of the root of Adam's second moment; 70.7 is SPAM's theta.",
        range="(0, inf)",
        key="moment_width",
    )
    warmup_observations: int = warmup()

    @property
    def first_step(self) -> int:
        return self.warmup_observations

    def bound(self, reference: Tensor) -> Tensor:
        return reference * self.width

    def bounds(self, references: list[Tensor]) -> list[Tensor]:
        return list(torch._foreach_mul(references, self.width))
