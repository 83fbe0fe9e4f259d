"""Where the package works: one table. What is not in it is refused at construction, never ignored.

Keys are the values of `accelerate.DistributedType`, and a few that Accelerate has no name for; nothing of it is imported here.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch

from hf_adaclip.errors import ConfigError, UnsupportedSetupError
from hf_adaclip.hints import shown


class Support(NamedTuple):
    """`how` a setup is supported, or None and `why` not."""

    how: str | None
    why: str = ""


_DDP = "gradients are averaged before they are clipped, so every rank sees the same norm and decides alike"
SETUPS: Final[dict[str, Support]] = {
    "NO": Support("one process: the gradient's own norm"),
    "MULTI_CPU": Support(_DDP),
    "MULTI_GPU": Support(_DDP),
    "FSDP": Support(
        "every rank takes the norm of its shards; their squares are added in one small collective per step (FSDP2)"
    ),
    "FSDP_CPU_OFFLOAD": Support(
        None,
        "its gradients lie in host memory while loss and collectives are on the accelerator, which has not been run; unset "
        "`fsdp_offload_params`",
    ),
    "FSDP1": Support(None, "its flat gradients have no boundaries between parameters; set `fsdp_version: 2`"),
    "DEEPSPEED": Support(
        "the engine clips inside its own step, by a threshold from the steps before: one step late (ZeRO 1 to 3)"
    ),
    "MEGATRON_LM": Support(None, "the engine clips inside its own step, where no hook reaches"),
    "TP": Support(
        None,
        "tensor, context and sequence parallelism through Accelerate have not been run; in a plain loop `DTensor` works",
    ),
    "XLA": Support(None, "gradients are not reduced when they are clipped"),
    "SAGEMAKER_MP": Support(None, "its optimizer clips a copy of the gradients that nothing outside sees"),
    "DEVICE_MAP": Support(None, "a model spread over several devices in one process has not been run"),
}


def check_accelerator(accelerator: Any) -> str:
    """How an accelerator's setup is supported, in words.

    Raises:
        ConfigError: It is no accelerator.
        UnsupportedSetupError: It is not; parallelism within a layer or a sequence counts, though its `distributed_type` is MULTI_GPU.
    """
    if not hasattr(accelerator, "distributed_type"):
        raise ConfigError(
            f"`accelerator` must be an accelerate.Accelerator, but is {shown(accelerator)} instead. Pass `Accelerator()`, or leave it "
            "out in a loop without one."
        )
    parallelism = getattr(accelerator, "parallelism_config", None)
    if any(getattr(parallelism, f"{kind}_enabled", False) for kind in ("tp", "cp", "sp")):
        return check_setup("TP")
    name = distributed_type(accelerator)
    if name == "FSDP" and not getattr(accelerator, "is_fsdp2", True):
        return check_setup("FSDP1")
    if name == "FSDP" and _offloads(accelerator):
        return check_setup("FSDP_CPU_OFFLOAD")
    return check_setup(name)


def _offloads(accelerator: Any) -> bool:
    """Whether FSDP2 keeps weights and gradients in host memory; by the policy's name, because nothing of torch's FSDP is imported here."""
    plugin = getattr(getattr(accelerator, "state", None), "fsdp_plugin", None)
    policy = getattr(plugin, "cpu_offload", None)
    return policy is True or any(kind.__name__ == "CPUOffloadPolicy" for kind in type(policy).__mro__)


def distributed_type(accelerator: Any) -> str:
    """The accelerator's `distributed_type` by name."""
    value = accelerator.distributed_type
    return str(getattr(value, "value", value))


def check_device(device: torch.device) -> None:
    """Whether a controller can compute where the gradients are.

    Raises:
        UnsupportedSetupError: It cannot.
    """
    if device.type == "mps":
        raise UnsupportedSetupError(
            "`device` must have float64, but mps has none: square roots could not be replayed exactly. Train on the CPU or on CUDA, or "
            "keep the stock clipping (`max_grad_norm`)."
        )


def check_device_map(model: Any) -> None:
    """Whether a model is on one device.

    Raises:
        UnsupportedSetupError: `device_map` has spread it over several.
    """
    if len(set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))) > 1:
        check_setup("DEVICE_MAP")


def check_optimizer_name(name: Any) -> None:
    """Whether an optimizer of the Trainer's `optim=` lets anybody clip.

    Raises:
        UnsupportedSetupError: It steps within the backward pass, tensor by tensor, and there is never a whole gradient.
    """
    text = str(getattr(name, "value", name))
    if text in ("lomo", "adalomo") or text.endswith("_layerwise"):
        raise UnsupportedSetupError(
            f"`optim` must be an optimizer that steps after the backward pass, but is {text!r} instead: it steps within, and no gradient "
            "is left to clip. Take another one, e.g. 'adamw_torch_fused' or 'adafactor'."
        )


def check_setup(name: str) -> str:
    """How the setup is supported, in words.

    Raises:
        UnsupportedSetupError: It is not; the message names the setups that are.
    """
    entry = SETUPS.get(name, Support(None, "it is unknown to this version"))
    if entry.how is None:
        supported = ", ".join(sorted(k for k, v in SETUPS.items() if v.how))
        raise UnsupportedSetupError(
            f"`distributed_type` must be one of {supported}, but is {name} instead: {entry.why}. "
            "Keep the stock clipping (`max_grad_norm`) there."
        )
    return entry.how


def check_capture(device: torch.device) -> None:
    """Refuse to be recorded into a CUDA graph: a replay would repeat one step's row of the record, and nothing would be judged.

    Graphs inside the model (`torch.compile(mode="reduce-overhead")`) are no matter: clipping stands outside of them.

    Raises:
        UnsupportedSetupError: The current stream is being captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UnsupportedSetupError(
            "`clip_` must not be captured into a CUDA graph, but the current stream is being captured instead. Capture forward and "
            "backward pass, and clip and step outside of the graph."
        )


def check_optimizer_given(config: Any, optimizers: Sequence[Any], accelerator: Any) -> None:
    """Whether the optimizer is known where a setting needs it.

    Raises:
        ConfigError: It is not.
    """
    if config.max_pace > 1 and not optimizers:
        raise ConfigError(
            f"`optimizer` must be given when `max_pace` > 1 (it is {config.max_pace}), but is None instead: "
            "the pace multiplies its learning rate."
        )
    if config.agreement is True and not optimizers and accelerator is None:
        raise ConfigError(
            "`optimizer` must be given with `agreement`, but is None instead: it takes back a part of that optimizer's step."
        )
    if config.works_on == "element" and not optimizers and accelerator is None:
        raise ConfigError(
            f"`optimizer` must be given with controller '{config.controller}', but is None instead: its bound follows from the "
            "optimizer's state."
        )


def check_model(model: Any) -> None:
    """Whether it is one.

    Raises:
        ConfigError: It is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"`model` must be a torch.nn.Module, or a list of them, but is {shown(model)} instead.")
