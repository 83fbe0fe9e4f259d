"""Where the package works: one table. What is not in it is refused at construction, never ignored.

Keys are the values of `accelerate.DistributedType`; this module imports nothing of Accelerate.
"""

from typing import Any, Final, NamedTuple

from hf_adaclip.errors import UnsupportedSetupError


class Support(NamedTuple):
    """`how` a setup is supported, or None and `why` not."""

    how: str | None
    why: str = ""


_DDP = "gradients are averaged before they are clipped, so every rank sees the same norm and decides alike"
SETUPS: Final[dict[str, Support]] = {
    "NO": Support("one process: the gradient's own norm"),
    "MULTI_CPU": Support(_DDP),
    "MULTI_GPU": Support(_DDP),
    "FSDP": Support(None, "sharded gradients are not covered by tests yet"),
    "DEEPSPEED": Support(None, "the engine clips inside its own step, where no hook reaches"),
    "MEGATRON_LM": Support(None, "the engine clips inside its own step, where no hook reaches"),
    "TP": Support(None, "gradients on several device meshes are not covered by tests yet"),
    "XLA": Support(None, "gradients are not reduced when they are clipped"),
}


def check_accelerator(accelerator: Any) -> str:
    """How an accelerator's setup is supported, in words.

    Raises:
        UnsupportedSetupError: It is not; parallelism within a layer or a sequence counts, though its `distributed_type` is MULTI_GPU.
    """
    parallelism = getattr(accelerator, "parallelism_config", None)
    if any(getattr(parallelism, f"{kind}_enabled", False) for kind in ("tp", "cp", "sp")):
        return check_distributed_type("TP")
    return check_distributed_type(accelerator.distributed_type)


def check_distributed_type(distributed_type: Any) -> str:
    """How the setup is supported, in words.

    Raises:
        UnsupportedSetupError: It is not; the message names the setups that are.
    """
    name = str(getattr(distributed_type, "value", distributed_type))
    entry = SETUPS.get(name, Support(None, "it is unknown to this version"))
    if entry.how is None:
        supported = ", ".join(sorted(k for k, v in SETUPS.items() if v.how))
        raise UnsupportedSetupError(
            f"`distributed_type` must be one of {supported}, but is {name} instead: {entry.why}. "
            "Keep the stock clipping (`max_grad_norm`) there."
        )
    return entry.how
