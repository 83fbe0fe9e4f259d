"""Scaling gradients inside the optimizer's step instead of in a pass of its own.

A fused Adam or AdamW divides every gradient by `grad_scale` as it reads it; that attribute is made for a loss scaler, and takes any
float32 tensor. What would be a read and a write of all gradients is then a write, which the step does anyhow when it is given a scale.
It differs from multiplying beforehand in the last bit: g / (1 / c) for g * c.

Only on accelerators: there nobody knows on the host whether a step has to be scaled at all, so without folding every step pays for the
pass. In host memory a step inside the range scales nothing.
"""

from collections.abc import Sequence

from torch import Tensor

from hf_adaclip.config import AdaptiveClipConfig
from hf_adaclip.controllers.numerics.ops import Ops, Value
from hf_adaclip.gradients.guards import Guards


def why_not_folded(config: AdaptiveClipConfig, guards: Guards, parameters: Sequence[Tensor], ops: Ops) -> str | None:
    """The reason to scale in a pass of its own; None when folding is the same but for the last bit.

    Args:
        config: The settings.
        guards: The optimizers.
        parameters: The trainable parameters whose gradients are clipped.
        ops: The kind of numbers of the run.
    """
    if config.fold == "never":
        return "`fold` is 'never'"
    if ops.on_host:
        return "in host memory a step inside the range scales nothing, and a clipped one keeps the bits of torch's clipping"
    if config.controller == "static" or config.shadow:
        return "'static' and shadow mode keep the bits of the stock Trainer"
    if config.works_on != "global" or config.parameter_rules:
        return "the step takes one scale for all parameters, and these are judged apart"
    optimizers = guards.optimizers
    if len(optimizers) != 1:
        return f"the step has to be that of one optimizer, and {len(optimizers)} are known"
    if guards.paths != ["device"]:
        return f"{type(optimizers[0]).__name__} is not a fused Adam or AdamW that steps without a loss scaler"
    if guards.others_look:
        return "somebody else's hook runs before the step and may look at the gradients"
    stepped = {id(p) for group in optimizers[0].param_groups for p in group["params"] if p.requires_grad}
    if stepped != {id(p) for p in parameters}:
        return "the optimizer steps on other parameters than those that are clipped"
    return None


def scale_of(coefficient: Value, ops: Ops) -> Value:
    """What the step has to divide by to multiply by `coefficient`; exactly 1 for 1, and for the 0 of a step that is left out."""
    one = ops(1.0)
    inside = (coefficient < one) & (coefficient > ops(0.0))
    return ops.where(inside, one / coefficient, one)
