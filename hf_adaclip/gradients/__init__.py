"""What touches gradients: norms, scaling, and leaving a step out. Nothing here decides anything."""

from hf_adaclip.gradients.guards import Guards
from hf_adaclip.gradients.norms import Gradients, collect, global_norm, tensor_norms
from hf_adaclip.gradients.observe import check_loss, observe_loss, to_value
from hf_adaclip.gradients.scale import scale_
from hf_adaclip.gradients.step_guard import StepGuard

__all__ = [
    "Gradients",
    "Guards",
    "StepGuard",
    "check_loss",
    "collect",
    "global_norm",
    "observe_loss",
    "scale_",
    "tensor_norms",
    "to_value",
]
